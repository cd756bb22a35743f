"""Batches of training sequences. The global batch does not depend on the number of ranks, micro-batches and workers.

The global batch of step n consists of the positions n * GB .. (n + 1) * GB - 1 of the source's global order. Rank r of
R reads its r-th contiguous part. The only state of a loader is the next step, so a run resumes by starting a loader at
that step.

Legend: B sequences per micro-batch, S sequence length, GB sequences per global batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from headway.data.config import DataConfig, DataError, MdsSource, MixSource, PairsSource
from headway.data.manifest import Split
from headway.data.mixture import MixedText
from headway.data.packed import PackedText
from headway.data.packed_pairs import PackedPairs
from headway.data.prefetch import LateError, Prefetch
from headway.data.source import Sample, Source
from headway.data.split_pairs import SplitPairs
from headway.data.synthetic import SyntheticTask

IGNORED = -100  # label of positions without a loss; torch's default `ignore_index`


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Inputs of one forward pass. Of an encoder-decoder, `tokens`, `labels` and `segments` are the decoder's."""

    tokens: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64, the next token; -100 is ignored
    segments: Tensor | None  # [B, S] int32, index of the document within the sequence; None without document mask
    source: Tensor | None = None  # [B, s] int64, tokens of the encoder; None for a decoder
    source_segments: Tensor | None = None  # [B, s] int32, as `segments`, and -1: padding


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The batch of one rank for one optimizer step.

    step: The optimizer step, from 0.
    micro: The micro-batches.
    targets: Number of labels that are not ignored.
    digest: This rank's part of the hash of the global batch. The hash is the sum over ranks modulo 2**64, which does
        not depend on the number of ranks.
    sequences: Number of sequences.
    """

    step: int
    micro: tuple[MicroBatch, ...]
    targets: int
    digest: int
    sequences: int


def open_source(cfg: DataConfig, *, split: Split) -> Source:
    """Open the source of a split. Raises DataError if the dataset is missing or shorter than one sequence."""
    if isinstance(cfg.source, PairsSource) and cfg.encoder_tokens is not None:
        return SplitPairs.of(cfg, cfg.source, split=split, encoder_tokens=cfg.encoder_tokens)
    if isinstance(cfg.source, PairsSource):
        return PackedPairs.of(cfg, cfg.source, split=split)
    if isinstance(cfg.source, MdsSource):
        return PackedText(
            cfg.source.path,
            split=split,
            seq_len=cfg.seq_len,
            seed=cfg.seed,
            shuffle_window=cfg.shuffle_window,
            remote=cfg.source.remote,
            cache_bytes=cfg.source.cache_bytes,
            retry_s=cfg.retry_s,
        )
    if isinstance(cfg.source, MixSource):
        return MixedText(cfg, cfg.source, split=split)
    return SyntheticTask(cfg.source, split=split, seq_len=cfg.seq_len, seed=cfg.seed)


def sample_digest(place: int, sample: Sample, *, masked: bool) -> int:
    """xxh64 of a sample's position in the global batch, its tokens and (with document mask) its segments."""
    digest = xxhash.xxh64(place.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(sample.tokens, dtype="<u4").data)
    if masked:
        digest.update(np.ascontiguousarray(sample.segments, dtype="<i4").data)
    return digest.intdigest()


def collate(samples: list[Sample], *, masked: bool, encoder_tokens: int | None = None) -> tuple[MicroBatch, int]:
    """Collate samples (at least one) to a micro-batch. Returns it and its number of targets.

    With document mask, a position whose next token belongs to another document has no target. `encoder_tokens`: of each
    sequence, the first tokens are the source, whose positions have no targets.
    """
    tokens = np.stack([sample.tokens for sample in samples]).astype(np.int64)
    segments = np.stack([sample.segments for sample in samples])
    labels = tokens[:, 1:].copy()
    if masked:
        labels[segments[:, 1:] != segments[:, :-1]] = IGNORED
    for row, sample in zip(labels, samples, strict=True):
        if sample.targets is not None:
            row[~sample.targets] = IGNORED
    batch = MicroBatch(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        labels=torch.from_numpy(labels),
        segments=torch.from_numpy(np.ascontiguousarray(segments[:, :-1], dtype=np.int32)) if masked else None,
    )
    if encoder_tokens is not None:
        batch = split(batch, encoder_tokens)
    return batch, int((batch.labels != IGNORED).sum())


