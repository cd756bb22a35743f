"""Keys and values of heads that hold different tokens, for incremental decoding.

Legend: B batch, H heads (of this rank), D head size, P new (token, head) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.model.segments import Past, Segments


class HeadCache:
    """Rotated keys and values of one layer, of each head's own tokens.

    The buffers [B, H, N, D] have room for the longest head, and grow by doubling. At even load a head holds K/H of the
    tokens, and N follows that.

    tokens: Tokens that a sequence will have at most, if known: no head holds more.
    counts: Tokens of each sequence and head, [B, H] int64; None before the first call. longest: The largest of them.
    """

    def __init__(self, tokens: int = 0) -> None:
        self._tokens = tokens
        self.counts: Tensor | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.longest = 0

    @property
    def numbers(self) -> int:
        """Elements of the cached tokens, over the batch. The buffers may have room for more."""
        if self._buffers is None or self.counts is None:
            return 0
        return 2 * self._buffers[0].shape[-1] * int(self.counts.sum())

    @property
    def nbytes(self) -> int:
        return 0 if self._buffers is None else self.numbers * self._buffers[0].element_size()

    def places(self, segments: Segments) -> Tensor:
        """Position of each new pair among the tokens of its head [P]. Segments must be of one document per sequence."""
        if self.counts is None:
            return segments.place
        return self.counts[segments.token // segments.shape[1], segments.head] + segments.place

    def extend(self, k: Tensor, v: Tensor, segments: Segments) -> Past | None:
        """Append packed keys and values [P, D]. Returns what new pairs attend to; None if nothing was cached before."""
        batch, seq_len, _ = segments.shape
        sequence, at, first = segments.token // seq_len, self.places(segments), self.counts is None
        if self.counts is None:
            self.counts = torch.zeros(batch, segments.heads, dtype=torch.int64, device=k.device)
        row = sequence * segments.heads + segments.head
        self.counts = self.counts + torch.bincount(row, minlength=batch * segments.heads).view(batch, -1)
        self.longest = int(self.counts.max())
        buffers = self._with_room(k, v, batch, segments.heads)
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer.view(-1, *buffer.shape[2:])[row, at] = new.detach()
        if first:
            return None
        keys, values = (buffer.flatten(0, 1)[:, : self.longest] for buffer in buffers)
        return Past(keys, values, row, at)

    def repeated(self, count: int, room: int) -> HeadCache:
        """A copy for `count` sequences that continue the one that is cached here, by `room` tokens each."""
        copy = HeadCache(self._tokens)
        if self._buffers is not None and self.counts is not None:
            copy.counts, copy.longest = self.counts.expand(count, -1).clone(), self.longest
            capacity = self.longest + room
            k, v = (t.new_zeros(count, t.shape[1], capacity, t.shape[3]) for t in self._buffers)
            for buffer, before in zip((k, v), self._buffers, strict=True):
                buffer[:, :, : self.longest] = before[:, :, : self.longest]
            copy._buffers = (k, v)
        return copy

    def select(self, rows: Tensor) -> None:
        """Continue with these rows of the batch, [rows] int64, in this order; a row may be named several times."""
        if self._buffers is None or self.counts is None:
            return
        self.counts = self.counts[rows]
        k, v = (t[rows] for t in self._buffers)
        self._buffers = (k, v)

    def _with_room(self, k: Tensor, v: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor]:
        """The buffers, with room for the longest head."""
        old, needed = self._buffers, self.longest
        if old is not None and needed <= old[0].shape[2]:
            return old
        capacity = min(2 * needed, self._tokens) if needed <= self._tokens else 2 * needed
        new = tuple(t.new_zeros(batch, heads, capacity, t.shape[-1]) for t in (k.detach(), v.detach()))
        if old is not None:
            for buffer, before in zip(new, old, strict=True):
                buffer[:, :, : before.shape[2]] = before
        self._buffers = (new[0], new[1])
        return self._buffers
