"""Mixtures: which dataset a position of the global order reads, and which of its own positions that is.

Positions form blocks of `BLOCK`. A block has of each dataset as many as its weight asks for; the counts follow from
rounded cumulative weights, so after any number of blocks the number of sequences of a dataset differs from its exact
share by at most one. Within a block the datasets are in random order. Weights may change over stages. Everything is a
pure function of the seed and the position, in integer arithmetic, so the batches do not depend on the layout and
resuming needs no state.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headway.data.config import DataConfig, DataError, MixSource
from headway.data.manifest import Split, canonical_json
from headway.data.order import permutation
from headway.data.packed import PackedText
from headway.data.source import Sample

BLOCK = 4096
"""Sequences of a block. Two of it are the smallest weight of a dataset that takes part."""
_UNIT = 1 << 32
_CACHED_BLOCKS = 4


class Mixture:
    """Maps a position to (number of the dataset, position in its own order). Thread-safe.

    stages: (first position, weight of each dataset), the first from position 0 on, in the order of their positions.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]], *, seed: int) -> None:
        assert stages and stages[0][0] == 0 and [s for s, _ in stages] == sorted({s for s, _ in stages})
        self._begins = [begin for begin, _ in stages]
        self._cumulative = [_cumulative(weights) for _, weights in stages]
        self._seed = seed
        self._blocks: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()
        self._before = [[0] * len(stages[0][1])]  # sequences of each dataset before each stage
        for stage in range(1, len(stages)):
            self._before.append(self._counts(stage - 1, self._begins[stage] - self._begins[stage - 1]))

    def place(self, position: int) -> tuple[int, int]:
        """(dataset, position in it) at `position` >= 0."""
        stage = self._stage(position)
        number, within = divmod(position - self._begins[stage], BLOCK)
        with self._lock:
            datasets, earlier = self._block(stage, number)
        dataset = int(datasets[within])
        return dataset, self._before[stage][dataset] + self._until(stage, number)[dataset] + int(earlier[within])

    def counts(self, positions: int) -> list[int]:
        """Sequences of each dataset among the first `positions` positions."""
        stage = self._stage(max(0, positions - 1))
        return self._counts(stage, positions - self._begins[stage])

    def _stage(self, position: int) -> int:
        return max(stage for stage, begin in enumerate(self._begins) if begin <= position)

    def _counts(self, stage: int, positions: int) -> list[int]:
        """Sequences of each dataset before a stage and among its first `positions`."""
        number, rest = divmod(positions, BLOCK)
        found = [a + b for a, b in zip(self._before[stage], self._until(stage, number), strict=True)]
        if rest:
            with self._lock:
                datasets, _ = self._block(stage, number)
            extra = np.bincount(datasets[:rest], minlength=len(found))
            found = [count + int(more) for count, more in zip(found, extra, strict=True)]
        return found

    def _until(self, stage: int, number: int) -> list[int]:
        """Sequences of each dataset in the first `number` blocks of a stage."""
        ends = [(number * BLOCK * part + _UNIT // 2) // _UNIT for part in self._cumulative[stage]]
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]

    def _block(self, stage: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """([BLOCK] the dataset of each position, [BLOCK] how many earlier positions of the block have the same)."""
        found = self._blocks.get((stage, number))
        if found is None:
            counts = np.subtract(self._until(stage, number + 1), self._until(stage, number))
            order = permutation(BLOCK, "mixture", self._seed, stage, number)
            datasets = np.repeat(np.arange(len(counts)), counts)[order]
            earlier = np.empty(BLOCK, dtype=np.int64)
            for dataset, count in enumerate(counts.tolist()):
                earlier[datasets == dataset] = np.arange(count)
            found = self._blocks[stage, number] = datasets, earlier
            if len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end((stage, number))
        return found


def _cumulative(weights: Sequence[float]) -> list[int]:
    """Cumulative shares in units of 1 / _UNIT; the last one is exactly _UNIT."""
    total, running, found = sum(weights), 0.0, []
    for weight in weights:
        running += weight
        found.append(round(_UNIT * running / total))
    return [*found[:-1], _UNIT] if weights[-1] else _closed(found)


def _closed(found: list[int]) -> list[int]:
    """Cumulative shares whose last datasets have a weight of 0: these get nothing through rounding."""
    last = found[-1]
    return [_UNIT if value == last else value for value in found]


class MixedText:
    """Sequences of several datasets. Training follows the weights; validation has of each a share of its weight.

    In validation the sequences of each dataset are spread evenly over its split, dataset after dataset, and as many as
    the weights allow without repeating one. Raises DataError as `PackedText` does, or if the tokenizers differ.
    """

    def __init__(self, cfg: DataConfig, source: MixSource, *, split: Split) -> None:
        self.parts = [
            PackedText(
                part.path,
                split=split,
                seq_len=cfg.seq_len,
                seed=cfg.seed,
                shuffle_window=cfg.shuffle_window,
                remote=part.remote,
                cache_bytes=part.cache_bytes,
                retry_s=cfg.retry_s,
            )
            for part in source.sources
        ]
        self.names = [part.title() for part in source.sources]
        self.vocab_size = self.parts[0].vocab_size
        self.fingerprint = mixed_fingerprint([part.fingerprint for part in self.parts])
        if any(part.vocab_size != self.vocab_size for part in self.parts):
            raise DataError("data.source.sources: the datasets have other vocabularies; build them with one tokenizer")
        self._first = np.concatenate([[0], np.cumsum([part.num_sequences for part in self.parts])])
        self.num_sequences: int | None = None
        self.mixture: Mixture | None = None
        if split == "train":
            self.mixture = mixture_of(cfg, source)
        else:
            self._shares = validation_shares([part.num_sequences for part in self.parts], source.weights)
            self._ends = np.cumsum(self._shares)
            self.num_sequences = int(self._ends[-1])

    def index(self, position: int) -> int:
        if self.mixture is not None:
            part, place = self.mixture.place(position)
        else:
            position %= int(self._ends[-1])
            part = int(np.searchsorted(self._ends, position, "right"))
            number = position - int(self._ends[part]) + self._shares[part]
            place = number * self.parts[part].num_sequences // self._shares[part]
        return int(self._first[part]) + self.parts[part].index(place)

    def sample(self, index: int) -> Sample:
        part, own = self._part(index)
        return self.parts[part].sample(own)

    def documents(self, index: int) -> range:
        part, own = self._part(index)
        found = self.parts[part].documents(own)
        before = sum(len(earlier.document_ends) for earlier in self.parts[:part])
        return range(before + found.start, before + found.stop)

    def _part(self, index: int) -> tuple[int, int]:
        """(dataset, index in it) of a sequence."""
        part = int(np.searchsorted(self._first, index, "right")) - 1
        return part, index - int(self._first[part])

    def trained(self, sequences: int) -> dict[str, dict[str, float]]:
        """Name of each dataset -> its tokens among the first `sequences` of the training, and passes over it."""
        assert self.mixture is not None, "validation has no order"
        counts = self.mixture.counts(sequences)
        return {
            name: {"tokens": count * part.seq_len, "epochs": count / part.num_sequences}
            for name, part, count in zip(self.names, self.parts, counts, strict=True)
        }

    def reading(self) -> list[Path]:
        return [path for part in self.parts for path in part.reading()]

    def close(self) -> None:
        for part in self.parts:
            part.close()


def mixture_of(cfg: DataConfig, source: MixSource) -> Mixture:
    """The order of a mixture. A stage begins with the first sequence after its tokens."""
    stages = [(0, source.weights)]
    stages += [(-(-stage.from_tokens // cfg.seq_len), stage.weights) for stage in source.stages]
    if len({begin for begin, _ in stages}) < len(stages):
        raise DataError("data.source.stages: two stages begin in one sequence; begin them further apart")
    return Mixture(stages, seed=cfg.seed)


def validation_shares(available: Sequence[int], weights: Sequence[float], *, wanted: int | None = None) -> list[int]:
    """Validation sequences of each dataset: shares of the weights, at least 1, without repeating one.

    wanted: Sequences of all together; None: as many as there are.
    """
    total = sum(weights)
    most = min(count * total / weight for count, weight in zip(available, weights, strict=True))
    most = most if wanted is None else min(most, wanted)
    shares = (round(most * weight / total) for weight in weights)
    return [min(count, max(1, share)) for count, share in zip(available, shares, strict=True)]


def mixed_fingerprint(fingerprints: Sequence[str]) -> str:
    """Fingerprint of datasets in their order. The weights belong to the spec."""
    return hashlib.sha256(canonical_json(["mix", *fingerprints])).hexdigest()
