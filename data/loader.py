"""Batches of training sequences: the same global batch for any number of ranks, micro batches and workers.

The global batch of step n is positions n * GB .. (n + 1) * GB - 1 of the source's global order; rank r of R takes the
r-th contiguous part of it. A loader has no state but the next step: start one at step n and it goes on from there.

Legend: B sequences of a micro batch, S sequence length, GB sequences of a global batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from headway.data.config import DataConfig, DataError, MdsSource
from headway.data.manifest import Split
from headway.data.packed import PackedText
from headway.data.prefetch import LateError, Prefetch
from headway.data.source import Sample, Source
from headway.data.synthetic import SyntheticTask

IGNORED = -100  # label of a position without a loss, torch's default `ignore_index`


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward pass reads. `segments` numbers the documents of a sequence; None when they are not masked."""

    tokens: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64, the next token; -100 is ignored
    segments: Tensor | None  # [B, S] int32


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank reads in one optimizer step.

    `targets` counts this rank's labels that are not ignored. `digest` is this rank's part of the global batch's hash:
    the sum over ranks modulo 2**64 is the same for any number of ranks. `sequences` counts this rank's.
    """

    step: int
    micro: tuple[MicroBatch, ...]
    targets: int
    digest: int
    sequences: int


def open_source(cfg: DataConfig, *, split: Split) -> Source:
    """The sequences of a split. Raises DataError when the dataset is missing or shorter than one sequence."""
    if isinstance(cfg.source, MdsSource):
        return PackedText(
            cfg.source.path,
            split=split,
            seq_len=cfg.seq_len,
            seed=cfg.seed,
            shuffle_window=cfg.shuffle_window,
            remote=cfg.source.remote,
            retry_s=cfg.retry_s,
        )
    return SyntheticTask(cfg.source, split=split, seq_len=cfg.seq_len, seed=cfg.seed)


def sample_digest(place: int, sample: Sample, *, masked: bool) -> int:
    """xxh64 of a sample's place in the global batch, its tokens and (when documents are masked) its segments."""
    digest = xxhash.xxh64(place.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(sample.tokens, dtype="<u4").data)
    if masked:
        digest.update(np.ascontiguousarray(sample.segments, dtype="<i4").data)
    return digest.intdigest()


def collate(samples: list[Sample], *, masked: bool) -> tuple[MicroBatch, int]:
    """One micro batch from at least one sample, and its number of targets.

    A position whose next token belongs to another document has no target when documents are masked.
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
    return batch, int((labels != IGNORED).sum())


class Loader:
    """This rank's part of each global batch, by step (`batch`) or one after the other (iteration, prefetched).

    Iteration starts at `start_step`. For training it has no end: positions run on into the next epoch; for validation
    it ends with the last whole global batch of the split. `wait_s` is the time the consumer spent waiting for data.
    Close it, or use it in a `with` statement, to end its threads.

    A batch that does not come in `timeout_s`, or in the config's if that is less, is a DataError.

    Raises DataError when the global batch does not divide into ranks and micro batches, when the dataset has another
    `fingerprint` than the given one, or as `open_source` does.
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
                f"global_batch: {global_batch} sequences do not divide into {dp_size} ranks of micro batches of "
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
        self._masked = cfg.document_mask
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
        """This rank's part of the global batch of `step`: random access, the same whenever and wherever asked."""
        places = range(self._first_place, self._first_place + self._per_rank)
        micro: list[MicroBatch] = []
        targets = digest = sequences = 0
        for begin in range(0, self._per_rank, self._micro_batch):
            samples = []
            for place in places[begin : begin + self._micro_batch]:
                sample = self.source.sample(self.source.index(step * self._global_batch + place))
                digest += sample_digest(place, sample, masked=self._masked)
                samples.append(sample)
            batch, count = collate(samples, masked=self._masked)
            micro.append(batch)
            targets += count
            sequences += len(samples)
        return StepBatch(step=step, micro=tuple(micro), targets=targets, digest=digest % (1 << 64), sequences=sequences)

    def sequences(self, step: int) -> list[int]:
        """Numbers of the sequences of this rank's part of the global batch of `step`, in order."""
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
                f"step {step + 1}: {batch.sequences} sequences of step {batch.step + 1} came instead of "
                f"{self._per_rank}: the data ended before the training did, or its order is broken"
            )
        self._next_step = step + 1
        return batch

    def _inline(self, step: int) -> StepBatch:
        try:
            return self.batch(step)
        except StopIteration as error:  # it would end the consumer's loop as if this were the end
            raise RuntimeError(f"preparing step {step + 1} ended with StopIteration") from error

    def _prefetched(self, step: int) -> StepBatch:
        if self._prefetch is None:
            self._prefetch = Prefetch(self.batch, first=step, end=self._end, ahead=self._ahead, workers=self._workers)
        try:
            return self._prefetch.get(step, timeout_s=self._timeout_s)
        except LateError:
            waits_for = ", ".join(map(str, self.source.reading())) or "no file: the processor is too busy"
            raise DataError(
                f"data.timeout_s: the batch of step {step + 1} did not come in {self._timeout_s:g} s, waiting for "
                f"{waits_for}; see whether that storage is slow or gone, copy the dataset to a local disk, or give "
                "more time with data.timeout_s and launch.hang_s"
            ) from None

    def close(self) -> None:
        """End the threads. Batches can still be had by `batch`."""
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
    """This rank's part of a validation: always the same sequences, spread evenly over the split.

    Spread, because the first sequences of a split can be one long document that says little about the rest.

    `tokens` is rounded down to whole sequences and to what the split has. The sequences are divided over the ranks as
    evenly as they go. Every rank gets the same number of micro batches, all of `micro_batch` rows (ZeRO-3 and pipelines
    need as many forward passes on every rank, of one shape): rows without a sequence have no targets. Whatever the
    layout, each sequence is there exactly once over all ranks.

    Raises DataError when `tokens` is less than one sequence.
    """
    source = open_source(cfg, split="validation")
    wanted = tokens // cfg.seq_len
    if wanted == 0:
        raise DataError(
            f"train.validation_tokens: {tokens:,} is less than one sequence of {cfg.seq_len:,} tokens; "
            f"use at least {cfg.seq_len:,}"
        )
    sequences = wanted if source.num_sequences is None else min(wanted, source.num_sequences)
    mine = range(sequences * dp_rank // dp_size, sequences * (dp_rank + 1) // dp_size)
    most_rows = -(-sequences // dp_size)
    passes = -(-most_rows // micro_batch)
    blank = source.sample(0)
    blank = Sample(blank.tokens, blank.segments, np.zeros(cfg.seq_len, dtype=bool))
    available = source.num_sequences or sequences
    rows = [source.sample(source.index(number * available // sequences)) for number in mine]
    rows += [blank] * (passes * micro_batch - len(rows))
    return [
        collate(rows[begin : begin + micro_batch], masked=cfg.document_mask)[0]
        for begin in range(0, len(rows), micro_batch)
    ]
