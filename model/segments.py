"""Attention of heads that see different tokens: (token, head) pairs, packed into one segment per head and document.

A token is routed to k of H heads. The tokens of one head in one document are a segment: they attend to each other,
causally, and to nothing else. The pairs are packed in the order head, sequence, token, so that segments follow each
other like documents of unequal length.

On a GPU, the packed segments are documents of one long sequence, which is ordinary attention of variable length
(`headway.kernels.varlen`). On the CPU, segments of similar length share a causal call, padded at their ends
(`packed_core`): a padding key comes after all queries that count, so no mask is needed.

Legend: B batch, S sequence, T = B S tokens, H heads (of this rank), k heads of a token, P pairs (T k where all heads
are on this rank), D head size, R rotated channels, L tokens of the longest segment of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.documents import Documents

SPREAD = 1.25
"""Longest over shortest segment of a call. Calls of the CPU compute at most the square of it in vain."""

SCORES = 1 << 24
"""Most scores of a call with a mask (decoding in chunks)."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the P pairs come from, in packed order. Tensors are [P] int64.

    head: Head of each pair, counted from the first one of this rank.
    token: Its token, as an index into the T tokens.
    slot: Its slot, as an index into the k selections of the token.
    place: Its position within the segment, from 0.
    lengths: Pairs of each segment. No segment is empty.
    per_head: Pairs of each head, 0 for a head without tokens.
    shape: (B, S, k).
    """

    head: Tensor
    token: Tensor
    slot: Tensor
    place: Tensor
    lengths: tuple[int, ...]
    per_head: tuple[int, ...]
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, idx: Tensor, *, heads: int, first: int = 0, numbers: Tensor | None = None) -> Segments:
        """idx [B, S, k] int64: heads of each token, all different. Pairs of `heads` heads from `first` on are packed.

        numbers [B, S] int64: number of each token's document, ascending; None for one document per sequence.
        Reads the lengths on the host, which waits for a GPU.
        """
        batch, seq_len, k = idx.shape
        local = idx - first
        own = (local >= 0) & (local < heads)
        column = local.where(own, heads)  # the pairs of other ranks go to a column that is dropped
        slot_of = idx.new_full((batch, seq_len, heads + 1), -1)
        slot_of.scatter_(2, column, torch.arange(k, device=idx.device).expand_as(idx))
        slot_of = slot_of[..., :heads].permute(2, 0, 1).flatten()  # [H B S]
        pair = (slot_of >= 0).nonzero().squeeze(1)
        row = pair // seq_len  # head and sequence
        key = row
        if numbers is not None:
            key = row * (seq_len + 1) + numbers.flatten()[pair % (batch * seq_len)]
        counts = torch.unique_consecutive(key, return_counts=True)[1]
        head = row // max(batch, 1)
        sizes = torch.cat([counts, torch.bincount(head, minlength=heads)]).tolist()
        lengths, per_head = tuple(sizes[: len(counts)]), tuple(sizes[len(counts) :])
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=len(pair))
        place = torch.arange(len(pair), device=idx.device) - starts
        shape = (batch, seq_len, k)
        return cls(head, pair % (batch * seq_len), slot_of[pair], place, lengths, per_head, shape)

    @property
    def heads(self) -> int:
        """H, heads of this rank."""
        return len(self.per_head)

    @property
    def scores(self) -> int:
        """Pairs of a query and a key that it attends to, over all segments: what the attention core needs."""
        return sum(length * (length + 1) // 2 for length in self.lengths)

    def in_pool(self) -> Tensor:
        """Index of each pair among all T H pairs of a token and a head of this rank [P]."""
        return self.token * self.heads + self.head

    def in_slots(self) -> Tensor:
        """Index of each pair among the T k slots [P]."""
        return self.token * self.shape[2] + self.slot

    def select(self, pool: Tensor) -> Tensor:
        """pool [B, S, H, *] -> packed pairs [P, *]."""
        return pool.flatten(0, 2).index_select(0, self.in_pool())

    def expand(self, packed: Tensor) -> Tensor:
        """packed pairs [P, D] -> pool [B, S, H, D], 0 where a token is not routed to a head."""
        batch, seq_len, _ = self.shape
        pool = packed.new_zeros(batch * seq_len * self.heads, packed.shape[-1])
        return pool.index_copy(0, self.in_pool(), packed).view(batch, seq_len, self.heads, -1)

    def documents(self) -> Documents:
        """The segments as documents of one sequence of P tokens."""
        return Documents((self.lengths,))


def segments_core(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, past: Past | None, *, attend: Callable[..., Tensor]
) -> Tensor:
    """Causal attention within segments, scale 1/sqrt(D): packed q, k, v [P, D] -> [P, D].

    past: In incremental decoding, the cached keys and values. attend: `headway.kernels.attention.core` or an equal.
    """
    if not segments.lengths:  # no token chose a head of this tensor-parallel rank: gradients are 0, not missing
        return q + k + v
    if past is not None:
        return cached_core(q, k, v, past, segments.lengths)
    if q.device.type == "cpu":
        return packed_core(q, k, v, segments.lengths)
    q, k, v = (t[None, :, None] for t in (q, k, v))
    return attend(q, k, v, segments.documents())[0, :, 0]


# ---------------------------------------------------------------- rotation


def rotate_rows(x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """`headway.kernels.rope.apply_rope` with a position of its own for each vector: x [P, D] -> [P, D].

    rope: tables [N, R]; rows [P] int64: the row of each vector. Angles are gathered again in the backward pass, so that
    no table of [P, R] is kept.
    """
    return x if rope[0].shape[-1] == 0 else _RotateRows.apply(x, *rope, rows)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    size = cos.shape[-1]
    head = x[:, :size]
    other = torch.roll(head * sin, size // 2, -1) if back else torch.roll(head, size // 2, -1) * sin
    turned = (head * cos + other).to(x.dtype)
    return turned if size == x.shape[1] else torch.cat([turned, x[:, size:]], 1)


class _RotateRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin, rows)
        return _turned(x, cos[rows], sin[rows], back=False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin, rows = ctx.saved_tensors
        return _turned(grad_outputs[0], cos[rows], sin[rows], back=True), None, None, None


# ---------------------------------------------------------------- the core on the CPU


class _Call(NamedTuple):
    """Segments of one causal call. pair [N, L]: the pair at each place, the last one again beyond a segment's end;
    real [N, L] bool: places within segments; None if all are.
    """

    pair: Tensor
    real: Tensor | None

    def padded(self, packed: Tensor) -> Tensor:
        """[P, *] -> [N, 1, L, *]."""
        return packed[self.pair].unsqueeze(1)

    def put(self, into: Tensor, padded: Tensor) -> None:
        """Write the real places of [N, 1, L, *] into [P, *]."""
        found = padded.squeeze(1)
        if self.real is None:
            into[self.pair.flatten()] = found.flatten(0, 1)
        else:
            into[self.pair[self.real]] = found[self.real]


def _call(segments: list[tuple[int, int]], device: torch.device) -> _Call:
    """segments: (first pair, length) of each."""
    starts, lengths = torch.tensor(segments, device=device).unsqueeze(2).unbind(1)  # [N, 1] each
    place = torch.arange(int(lengths.max()), device=device)
    pair = starts + place.minimum(lengths - 1)
    real = None if bool((lengths == lengths[0]).all()) else place < lengths
    return _Call(pair, real)


def _calls(lengths: tuple[int, ...], device: torch.device) -> Iterator[_Call]:
    """Causal calls that cover all segments."""
    group: list[tuple[int, int]] = []
    for start, length in sorted(zip(accumulate((0, *lengths)), lengths, strict=False), key=lambda each: each[1]):
        if group and length > SPREAD * group[0][1]:
            yield _call(group, device)
            group = []
        group.append((start, length))
    if group:
        yield _call(group, device)


def packed_core(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Causal attention within segments on the CPU, scale 1/sqrt(D): packed q, k, v [P, D] -> [P, D].

    Keeps its inputs, its output and one number per pair for the backward pass. Padding is made again there.
    """
    return _PackedCore.apply(q, k, v, lengths)


