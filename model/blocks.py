"""Attention to chosen blocks of keys: each query attends to its own block, causally, and to blocks that were chosen.

Blocks have a fixed number of tokens and are counted from the start of each document, so that none has tokens of two.
The last block of a document may be shorter. Those that are complete before a query's own block are its candidates.

The core computes no scores of blocks that were not chosen. The queries that chose a block are gathered and multiplied
with its keys in one product; blocks that a similar number of queries chose share a call, padded at the end. The parts
of a query's softmax are joined by their log-sum-exp. All of this is plain products of PyTorch, on any device.

Legend: B batch, S queries, K keys (K > S: the queries are the last S positions), H query heads, G KV heads, D head
size, C choosers of blocks (G, or H: each query head chooses for itself), M = H/C query heads per chooser, N complete
blocks, n chosen blocks of a query, P tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.documents import Documents
from headway.kernels.twins import top_k_twin

SPREAD = 1.25
"""Most over fewest queries of the blocks of a call: at most this share of its scores is computed, less 1 in vain."""

SCORES = 1 << 20
"""Most scores of a call, and of a product with the means of blocks, unless a single row has more."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Where the blocks of B sequences lie.

    size: P.
    start: First position of the queries, which are the positions start .. K - 1.
    first: [B, K] int64, for each position that of the first token of its block.
    document: [B, K] int64, that of the first token of its document.
    starts: [B, N] int64, first positions of the complete blocks, ascending; K where a sequence has fewer than N.
    own: (sequence, first key, first query, number of queries) of each block that has queries.
    """

    size: int
    start: int
    first: Tensor
    document: Tensor
    starts: Tensor
    own: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, documents: Documents, size: int, device: torch.device) -> Blocks:
        return _blocks(documents.lengths, documents.start, size, device)

    @property
    def count(self) -> int:
        """N."""
        return self.starts.shape[1]

    def candidates(self, begin: int, end: int) -> Tensor:
        """Whether a block is complete before the own block of queries begin .. end - 1: bool [B, end - begin, N]."""
        rows = slice(self.start + begin, self.start + end)
        first, document = self.first[:, rows, None], self.document[:, rows, None]
        return (self.starts[:, None] >= document) & (self.starts[:, None] < first)

    def means(self, k: Tensor) -> Tensor:
        """Mean keys of the complete blocks, in the dtype of k [B, K, G, D] -> [B, N, G, D]; without gradient."""
        place = self.starts[..., None] + torch.arange(self.size, device=k.device)
        sequence = torch.arange(len(k), device=k.device)[:, None, None]
        return mean_keys(k.detach()[sequence, place.clamp_max(k.shape[1] - 1)])

    def seen(self, chosen: Tensor) -> Tensor:
        """The keys that each query attends to, bool [B, C, S, K], from `chosen` [B, S, C, n]. For observation."""
        keys = torch.arange(self.first.shape[1], device=chosen.device)
        queries = slice(self.start, None)
        own = (keys <= keys[queries, None]) & (keys >= self.first[:, queries, None])  # [B, S, K]
        number = torch.searchsorted(self.starts, self.first)  # of the complete block that begins where the key's does
        complete = self.starts.gather(1, number.clamp_max(max(self.count - 1, 0))) == self.first if self.count else None
        found = own.unsqueeze(1).expand(-1, chosen.shape[2], -1, -1)
        if complete is None:
            return found
        number = (number + 1).where(complete, 0)[:, None, None]  # 0: no complete block
        picked = chosen.new_zeros(*chosen.shape[:3], self.count + 1).scatter(3, chosen, 1)
        picked[..., 0] = 0
        picked = picked.transpose(1, 2)  # [B, C, S, N + 1]
        return found | picked.gather(3, number.expand(*picked.shape[:3], -1)).bool()


def mean_keys(blocks: Tensor) -> Tensor:
    """Keys of blocks [B, N, P, G, D] -> their means [B, N, G, D], summed in fp32 or wider."""
    return blocks.to(_wide(blocks)).mean(2).to(blocks.dtype)


@lru_cache(maxsize=8)
def _blocks(lengths: tuple[tuple[int, ...], ...], start: int, size: int, device: torch.device) -> Blocks:
    """Those of the last few micro-batches, which all layers and both passes share. lengths: of each document."""
    first, document, complete, own = [], [], [], []
    for sequence, row in enumerate(lengths):
        firsts, begins, starts = list[int](), list[int](), list[int]()
        for length in row:
            begin = len(firsts)
            begins += [begin] * length
            for at in range(begin, begin + length, size):
                end = min(at + size, begin + length)
                firsts += [at] * (end - at)
                if end - at == size:
                    starts.append(at)
                if end > start:
                    own.append((sequence, at, max(at, start), end - max(at, start)))
        first.append(firsts)
        document.append(begins)
        complete.append(starts)
    most, keys = max(map(len, complete)), len(first[0])
    complete = [starts + [keys] * (most - len(starts)) for starts in complete]
    with torch.inference_mode(False):  # kept between passes
        of = partial(torch.tensor, dtype=torch.int64, device=device)
        return Blocks(size, start, of(first), of(document), of(complete), tuple(own))


# ---------------------------------------------------------------- the choice


@torch.no_grad()
def choose_blocks(q: Tensor, means: Tensor, blocks: Blocks, *, count: int, choosers: int) -> Tensor:
    """The `count` candidates with the largest product of their mean key and the query of each chooser.

    q [B, S, H, D], means [B, N, G, D] -> [B, S, C, count] int64: 1 + number of a block, largest product first; 0 where
    a query has fewer candidates. The query of a chooser is the mean of its heads. Products are fp32 or wider; ties go
    to the earlier block.
    """
    batch, queries = q.shape[:2]
    if blocks.count == 0:
        return torch.zeros(batch, queries, choosers, count, dtype=torch.int64, device=q.device)
    wide = _wide(q)
    query = q.unflatten(2, (choosers, -1)).to(wide).mean(3).transpose(1, 2)  # [B, C, S, D]
    keys = means.to(wide).repeat_interleave(choosers // means.shape[2], 2).permute(0, 2, 3, 1)  # [B, C, D, N]
    rows = max(1, SCORES // (batch * choosers * blocks.count))
    found = []
    for begin in range(0, queries, rows):
        end = min(begin + rows, queries)
        legal = blocks.candidates(begin, end).unsqueeze(1).expand(-1, choosers, -1, -1)  # [B, C, rows, N]
        with torch.autocast(q.device.type, enabled=False):  # which would round the products to bf16
            scores = (query[:, :, begin:end] @ keys).masked_fill(~legal, float("-inf"))
        idx = top_k_twin(scores, min(count, blocks.count))
        found.append((idx + 1).where(legal.gather(3, idx), 0))
    chosen = torch.cat(found, 2).transpose(1, 2)
    return F.pad(chosen, (0, count - chosen.shape[3]))


# ---------------------------------------------------------------- the core


def blocks_core(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, blocks: Blocks) -> Tensor:
    """Attention of q [B, S, H, D] to their own blocks and the chosen ones, scale 1/sqrt(D) -> [B, S, H, D].

    k, v [B, K, G, D]. chosen [B, S, C, n] int64 as `choose_blocks` returns it: 1 + number of a block, or 0; no block
    twice. Query head h belongs to chooser h // (H/C). Keeps its inputs, its output and one number per row for the
    backward pass; with C > G also a copy of keys and values for each chooser. Beside a call's scores, a pass takes
    memory for its result and that of the gradients in fp32.
    """
    choosers = chosen.shape[2]
    if choosers != k.shape[2]:
        k, v = (t.repeat_interleave(choosers // k.shape[2], 2) for t in (k, v))
    return _Core.apply(q, k, v, chosen, blocks)


class _Call(NamedTuple):
    """A product of queries with the keys of blocks, one block and chooser per entry.

    rows [A, L]: index of each query and chooser in [B S C], no two alike but for padding. keys [A, P]: index in
    [B K C], likewise. real [A, L], real_keys [A, P]: bool, what is no padding; None if all is. hidden: bool [A, L, P],
    keys after the query, in the query's own block; None for chosen blocks.
    """

    rows: Tensor
    keys: Tensor
    real: Tensor | None
    real_keys: Tensor | None
    hidden: Tensor | None

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q [B S C, M, D], k [B K C, D] -> [A, L M, P], fp32 or wider."""
        products = q[self.rows].flatten(1, 2) @ k[self.keys].transpose(1, 2)
        scores = products.to(_wide(q)).mul_(q.shape[-1] ** -0.5)
        if self.hidden is not None:
            by_row = scores.unflatten(1, self.rows.shape[1:] + q.shape[1:2])  # [A, L, M, P]
            by_row.masked_fill_(self.hidden.unsqueeze(2), float("-inf"))
        return scores


