"""The validation of a run: its fixed tokens, and the sets of which a loss of their own is recorded.

A mixture has a set for each of its datasets; together they are its validation. Further sets are the validation splits
of other datasets (`data.validation`), which are evaluated beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from headway.data.config import DataConfig, MdsSource, MixSource, PairsSource, datasets_of
from headway.data.loader import MicroBatch, Spread, open_source, spread, validation_spread, wanted_sequences
from headway.data.manifest import read_manifest
from headway.data.mixture import validation_shares


@dataclass(frozen=True, kw_only=True)
class ValidationData:
    """Micro-batches of this rank, and the documents of all ranks, which are numbered from 0.

    documents: For each micro-batch [B, S] int64, the document that each label belongs to.
    main: Documents of the validation. sets: Name -> documents of a set.
    """

    batches: Sequence[MicroBatch]
    documents: Sequence[Tensor]
    main: range
    sets: Mapping[str, range]

    @property
    def parts(self) -> list[range]:
        """The documents of the validation, then of each set."""
        return [self.main, *self.sets.values()]


def validation_data(cfg: DataConfig, *, tokens: int, micro_batch: int, dp_rank: int, dp_size: int) -> ValidationData:
    """The validation of `tokens` tokens, and as many of each further set. Raises as `validation_batches` does.

    The datasets of a mixture have shares of their weights, and at least one sequence each.
    """
    ranks = {"micro_batch": micro_batch, "dp_rank": dp_rank, "dp_size": dp_size}
    batches: list[MicroBatch] = []
    documents: list[Tensor] = []
    sets: dict[str, range] = {}

    def add(begin: int, more: Spread) -> range:
        batches.extend(more.batches)
        documents.extend(numbers + begin for numbers in more.documents)
        return range(begin, begin + more.count)

    if isinstance(cfg.source, MixSource):
        wanted = wanted_sequences(tokens, cfg.seq_len)
        opened = [open_source(with_source(cfg, part), split="validation") for part in datasets_of(cfg.source)]
        available = [source.num_sequences or 0 for source in opened]
        shares = validation_shares(available, cfg.source.weights, wanted=wanted)
        end = 0
        for part, source, share in zip(cfg.source.sources, opened, shares, strict=True):
            more = spread(source, share, masked=cfg.document_mask, encoder_tokens=cfg.encoder_tokens, **ranks)
            sets[part.title()] = found = add(end, more)
            end = found.stop
    else:
        end = add(0, validation_spread(cfg, tokens=tokens, **ranks)).stop
    main = range(end)
    for name, path in cfg.validation.items():
        source = source_of(path, cfg)
        sets[name] = found = add(end, validation_spread(with_source(cfg, source), tokens=tokens, **ranks))
        end = found.stop
    return ValidationData(batches=batches, documents=documents, main=main, sets=sets)


def source_of(path: str, cfg: DataConfig) -> MdsSource | PairsSource:
    """The source of a dataset of texts or of pairs, which have the settings of those of `cfg`, if it has pairs."""
    if read_manifest(Path(path).expanduser()).pairs is None:
        return MdsSource(type="mds", path=path)
    own = cfg.source
    if isinstance(own, PairsSource):
        return PairsSource(type="pairs", path=path, long=own.long, loss=own.loss)
    return PairsSource(type="pairs", path=path)


def with_source(cfg: DataConfig, source: MdsSource | PairsSource) -> DataConfig:
    """The config with another dataset."""
    return cfg.model_copy(update={"source": source, "validation": {}})
