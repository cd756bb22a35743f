"""Boundaries of the documents in packed sequences, and the calls of the attention core that they ask for.

Attention within documents needs no [S, S] mask. The queries of all sequences are laid end to end, and so are the keys,
so that the documents of all sequences follow one another. A kernel for sequences of variable length takes the
cumulative lengths. Elsewhere the queries are cut into pieces: a long document is a causal call of its own, and short
neighbours share a call with a small mask.

Legend: B sequences, S tokens per sequence, n queries and m keys of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 512
"""Most query rows per masked call. Also the longest sequence for which one mask of [S, S] is built."""

MERGED = 128
"""Most keys of documents that share a call.

A call costs about 0.1 ms of CPU time besides its scores, and the scores of 128 keys 0.5 ms (one core, 8 heads, D=16,
forward and backward). Two documents of 128 tokens: 1.3 ms in two calls, 2.4 ms in one.
"""

_HIDDEN = float("-inf")


class Span(NamedTuple):
    """Queries and keys of one document. The queries are the last positions of the keys."""

    queries: int
    keys: int


class Piece(NamedTuple):
    """One call of the attention core: consecutive queries, and keys first .. last - 1 of those laid end to end.

    spans: The documents. A single span may lack keys at its start that are outside of the window of all its queries.
    masked: Whether the call needs a mask; otherwise it is causal, with as many keys as queries.
    """

    spans: tuple[Span, ...]
    first: int
    last: int
    masked: bool

    @property
    def queries(self) -> int:
        return sum(span.queries for span in self.spans)


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of B packed sequences. A token attends to itself and to the earlier tokens of its own document.

    lengths: For each sequence, the tokens of its documents. Their sum K is equal for all sequences.
    start: First position of the queries, which are the positions start .. K - 1. The keys are all K positions.

    All layers of a pass share one object, which keeps the masks and tensors that it has built.
    """

    lengths: tuple[tuple[int, ...], ...]
    start: int = 0
    _built: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, segments: Tensor) -> Documents:
        """segments [B, S]: number of the document of each token. Reads them on the host, once.

        Raises ValueError if the numbers of a sequence decrease: a document is a run of consecutive tokens.
        """
        steps = segments.cpu().diff(dim=1)
        if (steps < 0).any():
            row, place = (steps < 0).nonzero()[0].tolist()
            raise ValueError(
                f"segments: sequence {row} has document {int(segments[row, place + 1])} after "
                f"{int(segments[row, place])} (token {place + 1}); number the documents in the order of their tokens"
            )
        lengths = []
        for row in steps:
            ends = [*(row.nonzero().flatten() + 1).tolist(), segments.shape[1]]
            lengths.append(tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False)))
        return cls(tuple(lengths))

    @property
    def keys(self) -> int:
        """K, the positions of the keys of each sequence."""
        return sum(self.lengths[0])

    @property
    def queries(self) -> int:
        """Queries of each sequence."""
        return self.keys - self.start

    def part(self, first: int, last: int) -> Documents:
        """The documents as queries first .. last - 1 see them, which need the keys up to last - 1 only."""
        return self._once(
            ("part", first, last), lambda: Documents(tuple(_cut(row, last) for row in self.lengths), first)
        )

    @property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """For each sequence, the documents that contain queries."""
        return self._once("spans", lambda: tuple(tuple(_spans(row, self.start)) for row in self.lengths))

    @property
    def whole(self) -> bool:
        """Whether every sequence is one document, all of whose tokens are queries."""
        return self.start == 0 and all(len(row) == 1 for row in self.lengths)

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive mask [B, 1, queries, K]: 0 where a query attends to a key, -inf elsewhere. For short sequences."""
        assert self.keys <= BLOCK, "a mask that grows with the square of the sequence"
        return self._once(("mask", dtype, device), lambda: self._whole_mask(dtype, device))

    def numbers(self, device: torch.device) -> Tensor:
        """Number of the document of each of the K positions, [B, K] int64."""

        def build() -> Tensor:
            rows = [[i for i, length in enumerate(row) for _ in range(length)] for row in self.lengths]
            return torch.tensor(rows, device=device)

        return self._once(("numbers", device), build)

    def _whole_mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        of_key = self.numbers(device)
        visible = (of_key[:, :, None] == of_key[:, None, :]).tril_()[:, self.start :]
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~visible, _HIDDEN).unsqueeze(1)

    def laid_out(self, keys: Tensor) -> Tensor:
        """keys [B, K, G, D] end to end, without the documents that end before the first query -> [*, G, D]."""
        if self.start == 0:
            return keys.flatten(0, 1)
        return torch.cat(
            [row[-sum(span.keys for span in spans) :] for row, spans in zip(keys, self.spans, strict=True)]
        )

    def cumulative(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where each document begins among queries and among keys (as `laid_out`), and their ends: int32 [N+1] each."""

        def build() -> tuple[Tensor, Tensor]:
            spans = [span for row in self.spans for span in row]
            queries, keys = ([0, *accumulate(each)] for each in zip(*spans, strict=True))
            return (
                torch.tensor(queries, dtype=torch.int32, device=device),
                torch.tensor(keys, dtype=torch.int32, device=device),
            )

        return self._once(("cumulative", device), build)

    @property
    def longest(self) -> Span:
        """Most queries and most keys of a document."""
        spans = [span for row in self.spans for span in row]
        return Span(max(span.queries for span in spans), max(span.keys for span in spans))

    def pieces(self, window: int | None) -> tuple[Piece, ...]:
        """Calls of the attention core, in the order of the queries. `window`: keys that a query attends to."""
        return self._once(("pieces", window), lambda: tuple(_pieces([s for row in self.spans for s in row], window)))

    def piece_mask(self, piece: Piece, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive mask [n, m] of a masked piece."""
        if len(piece.spans) == 1:
            return self._corner(piece.spans[0], window, dtype, device)

        def build() -> Tensor:
            mask = torch.full((piece.queries, piece.last - piece.first), _HIDDEN, dtype=dtype, device=device)
            row = column = 0
            for span in piece.spans:
                mask[row : row + span.queries, column : column + span.keys] = self._corner(span, window, dtype, device)
                row, column = row + span.queries, column + span.keys
            return mask

        return self._once(("piece", piece, window, dtype, device), build)

    def _corner(self, span: Span, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Mask [n, m] of one document: the corner of one matrix, at the last query and the last key."""

        def build() -> Tensor:
            spans = [span for piece in self.pieces(window) if piece.masked for span in piece.spans]
            n, m = (max(each) for each in zip(*spans, strict=True))
            return band_mask(n, m, window, dtype, device)

        band = self._once(("band", window, dtype, device), build)
        return band[band.shape[0] - span.queries :, band.shape[1] - span.keys :]

    def _once(self, key: Any, build: Any) -> Any:
        if key not in self._built:
            self._built[key] = build()
        return self._built[key]


def band_mask(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [queries, keys] for the last of the key positions: causal, and at most `window` keys per query."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    far = distance < 0
    if window is not None:
        far |= distance >= window
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(far, _HIDDEN)


def rows_per_call(queries: int, window: int | None) -> int:
    """Query rows of each masked call over one document."""
    rows = BLOCK if window is None else max(32, min(BLOCK, window))
    return queries if queries < 2 * rows else rows


def _cut(lengths: tuple[int, ...], last: int) -> tuple[int, ...]:
    """Documents of positions 0 .. last - 1."""
    kept = []
    for length in lengths:
        if last <= 0:
            break
        kept.append(min(length, last))
        last -= length
    return tuple(kept)


def _spans(lengths: tuple[int, ...], start: int) -> Iterator[Span]:
    begin = 0
    for length in lengths:
        end = begin + length
        if end > start:
            yield Span(end - max(begin, start), length)
        begin = end


def _pieces(spans: list[Span], window: int | None) -> Iterator[Piece]:
    key = 0
    for group in _groups(spans):
        keys = sum(span.keys for span in group)
        (queries, _), narrow = group[0], window is not None and window < keys
        if len(group) == 1 and queries == keys and not narrow:
            yield Piece(group, key, key + keys, masked=False)
        elif len(group) == 1:
            yield from _rows(group[0], key, window if narrow else None)
        else:
            yield Piece(group, key, key + keys, masked=True)
        key += keys


def _groups(spans: list[Span]) -> Iterator[tuple[Span, ...]]:
    """Neighbours with at most MERGED keys together; longer documents alone."""
    group: list[Span] = []
    for span in spans:
        if group and sum(each.keys for each in group) + span.keys > MERGED:
            yield tuple(group)
            group = []
        group.append(span)
    yield tuple(group)


def _rows(span: Span, key: int, window: int | None) -> Iterator[Piece]:
    """Blocks of query rows over the keys that they see, the document's first one being key number `key`."""
    rows = rows_per_call(span.queries, window)
    for begin in range(0, span.queries, rows):
        end = min(begin + rows, span.queries)
        last = span.keys - span.queries + end
        first = 0 if window is None else max(0, last - (end - begin) - window + 1)
        yield Piece((Span(end - begin, last - first),), key + first, key + last, masked=True)
