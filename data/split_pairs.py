"""Pairs of a prompt and a target for an encoder-decoder: the encoder reads prompts, the decoder predicts targets.

A sequence of length S has S + 1 tokens. The first P (`data.encoder_tokens`) are the encoder's: the prompts of several
pairs, without separator, then padding with the segment -1. The other S + 1 - P are the decoder's: for each of these
pairs the tokens that start a target, those of the target, and the end-of-document token; then padding, a document of
its own. Prompt and target of a pair have the same segment, so the decoder sees the prompt of its own pair only. Labels
are those of targets and their ends.

A target starts with the ids of the dataset's separator; without separator, with the end-of-document token.

A prompt of more than P tokens loses its end. Pairs whose start and target do not fit the decoder's part are left out.
Pairs are packed as for decoders (`headway.data.packed_pairs`), but each must fit both parts of its sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headway.data.config import DataError
from headway.data.manifest import Manifest, Split
from headway.data.packed_pairs import PackedPairs
from headway.data.source import Sample


class SplitPairs(PackedPairs):
    """As `PackedPairs`, for an encoder of `encoder_tokens` tokens of each sequence."""

    def __init__(self, path: str, *, encoder_tokens: int, **options: Any) -> None:
        self.encoder_tokens = encoder_tokens
        super().__init__(path, **options)

    def _measure(
        self, lengths: np.ndarray, prompts: np.ndarray, split: Split, path: str
    ) -> tuple[np.ndarray, np.ndarray]:
        room = self.encoder_tokens
        self._rooms = (room, self.seq_len + 1 - room)
        self._start = np.array(start_ids(self._documents.manifest), dtype=self._documents.dtype)
        sources, targets = prompts - self.separator_tokens, lengths - prompts + len(self._start)
        cut = sources > room
        taken = ~cut if self._long == "leave_out" else np.ones_like(cut)
        if not taken.any():
            raise DataError(
                f"data.encoder_tokens: {room:,} is too short for every prompt of the {split} split of {path}; use "
                f"encoder_tokens >= {int(sources.min()):,}, or data.source.long: cut"
            )
        fits = taken & (targets <= self._rooms[1])
        if not fits.any():
            shortest = int(targets[taken].min())
            raise DataError(
                f"data.seq_len: {self.seq_len:,} leaves the decoder {self.seq_len - room:,} tokens beside "
                f"encoder_tokens, too few for every target of the {split} split of {path}; use seq_len >= "
                f"{room + shortest - 1:,}, or shorter targets"
            )
        self._parts = np.stack([np.minimum(sources, room), targets], 1)  # [pairs, 2]
        self._kept = self._parts.sum(1)
        return fits, cut

    def _pack(self, block: list[int]) -> list[list[int]]:
        return best_fit_in_both(self._parts[block], self._rooms)

    def sample(self, index: int) -> Sample:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        documents, pairs = self._documents, self._sequences[index]
        assert documents.prompts is not None, "checked at the start"
        tokens = np.full(self.seq_len + 1, documents.manifest.eos_id, dtype=documents.dtype)
        segments = np.full(len(tokens), len(pairs), dtype=np.int32)
        segments[: self.encoder_tokens] = -1
        targets = np.zeros(self.seq_len, dtype=bool)
        source_begin, begin = 0, self.encoder_tokens
        for segment, document in enumerate(pairs):
            found = documents.tokens(document)
            if int(found.max()) >= self.vocab_size:
                self._refuse(document, found)
            source_end, end = np.array([source_begin, begin]) + self._parts[document]
            tokens[source_begin:source_end] = found[: source_end - source_begin]
            tokens[begin:end] = np.concatenate([self._start, found[documents.prompts[document] :]])
            segments[source_begin:source_end] = segments[begin:end] = segment
            targets[begin + len(self._start) - 1 : end - 1] = True
            source_begin, begin = source_end, end
        return Sample(tokens, segments, targets)


def start_ids(manifest: Manifest) -> list[int]:
    """The ids that a decoder with an encoder starts a target of this dataset with, at least one."""
    return (manifest.pairs.separator_ids if manifest.pairs is not None else []) or [manifest.eos_id]


def best_fit_in_both(sizes: np.ndarray, rooms: tuple[int, int]) -> list[list[int]]:
    """Pack items with two sizes each, [items, 2], into bins with two rooms: each item, the largest first, into the
    fullest bin that has room for both of its sizes.

    Sizes count as shares of their room: an item is as large as its larger share, and a bin is as full as the sum of
    both. Returns the items of each bin, in order of their numbers; bins are in order of their first item. No size is
    larger than its room.
    """
    scale = np.array(rooms[::-1], dtype=np.int64)  # exact shares: both over the product of the rooms
    sizes = sizes.astype(np.int64)
    bins: list[list[int]] = []
    left = np.empty_like(sizes)  # rooms that are left, of each bin
    for item in np.argsort(-(sizes * scale).max(1), kind="stable").tolist():
        after = left[: len(bins)] - sizes[item]
        able = np.flatnonzero((after >= 0).all(1))
        if len(able):
            place = int(able[(after[able] @ scale).argmin()])
            left[place] = after[place]
            bins[place].append(item)
        else:
            left[len(bins)] = rooms - sizes[item]
            bins.append([item])
    return sorted(sorted(each) for each in bins)