def split(batch: MicroBatch, encoder_tokens: int) -> MicroBatch:
    """The batch of an encoder-decoder: the encoder reads the first tokens, the decoder reads and predicts the others.

    The first token after the source is the decoder's first input, so it is not predicted.
    """
    cut = encoder_tokens
    numbers = batch.segments
    return MicroBatch(
        tokens=batch.tokens[:, cut:].contiguous(),
        labels=batch.labels[:, cut:].contiguous(),
        segments=None if numbers is None else numbers[:, cut:].contiguous(),
        source=batch.tokens[:, :cut].contiguous(),
        source_segments=None if numbers is None else numbers[:, :cut].contiguous(),
    )


class Loader:
    """Loads this rank's part of each global batch, by step (`batch`) or by iteration with prefetching.

    Iteration starts at `start_step`. In training it is infinite and continues into further epochs; in validation it
    ends with the last full global batch of the split. `wait_s` is the total time spent waiting for data. Call `close`,
    or use a `with` statement, to end the prefetch threads.

    timeout_s: If a batch takes longer than this, or than the config's timeout, DataError is raised.
    fingerprint: Expected fingerprint of the dataset.

    Raises DataError if the global batch does not divide into ranks and micro-batches, if the fingerprint of the dataset
    differs, or for the reasons of `open_source`.
    """

    def __init__(
        self,
        cfg: DataConfig,
        *,
        split: Split,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        start_step: int = 0,
        timeout_s: float | None = None,
        fingerprint: str | None = None,
    ) -> None:
        if global_batch % (dp_size * micro_batch):
            raise DataError(
                f"global_batch: {global_batch} sequences do not divide into {dp_size} ranks with micro-batches of "
                f"{micro_batch}; use a multiple of {dp_size * micro_batch}"
            )
        assert 0 <= dp_rank < dp_size and start_step >= 0
        self.source = open_source(cfg, split=split)
        if fingerprint is not None and self.source.fingerprint != fingerprint:
            raise DataError(
                f"data.source: the dataset was replaced while the run started (fingerprint {fingerprint[:16]} then, "
                f"{str(self.source.fingerprint)[:16]} now); start the same command again, or restore it"
            )
        self.wait_s = 0.0
        self._masked, self._encoder_tokens = cfg.document_mask, cfg.encoder_tokens
        self._global_batch, self._micro_batch = global_batch, micro_batch
        self._per_rank = global_batch // dp_size
        self._first_place = dp_rank * self._per_rank
        self._workers, self._ahead = cfg.workers, cfg.prefetch
        self._timeout_s = cfg.timeout_s if timeout_s is None else min(cfg.timeout_s, timeout_s)
        self._next_step = start_step
        self._end: int | None = None
        if split == "validation" and self.source.num_sequences is not None:
            self._end = self.source.num_sequences // global_batch
        self._prefetch: Prefetch[StepBatch] | None = None

    def batch(self, step: int) -> StepBatch:
        """This rank's part of the global batch of `step`. Random access; a pure function of `step`."""
        places = range(self._first_place, self._first_place + self._per_rank)
        micro: list[MicroBatch] = []
        targets = digest = sequences = 0
        for begin in range(0, self._per_rank, self._micro_batch):
            samples = []
            for place in places[begin : begin + self._micro_batch]:
                sample = self.source.sample(self.source.index(step * self._global_batch + place))
                digest += sample_digest(place, sample, masked=self._masked)
                samples.append(sample)
            batch, count = collate(samples, masked=self._masked, encoder_tokens=self._encoder_tokens)
            micro.append(batch)
            targets += count
            sequences += len(samples)
        return StepBatch(step=step, micro=tuple(micro), targets=targets, digest=digest % (1 << 64), sequences=sequences)

    def sequences(self, step: int) -> list[int]:
        """Indices of the sequences in this rank's part of the global batch of `step`, in order."""
        places = range(self._first_place, self._first_place + self._per_rank)
        return [self.source.index(step * self._global_batch + place) for place in places]

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        step = self._next_step
        if self._end is not None and step >= self._end:
            raise StopIteration
        began = time.perf_counter()
        batch = self._inline(step) if self._workers == 0 else self._prefetched(step)
        self.wait_s += time.perf_counter() - began
        if (batch.step, batch.sequences) != (step, self._per_rank):
            raise DataError(
                f"step {step + 1}: got {batch.sequences} sequences of step {batch.step + 1} instead of "
                f"{self._per_rank}: the data ended before training, or its order is wrong; check the dataset with "
                "`headway data verify SPEC`, then start the same command again"
            )
        self._next_step = step + 1
        return batch

    @property
    def is_ready(self) -> bool:
        """Whether the next batch has been prefetched."""
        return self._prefetch is not None and self._prefetch.has(self._next_step)

    def _inline(self, step: int) -> StepBatch:
        try:
            return self.batch(step)
        except StopIteration as error:  # would silently end the consumer's loop
            raise RuntimeError(f"preparing step {step + 1} ended with StopIteration") from error

    def _prefetched(self, step: int) -> StepBatch:
        if self._prefetch is None:
            self._prefetch = Prefetch(self.batch, first=step, end=self._end, ahead=self._ahead, workers=self._workers)
        try:
            return self._prefetch.get(step, timeout_s=self._timeout_s)
        except LateError:
            waits_for = ", ".join(map(str, self.source.reading())) or "no file: the processor is too busy"
            raise DataError(
                f"data.timeout_s: the batch of step {step + 1} was not ready after {self._timeout_s:g} s, waiting for "
                f"{waits_for}; check whether that storage is slow or gone, copy the dataset to a local disk, or "
                "increase data.timeout_s and launch.hang_s"
            ) from None

    def close(self) -> None:
        """End the threads. `batch` still works afterwards."""
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None
        self.source.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def validation_batches(
    cfg: DataConfig, *, tokens: int, micro_batch: int, dp_rank: int, dp_size: int
) -> list[MicroBatch]:
    """This rank's part of a validation, which always uses the same sequences.

    The sequences are spread evenly over the split, because the first ones may come from a single long document.
    `tokens` is rounded down to full sequences and limited to the split. Over all ranks, each sequence occurs exactly
    once in every layout. The ranks get nearly equal numbers of sequences and the same number of micro-batches with
    `micro_batch` rows each, because ZeRO-3 and pipelines need the same number and shape of forward passes on every
    rank. Padding rows have no targets.

    Raises DataError if `tokens` is less than one sequence.
    """
    ranks = {"micro_batch": micro_batch, "dp_rank": dp_rank, "dp_size": dp_size}
    return validation_spread(cfg, tokens=tokens, **ranks).batches


