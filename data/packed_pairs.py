"""Pairs of a prompt and a target, packed into sequences. Only the tokens of targets are predicted (`loss: targets`).

A sequence of length S has S + 1 tokens: whole pairs, each as its own document, then padding. A pair has the tokens of
its prompt (with the separator at its end), those of its target, and the end-of-document token. Its labels are the
tokens after the prompt. A pair of more than S + 1 tokens loses tokens from the end of its prompt, before the separator;
it keeps the separator, the whole target and at least one token of the prompt, or it is left out.

Pairs are packed by best fit, longest first, within blocks of `BLOCK` pairs of one shard, in stored order. The packing
is a function of the dataset, the sequence length and `long`, so the order of sequences is one as for texts
(`headway.data.order`), and a pair occurs once in an epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from headway.data.config import DataConfig, DataError, PairsSource
from headway.data.manifest import Split
from headway.data.packed import PackedText
from headway.data.source import Sample

BLOCK = 1024
"""Pairs that are packed together."""


@dataclass(frozen=True, kw_only=True)
class PairFacts:
    """What becomes of the pairs of a split. padding: share of the positions that hold no token of a pair."""

    pairs: int
    cut: int
    left_out: int
    sequences: int
    padding: float


class PackedPairs(PackedText):
    """Sequences of the pairs of a split. Training is shuffled by `seed`; validation is in stored order.

    Raises DataError if the dataset has texts instead of pairs, or no pair of the split fits a sequence.
    """

    def __init__(
        self,
        path: str,
        *,
        long: Literal["cut", "leave_out"],
        loss: Literal["targets", "all"],
        split: Split,
        **options: Any,
    ) -> None:
        self._long, self._loss = long, loss
        super().__init__(path, split=split, **options)

    @classmethod
    def of(cls, cfg: DataConfig, source: PairsSource, *, split: Split, **more: Any) -> Self:
        return cls(
            source.path,
            long=source.long,
            loss=source.loss,
            split=split,
            seq_len=cfg.seq_len,
            seed=cfg.seed,
            shuffle_window=cfg.shuffle_window,
            remote=source.remote,
            cache_bytes=source.cache_bytes,
            retry_s=cfg.retry_s,
            **more,
        )

    def _lay_out(self, split: Split, path: str) -> int:
        documents = self._documents
        pairs = documents.manifest.pairs
        if documents.prompts is None or pairs is None:
            raise DataError(
                f"data.source.type: pairs needs a dataset that was built from pairs, and {path} has texts; use type: "
                "mds, or build it from a corpus of `type: pairs` or `stdlib_functions`"
            )
        self.separator_tokens = len(pairs.separator_ids)
        fits, cut = self._measure(documents.lengths, documents.prompts, split, path)
        self._sequences: list[list[int]] = []  # documents of each
        self._per_shard: list[int] = []
        for first, last in zip(documents.first_document, documents.first_document[1:], strict=False):
            before = len(self._sequences)
            chosen = np.flatnonzero(fits[first:last]) + first
            for begin in range(0, len(chosen), BLOCK):
                block = chosen[begin : begin + BLOCK].tolist()
                self._sequences += [[block[place] for place in each] for each in self._pack(block)]
            self._per_shard.append(len(self._sequences) - before)
        ends = np.cumsum([len(each) + 1 for each in self._sequences])
        self._first_number = np.concatenate([[0], ends])
        self.facts = PairFacts(
            pairs=int(fits.sum()),
            cut=int((fits & cut).sum()),
            left_out=int((~fits).sum()),
            sequences=len(self._sequences),
            padding=1 - float(self._kept[fits].sum()) / (len(self._sequences) * (self.seq_len + 1)),
        )
        return len(self._sequences)

    def _measure(
        self, lengths: np.ndarray, prompts: np.ndarray, split: Split, path: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """(the pairs that fit a sequence, those whose prompt loses tokens), bool [pairs], of the tokens of each pair
        and of its prompt. Raises DataError if none fits.
        """
        room = self.seq_len + 1
        needed = lengths - prompts + self.separator_tokens + 1  # with one token of the prompt
        fits = lengths <= room if self._long == "leave_out" else needed <= room
        if not fits.any():
            shortest = int((lengths if self._long == "leave_out" else needed).min())
            raise DataError(
                f"data.seq_len: {self.seq_len:,} is too short for every pair of the {split} split of {path}; use "
                f"seq_len >= {shortest - 1:,}"
                + (", or data.source.long: cut" if self._long == "leave_out" else ", or shorter targets")
            )
        self._kept = np.minimum(lengths, room)  # tokens of each pair that fits
        return fits, lengths > room

    def _pack(self, block: list[int]) -> list[list[int]]:
        """The sequences of a block of pairs, each as places in the block."""
        return best_fit([int(self._kept[document]) for document in block], self.seq_len + 1)

    def sequences_per_shard(self) -> list[int]:
        """Number of sequences per shard. All pairs of a sequence are in one shard."""
        return self._per_shard

    def documents(self, index: int) -> range:
        """Each pair is a document, numbered in the order of the sequences, and so is what is left of a sequence."""
        first = int(self._first_number[index])
        return range(first, first + len(self._sequences[index]) + 1)

    def sample(self, index: int) -> Sample:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        documents, room = self._documents, self.seq_len + 1
        assert documents.prompts is not None, "checked at the start"
        tokens = np.full(room, documents.manifest.eos_id, dtype=documents.dtype)
        segments = np.full(room, len(self._sequences[index]), dtype=np.int32)
        targets = np.zeros(self.seq_len, dtype=bool)
        begin = 0
        for segment, document in enumerate(self._sequences[index]):
            length, prompt = int(documents.lengths[document]), int(documents.prompts[document])
            found = documents.tokens(document)
            if int(found.max()) >= self.vocab_size:
                self._refuse(document, found)
            if removed := length - int(self._kept[document]):
                kept = shortened(found[:prompt].tolist(), self.separator_tokens, prompt - removed)
                found = np.concatenate([np.array(kept, dtype=found.dtype), found[prompt:]])
                prompt -= removed
            end = begin + len(found)
            tokens[begin:end] = found
            segments[begin:end] = segment
            targets[begin + (prompt - 1 if self._loss == "targets" else 0) : end - 1] = True
            begin = end
        return Sample(tokens, segments, targets)


def shortened(prompt: Sequence[int], separator: int, room: int) -> list[int]:
    """The ids of a prompt, the last `separator` of which are the separator's, without its end: at most `room` ids."""
    removed = max(0, len(prompt) - room)
    end = len(prompt) - separator
    return [*prompt[: end - removed], *prompt[end:]]


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Pack items into bins of `room`: each, the largest first, into the fullest bin that has room for it.

    Returns the items of each bin, in order of their numbers; bins are in order of their first item. Every size is at
    most `room`. There are at most 11/9 times the smallest number of bins, and 4 more (Johnson, 1974).
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room that is left, number of the bin), ascending
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        place = bisect_left(free, (sizes[item], -1))
        if place < len(free):
            left, number = free.pop(place)
            bins[number].append(item)
        else:
            left, number = room, len(bins)
            bins.append([item])
        insort(free, (left - sizes[item], number))
    return sorted(sorted(each) for each in bins)