class _PackedCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        out, sums = torch.empty_like(q), q.new_empty(len(q), dtype=torch.promote_types(q.dtype, torch.float32))
        for call in _calls(lengths, q.device):
            found, found_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(call.padded(t) for t in (q, k, v)), 0.0, True
            )
            call.put(out, found)
            call.put(sums, found_sums)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, sums = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        for call in _calls(ctx.lengths, q.device):
            grad = call.padded(grad_outputs[0])
            if call.real is not None:
                grad = grad * call.real[:, None, :, None]
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, *(call.padded(t) for t in (q, k, v, out, sums)), 0.0, True
            )
            for whole, part in zip(grads, parts, strict=True):
                call.put(whole, part)
        return grads[0], grads[1], grads[2], None


# ---------------------------------------------------------------- decoding


class Past(NamedTuple):
    """Cached keys and values of the heads, and of which the new pairs are the last ones.

    keys, values: [rows, N, D], a row per head and sequence. row [P]: the row of each new pair. at [P]: its position
    among the keys of the row.
    """

    keys: Tensor
    values: Tensor
    row: Tensor
    at: Tensor


def cached_core(q: Tensor, k: Tensor, v: Tensor, past: Past, lengths: tuple[int, ...]) -> Tensor:
    """Attention of new pairs to the keys of their head up to their own: packed q, k, v [P, D] -> [P, D].

    Reads the rows of heads that a new token is routed to, and no others. Gradients reach the new pairs alone.
    """
    starts = list(accumulate((0, *lengths)))
    segments = list(zip(starts, lengths, strict=False))
    per_call = max(1, SCORES // (max(lengths) * past.keys.shape[1]))
    outs = []
    for first in range(0, len(segments), per_call):
        some = segments[first : first + per_call]
        begin, end = some[0][0], sum(some[-1])
        call = _call([(start - begin, length) for start, length in some], q.device)
        row, at = past.row[begin:end], past.at[begin:end]
        heads = row[call.pair[:, 0]]
        keys, values = past.keys[heads], past.values[heads]  # [N, *, D]
        if k.requires_grad or v.requires_grad:
            own = torch.arange(len(some), device=q.device).repeat_interleave(
                torch.tensor([length for _, length in some], device=q.device)
            )
            keys, values = (t.index_put((own, at), new[begin:end]) for t, new in ((keys, k), (values, v)))
        seen = torch.arange(keys.shape[1], device=q.device) <= at[call.pair].unsqueeze(-1)  # [N, L, *]
        found = F.scaled_dot_product_attention(
            call.padded(q[begin:end]), keys.unsqueeze(1), values.unsqueeze(1), attn_mask=seen.unsqueeze(1)
        ).squeeze(1)
        outs.append(found.flatten(0, 1) if call.real is None else found[call.real])
    return torch.cat(outs)
