"""Keys and values of earlier tokens, or a state, for incremental decoding.

Legend: B batch, S tokens, G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headway.model.head_cache import HeadCache


class KVCache:
    """Rotated keys and values of one layer, for incremental decoding.

    The cache has one part for each set of groups with a different window (or with keys of its own), one for heads
    that hold different tokens (`of_heads`), and tensors of a size that does not depend on the tokens (`state`).

    The buffers grow by doubling, so that a token is copied once more on average.

    tokens: Tokens that the cache will hold at most, if known. Up to this number, no larger buffers are allocated.
    """

    def __init__(self, tokens: int = 0) -> None:
        self._tokens = tokens
        self._parts: dict[str, _CachePart] = {}
        self._of_heads: HeadCache | None = None
        self.state = StateCache()

    @property
    def of_heads(self) -> HeadCache:
        """The part of heads that hold different tokens."""
        if self._of_heads is None:
            self._of_heads = HeadCache(self._tokens)
        return self._of_heads

    def extend(self, k: Tensor, v: Tensor, *, part: str, window: int | None) -> tuple[Tensor, Tensor]:
        """Append k, v [B, S, G, D] of the new tokens. Returns those of the cached and the new tokens, in this order.

        They may differ in G and D: latent attention keeps latents and a rotated key.

        With a `window` of w tokens, which includes the query itself, only the last w - 1 tokens stay cached. The
        returned tensors may be views of the cache: they are valid until the next call. Gradients reach the new tokens
        only.
        """
        if part not in self._parts:
            self._parts[part] = _CachePart(self._tokens, None if window is None else window - 1)
        return self._parts[part].extend(k, v)

    def repeated(self, count: int, room: int) -> KVCache:
        """A copy for `count` sequences that continue the one that is cached here, by `room` tokens each."""
        copy = KVCache(self._tokens)
        copy._parts = {name: part.repeated(count, room) for name, part in self._parts.items()}
        copy._of_heads = None if self._of_heads is None else self._of_heads.repeated(count, room)
        copy.state.held = {name: t.expand(count, *t.shape[1:]) for name, t in self.state.held.items()}
        return copy

    def select(self, rows: Tensor) -> None:
        """Continue with these rows of the batch, [rows] int64, in this order; a row may be named several times."""
        for part in self._parts.values():
            part.select(rows)
        if self._of_heads is not None:
            self._of_heads.select(rows)
        self.state.held = {name: t[rows] for name, t in self.state.held.items()}

    @property
    def numbers(self) -> int:
        """Elements of the cached tokens and of the state, over the batch. The buffers may have room for more."""
        return sum(part.numbers for part in self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of these elements. A state is in fp32 or wider, whatever the dtype of the model."""
        return sum(part.nbytes for part in self._kept)

    @property
    def _kept(self) -> list[_CachePart | HeadCache | StateCache]:
        return [*self._parts.values(), *([] if self._of_heads is None else [self._of_heads]), self.state]


class StateCache:
    """What a recurrent layer keeps of all earlier tokens: `held`, tensors [B, ...] by name; empty before the first one.

    Each pass replaces the tensors, and none is written in place.
    """

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    @property
    def numbers(self) -> int:
        return sum(t.numel() for t in self.held.values())

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.held.values())


class SourceCache:
    """Keys and values of one layer's cross attention: those of the encoder's output, which do not change."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def once(self, project: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The keys and values of the first call, which computes them by `project`."""
        if self.held is None:
            self.held = project()
        return self.held

    def select(self, rows: Tensor) -> None:
        """As `KVCache.select`."""
        if self.held is not None:
            self.held = (self.held[0][rows], self.held[1][rows])

    @property
    def numbers(self) -> int:
        """Elements of the cached tokens, over the batch."""
        return 0 if self.held is None else sum(t.numel() for t in self.held)

    @property
    def nbytes(self) -> int:
        return 0 if self.held is None else sum(t.numel() * t.element_size() for t in self.held)


class _CachePart:
    """Keys and values of the last `keep` tokens (None: all) in two buffers, from token `_first` to `_end`."""

    def __init__(self, tokens: int, keep: int | None) -> None:
        self._tokens, self._keep = tokens, keep
        self._first = self._end = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def numbers(self) -> int:
        return sum(buffer[:, self._first : self._end].numel() for buffer in self._buffers or ())

    @property
    def nbytes(self) -> int:
        return 0 if self._buffers is None else self.numbers * self._buffers[0].element_size()

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        buffers = self._with_room(k.detach(), v.detach())
        begin, self._end = self._end, self._end + k.shape[1]
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[:, begin : self._end] = new.detach()
        first = self._first
        if self._keep is not None:
            self._first = max(first, self._end - self._keep)
        if k.requires_grad or v.requires_grad:  # autograd must not keep buffers that are written again
            past = (buffers[0][:, first:begin], buffers[1][:, first:begin])
            return torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        return buffers[0][:, first : self._end], buffers[1][:, first : self._end]

    def repeated(self, count: int, room: int) -> _CachePart:
        copy = _CachePart(self._tokens, self._keep)
        if self._buffers is not None:
            kept = self._end - self._first
            k, v = (t.new_empty(count, kept + room, *t.shape[2:]) for t in self._buffers)
            for buffer, before in zip((k, v), self._buffers, strict=True):
                buffer[:, :kept] = before[:, self._first : self._end]
            copy._buffers, copy._end = (k, v), kept
        return copy

    def select(self, rows: Tensor) -> None:
        if self._buffers is None:
            return
        old, self._buffers = self._buffers, None
        k, v = (t.new_empty(len(rows), *t.shape[1:]) for t in old)
        for buffer, before in zip((k, v), old, strict=True):
            buffer[:, self._first : self._end] = before[rows, self._first : self._end]
        self._buffers = (k, v)

    def _with_room(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers, with room for the new tokens after `_end`. Old tokens move to the front of new buffers."""
        old, kept = self._buffers, self._end - self._first
        if old is not None and self._end + k.shape[1] <= old[0].shape[1]:
            return old
        room = kept + k.shape[1]
        if self._keep is None:
            capacity = min(2 * room, self._tokens) if room <= self._tokens else 2 * room
        else:  # move the window once in `_keep` tokens
            capacity = room + self._keep
        new = tuple(t.new_empty(t.shape[0], capacity, *t.shape[2:]) for t in (k, v))
        if old is not None:
            for buffer, before in zip(new, old, strict=True):
                buffer[:, :kept] = before[:, self._first : self._end]
        self._buffers, self._first, self._end = (new[0], new[1]), 0, kept
        return self._buffers
