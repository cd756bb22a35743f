"""The tokens that a model is inspected with: sequences of its validation, of a text, and random tokens repeated.

An encoder-decoder is inspected with pairs of a source and a target, or with the sequences of its validation, of which
the encoder reads the first tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from headway.data.config import DataConfig, MixSource, PairsSource, SyntheticSource
from headway.data.loader import IGNORED
from headway.data.manifest import MANIFEST_NAME, read_manifest
from headway.data.mixture import validation_shares
from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.evaluate.scorer import Row
from headway.launcher.evaluate.texts import TextSource, documents_of, own_sources
from headway.launcher.exchange.opened import Opened
from headway.launcher.exchange.steps import padded

if TYPE_CHECKING:
    from torch import Tensor

    from headway.model.decoder import ModelOutput
    from headway.model.seq2seq.build import Model

PASS_TOKENS = 2048
"""Tokens of a pass. Attention maps of all layers are held at once."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sequences. tokens [N, S] int64; labels [N, S], the next token, -100 without a target; segments [N, S] of
    synthetic sequences, which have several problems. Without segments, a sequence is one document.

    Of an encoder-decoder, these are the decoder's, and source [N, s] is the encoder's; source_segments [N, s], -1:
    padding. unit: What a sequence is, for people.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None = None
    source: Tensor | None = None
    source_segments: Tensor | None = None
    unit: str = "documents"

    @property
    def targets(self) -> int:
        return int((self.labels >= 0).sum())

    @property
    def real(self) -> Tensor:
        """Places that hold a token of the sequence [N, S]: those up to the last one with a target."""
        has = (self.labels >= 0).flip(1).cummax(1).values.flip(1)
        return has.bool()

    def passes(self) -> list[Sample]:
        size = self.tokens.shape[1] + (0 if self.source is None else self.source.shape[1])
        rows = max(1, PASS_TOKENS // size)
        return [self.rows(begin, begin + rows) for begin in range(0, len(self.tokens), rows)]

    def rows(self, begin: int, end: int) -> Sample:
        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[begin:end]

        return Sample(
            tokens=self.tokens[begin:end],
            labels=self.labels[begin:end],
            segments=cut(self.segments),
            source=cut(self.source),
            source_segments=cut(self.source_segments),
            unit=self.unit,
        )

    def read(self, model: Model) -> ModelOutput:
        """The model's pass over the sample, with the loss of each token."""
        device = model.embedding.device
        tokens, labels = self.tokens.to(device), self.labels.to(device)
        if self.source is None:
            return model(tokens, labels, self.segments)
        return model(self.source.to(device), tokens, labels, self.source_segments, self.segments)


def own_sample(model: Opened, text: TextSource | None, *, sequences: int, length: int) -> Sample:
    """The beginnings of documents of `text`, or of the run's own validation. Raises NoInputError without either.

    The validation of a mixture has documents of every dataset, by the weights of its first stage, and at least one.
    """
    if model.is_encoder_decoder:
        return _of_encoder_decoder(model, text, sequences=sequences, length=min(length, model.target_limit))
    data = model.data
    if text is None and data is not None and isinstance(data.source, SyntheticSource):
        return _sequences(data, sequences)
    own = own_sources(data) if text is None and data is not None else []
    if text is None and not own:
        raise NoInputError("--text: weights name no data; name a text, a .jsonl or .parquet file, or a dataset")
    parts = [(text or own[0], sequences)]
    if text is None and data is not None and isinstance(data.source, MixSource):
        weights = data.source.weights
        shares = validation_shares([sequences] * len(weights), weights, wanted=sequences)
        parts = [*zip(own[: len(weights)], shares, strict=True)]
        told = ", ".join(f"{share} of {source.name}" for source, share in parts)
        console.note(f"note: inspected are the first validation documents of the mixture: {told}")
    return _documents(model, parts, length=min(length, model.seq_len))


def _sequences(data: DataConfig, sequences: int) -> Sample:
    """Sequences of the validation, as the training reads them; of an encoder-decoder both parts of each."""
    from headway.data.loader import validation_batches

    tokens = sequences * data.seq_len
    (batch,) = validation_batches(data, tokens=tokens, micro_batch=sequences, dp_rank=0, dp_size=1)
    kept = (batch.labels >= 0).any(1)  # a small split is filled up with rows without targets
    if batch.source is None:
        return Sample(tokens=batch.tokens, labels=batch.labels, segments=batch.segments)
    return Sample(
        tokens=batch.tokens[kept],
        labels=batch.labels[kept],
        segments=None if batch.segments is None else batch.segments[kept],
        source=batch.source[kept],
        source_segments=None if batch.source_segments is None else batch.source_segments[kept],
        unit="sequences",
    )


def _of_encoder_decoder(model: Opened, text: TextSource | None, *, sequences: int, length: int) -> Sample:
    """Pairs of `text`, or of the run's own validation; else its sequences."""
    data = model.data
    if text is None and data is None:
        raise NoInputError("--text: weights name no data; name a dataset of pairs")
    if text is None and data is not None and not isinstance(data.source, PairsSource):
        return _sequences(data, sequences)
    if text is None:
        assert data is not None
        text = own_sources(data)[0]
    if not (text.path / MANIFEST_NAME).is_file() or read_manifest(text.path).pairs is None:
        raise SpecError(
            f"--text {text.path}: an encoder_decoder reads a source and a target, and this is no dataset of pairs; "
            "build one with `headway data build` (corpus.type: pairs), or leave --text out to read the run's validation"
        )
    return _pairs(model, text, sequences=sequences, length=length)


def _pairs(model: Opened, text: TextSource, *, sequences: int, length: int) -> Sample:
    """One pair a row: the whole source as in training, and the first `length` tokens of the decoder."""
    import torch

    rows = [row for row, _ in islice(documents_of(model, text), sequences)]
    rows = [row for row in rows if row.first <= length and row.source]
    if not rows:
        raise NoInputError(
            f"{text.path}: has no pair with a prompt and a target within {length} tokens; use more --tokens, or name "
            "another --text"
        )
    size = max(min(length, len(row.ids) - 1) for row in rows)
    tokens, labels = torch.zeros(len(rows), size, dtype=torch.int64), torch.full((len(rows), size), IGNORED)
    for number, row in enumerate(rows):
        known = torch.tensor(row.ids[: length + 1])
        tokens[number, : len(known) - 1] = known[:-1]
        labels[number, row.first - 1 : len(known) - 1] = known[row.first :]
    source, segments = padded([row.source for row in rows])
    return Sample(tokens=tokens, labels=labels, source=source, source_segments=segments, unit="pairs")


def _documents(model: Opened, parts: Sequence[tuple[TextSource, int]], *, length: int) -> Sample:
    """The first `length` tokens of each document. Of pairs, only tokens of targets are predicted, as in training.

    `parts`: sources, and how many of their documents are read at most.
    """
    import torch

    rows: list[Row] = []
    for source, most in parts:
        fit = (row for row, _ in documents_of(model, source) if len(row.ids) > 2 and row.first <= length)
        rows += islice(fit, most)
    if not rows:
        raise NoInputError(
            f"{parts[0][0].path}: has no document of two tokens, or no pair with tokens of its target within {length}; "
            "use more --tokens, or name another --text"
        )
    size = max(min(length, len(row.ids) - 1) for row in rows)
    tokens, labels = torch.zeros(len(rows), size, dtype=torch.int64), torch.full((len(rows), size), IGNORED)
    for number, row in enumerate(rows):
        known = torch.tensor(row.ids[: length + 1])
        tokens[number, : len(known) - 1] = known[:-1]
        labels[number, row.first - 1 : len(known) - 1] = known[row.first :]
    return Sample(tokens=tokens, labels=labels, unit="pairs" if any(row.first > 1 for row in rows) else "documents")


def repeated(model: Opened, *, sequences: int, half: int, seed: int = 0) -> Tensor:
    """Random tokens, the same ones twice: [sequences, 2 half]. No sequence has a token twice in one half if it can."""
    import torch

    vocabulary = model.model.embedding.shape[0]
    draw = np.random.default_rng(seed)
    rows = [draw.choice(vocabulary, half, replace=vocabulary < half) for _ in range(sequences)]
    first = torch.from_numpy(np.stack(rows)).long()
    return torch.cat([first, first], 1)
