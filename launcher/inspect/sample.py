"""The tokens that a model is inspected with: sequences of its validation, of a text, and random tokens repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from headway.data.config import DataConfig, SyntheticSource
from headway.launcher.base.errors import NoInputError
from headway.launcher.evaluate.texts import TextSource, documents_of, own_sources
from headway.launcher.exchange.opened import Opened

if TYPE_CHECKING:
    from torch import Tensor

PASS_TOKENS = 2048
"""Tokens of a pass. Attention maps of all layers are held at once."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sequences. tokens [N, S] int64; labels [N, S], the next token, -100 without a target; segments [N, S] of
    synthetic sequences, which have several problems. Without segments, a sequence is one document.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None = None

    @property
    def targets(self) -> int:
        return int((self.labels >= 0).sum())

    def passes(self) -> list[Sample]:
        rows = max(1, PASS_TOKENS // self.tokens.shape[1])
        parts = range(0, len(self.tokens), rows)
        return [
            Sample(
                tokens=self.tokens[begin : begin + rows],
                labels=self.labels[begin : begin + rows],
                segments=None if self.segments is None else self.segments[begin : begin + rows],
            )
            for begin in parts
        ]


def own_sample(model: Opened, text: TextSource | None, *, sequences: int, length: int) -> Sample:
    """The beginnings of documents of `text`, or of the run's own validation. Raises NoInputError without either."""
    data = model.data
    if text is None and data is not None and isinstance(data.source, SyntheticSource):
        return _synthetic(data, sequences)
    own = own_sources(data) if text is None and data is not None else []
    if text is None and not own:
        raise NoInputError("--text: weights name no data; name a text, a .jsonl or .parquet file, or a dataset")
    return _documents(model, text or own[0], sequences=sequences, length=min(length, model.seq_len))


def _synthetic(data: DataConfig, sequences: int) -> Sample:
    from headway.data.loader import validation_batches

    tokens = sequences * data.seq_len
    (batch,) = validation_batches(data, tokens=tokens, micro_batch=sequences, dp_rank=0, dp_size=1)
    return Sample(tokens=batch.tokens, labels=batch.labels, segments=batch.segments)


def _documents(model: Opened, source: TextSource, *, sequences: int, length: int) -> Sample:
    import torch

    rows: list[Sequence[int]] = []
    for document, _ in documents_of(model, source):
        if len(document.ids) > 2:
            rows.append(document.ids[: length + 1])
        if len(rows) == sequences:
            break
    if not rows:
        raise NoInputError(f"{source.path}: has no document of two tokens; name another --text")
    size = max(map(len, rows)) - 1
    tokens, labels = torch.zeros(len(rows), size, dtype=torch.int64), torch.full((len(rows), size), -100)
    for row, ids in enumerate(rows):
        known = torch.tensor(ids)
        tokens[row, : len(ids) - 1], labels[row, : len(ids) - 1] = known[:-1], known[1:]
    return Sample(tokens=tokens, labels=labels)


def repeated(model: Opened, *, sequences: int, half: int, seed: int = 0) -> Tensor:
    """Random tokens, the same ones twice: [sequences, 2 half]. No sequence has a token twice in one half if it can."""
    import torch

    vocabulary = model.decoder.embedding.shape[0]
    draw = np.random.default_rng(seed)
    rows = [draw.choice(vocabulary, half, replace=vocabulary < half) for _ in range(sequences)]
    first = torch.from_numpy(np.stack(rows)).long()
    return torch.cat([first, first], 1)