def _calls(blocks: Blocks, chosen: Tensor, members: int) -> Iterator[_Call]:
    """The calls of a pass: first of own blocks, which all queries have, then of chosen ones.

    Within a call, and within a slot of the choice, no query and no key occurs twice.
    """
    yield from _own_calls(blocks, chosen.shape[2], members, chosen.device)
    for slot in chosen.unbind(3):
        yield from _chosen_calls(blocks, slot, members)


def _own_calls(blocks: Blocks, choosers: int, members: int, device: torch.device) -> Iterator[_Call]:
    past, total = blocks.start, blocks.first.shape[1]
    lengths = [query - key + count for _, key, query, count in blocks.own]
    head = torch.arange(choosers, device=device)[:, None]
    for group in _alike(lengths, choosers * members * blocks.size):
        some = [blocks.own[i] for i in group]
        longest, most = lengths[group[-1]], max(count for *_, count in some)
        sequence, key, query, count = torch.tensor(some, device=device).unsqueeze(2).unbind(1)  # [A, 1] each
        length = query - key + count
        place, key_place = torch.arange(most, device=device), torch.arange(longest, device=device)
        own_place = query - key + place.minimum(count - 1)  # of each query in its block
        rows = sequence * (total - past) + key - past + own_place
        keys = sequence * total + key + key_place.minimum(length - 1)
        hidden = key_place > own_place.unsqueeze(2)
        real = None if all(n == most for *_, n in some) else place < count
        real_keys = None if lengths[group[0]] == longest else key_place < length
        yield _Call(
            (rows.unsqueeze(1) * choosers + head).flatten(0, 1),
            (keys.unsqueeze(1) * choosers + head).flatten(0, 1),
            *(None if t is None else t.repeat_interleave(choosers, 0) for t in (real, real_keys, hidden)),
        )