def validation_spread(cfg: DataConfig, *, tokens: int, micro_batch: int, dp_rank: int, dp_size: int) -> Spread:
    """`validation_batches` with their documents."""
    source = open_source(cfg, split="validation")
    wanted = wanted_sequences(tokens, cfg.seq_len)
    sequences = wanted if source.num_sequences is None else min(wanted, source.num_sequences)
    ranks = {"micro_batch": micro_batch, "dp_rank": dp_rank, "dp_size": dp_size}
    return spread(source, sequences, masked=cfg.document_mask, encoder_tokens=cfg.encoder_tokens, **ranks)


def wanted_sequences(tokens: int, seq_len: int) -> int:
    """Whole sequences in `tokens`. Raises DataError if there is none."""
    if tokens < seq_len:
        raise DataError(
            f"train.validation_tokens: {tokens:,} is less than one sequence of {seq_len:,} tokens; "
            f"use at least {seq_len:,}"
        )
    return tokens // seq_len


@dataclass(frozen=True, kw_only=True)
class Spread:
    """This rank's part of sequences of a source.

    batches: The micro-batches.
    documents: For each micro-batch [B, S] int64, the number of the document that each label belongs to. The documents
        of all ranks' sequences are numbered from 0 in the order of the split.
    count: Documents of all ranks.
    """

    batches: list[MicroBatch]
    documents: list[Tensor]
    count: int


def spread(
    source: Source,
    sequences: int,
    *,
    masked: bool,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    encoder_tokens: int | None = None,
) -> Spread:
    """This rank's part of `sequences` sequences, spread evenly over a source; see `validation_batches`."""
    mine = range(sequences * dp_rank // dp_size, sequences * (dp_rank + 1) // dp_size)
    most_rows = -(-sequences // dp_size)
    passes = -(-most_rows // micro_batch)
    blank = source.sample(0)
    blank = Sample(blank.tokens, blank.segments, np.zeros(len(blank.tokens) - 1, dtype=bool))
    available = source.num_sequences or sequences
    indices = [source.index(number * available // sequences) for number in range(sequences)]
    rows = [source.sample(indices[number]) for number in mine]
    documents = [source.documents(index) for index in indices]
    known = np.unique(np.concatenate([np.arange(found.start, found.stop) for found in documents]))
    numbers = np.zeros((passes * micro_batch, len(blank.tokens) - 1), dtype=np.int64)
    for place, (number, row) in enumerate(zip(mine, rows, strict=True)):
        numbers[place] = np.searchsorted(known, documents[number].start + row.segments[1:])
    rows += [blank] * (len(numbers) - len(rows))
    parts = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
    return Spread(
        batches=[collate(part, masked=masked, encoder_tokens=encoder_tokens)[0] for part in parts],
        documents=list(torch.from_numpy(numbers[:, encoder_tokens or 0 :]).split(micro_batch)),
        count=len(known),
    )