def _chosen_calls(blocks: Blocks, slot: Tensor, members: int) -> Iterator[_Call]:
    """Those of one slot [B, S, C] of the choice."""
    (_, queries, choosers), total, device = slot.shape, blocks.first.shape[1], slot.device
    number = slot.flatten()
    row = number.nonzero().squeeze(1)
    if len(row) == 0:
        return
    kind = (row // (queries * choosers) * choosers + row % choosers) * blocks.count + number[row] - 1
    kind, order = kind.sort(stable=True)
    row = row[order]
    kinds, counts = kind.unique_consecutive(return_counts=True)
    sizes = counts.tolist()
    # A block with more queries is several pieces. Two of them do not fit into one call, so its keys occur there once.
    most = max(1, SCORES // (members * blocks.size))
    pieces = [
        (one, begin + done, min(most, size - done))
        for one, begin, size in zip(kinds.tolist(), accumulate([0, *sizes]), sizes, strict=False)
        for done in range(0, size, most)
    ]
    offsets = torch.arange(blocks.size, device=device)
    for group in _alike([count for *_, count in pieces], members * blocks.size):
        some = [pieces[i] for i in group]
        one, begin, count = torch.tensor(some, device=device).unsqueeze(2).unbind(1)  # [A, 1] each
        place = torch.arange(some[-1][2], device=device)
        real = None if some[0][2] == some[-1][2] else place < count
        sequence, head, block = one // (choosers * blocks.count), one // blocks.count % choosers, one % blocks.count
        keys = sequence * total + blocks.starts[sequence, block] + offsets
        yield _Call(row[begin + place.minimum(count - 1)], keys * choosers + head, real, None, None)


def _alike(sizes: Sequence[int], unit: int) -> Iterator[list[int]]:
    """Indices of all `sizes`, smallest first, in groups of similar sizes with at most SCORES scores, `unit` per row."""
    group: list[int] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if group and (sizes[i] > SPREAD * sizes[group[0]] or (len(group) + 1) * sizes[i] * unit > SCORES):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


class _Core(torch.autograd.Function):
    """Inside, rows are [B S C, M, D] of queries, and [B K C, D] of keys and values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, blocks: Blocks) -> Tensor:
        queries, keys, values = _rows(q, chosen), k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1])
        out = queries.new_empty(queries.shape, dtype=_wide(q))
        sums = out.new_empty(out.shape[:2])  # log-sum-exp of the scores, so far
        for call in _calls(blocks, chosen, queries.shape[1]):
            scores = call.scores(queries, keys)
            total = scores.logsumexp(-1, keepdim=True)
            weights = scores.sub_(total).exp_().to(v.dtype)
            found = (weights @ values[call.keys]).to(out.dtype).unflatten(1, (-1, queries.shape[1]))
            total = total.squeeze(2).unflatten(1, (-1, queries.shape[1]))
            rows, found, total = (t if call.real is None else t[call.real] for t in (call.rows, found, total))
            if call.hidden is None:
                before = sums[rows]
                joined = torch.logaddexp(before, total)
                found = found * (total - joined).exp().unsqueeze(-1)
                found += out[rows] * (before - joined).exp().unsqueeze(-1)
                total = joined
            out[rows], sums[rows] = found, total
        result = out.to(q.dtype).view(q.shape)
        small = torch.int16 if blocks.count <= torch.iinfo(torch.int16).max else torch.int32
        ctx.save_for_backward(q, k, v, result, sums, chosen.to(small))
        ctx.blocks = blocks
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (as the decorator is typed)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, result, sums, small = ctx.saved_tensors
        chosen, size, scale = small.long(), q.shape[-1], q.shape[-1] ** -0.5
        queries, step, out = (_rows(t, chosen) for t in (q, grads[0], result))
        keys, values = k.reshape(-1, size), v.reshape(-1, size)
        means = (step.to(sums.dtype) * out.to(sums.dtype)).sum(-1)  # [B S C, M]
        d_q, d_k, d_v = (torch.zeros_like(t, dtype=sums.dtype) for t in (queries, keys, values))
        for call in _calls(ctx.blocks, chosen, queries.shape[1]):
            weights = call.scores(queries, keys).sub_(sums[call.rows].flatten(1, 2).unsqueeze(2)).exp_()
            if call.real is not None:
                weights.unflatten(1, (-1, queries.shape[1])).mul_(call.real[:, :, None, None])
            d_rows = step[call.rows].flatten(1, 2)
            _add(d_v, call.keys, call.real_keys, weights.to(v.dtype).transpose(1, 2) @ d_rows)
            d_weights = (d_rows @ values[call.keys].transpose(1, 2)).to(sums.dtype)
            d_scores = weights * (d_weights - means[call.rows].flatten(1, 2).unsqueeze(2))
            d_scores = d_scores.mul_(scale).to(q.dtype)
            _add(d_k, call.keys, call.real_keys, d_scores.transpose(1, 2) @ queries[call.rows].flatten(1, 2))
            _add(d_q, call.rows, call.real, (d_scores @ keys[call.keys]).unflatten(1, (-1, queries.shape[1])))
        return d_q.to(q.dtype).view(q.shape), d_k.to(k.dtype).view(k.shape), d_v.to(v.dtype).view(v.shape), None, None


def _rows(heads: Tensor, chosen: Tensor) -> Tensor:
    """heads [B, S, H, D] -> [B S C, M, D]."""
    return heads.reshape(-1, heads.shape[2] // chosen.shape[2], heads.shape[3])


def _add(into: Tensor, index: Tensor, real: Tensor | None, part: Tensor) -> None:
    """Add `part` to the entries `index` of `into`, which are all different where they are `real`."""
    if real is not None:
        index, part = index[real], part[real]
    into[index] += part


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
