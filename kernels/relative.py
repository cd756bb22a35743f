"""Attention with relative positions of Transformer-XL (Dai et al., 2019, arXiv 1901.02860), without recurrence.

Legend: B batch, S queries, K keys, H query heads, G KV heads, M = H/G, D head size, d width, n rows of a block. The
score of query head h of group g at position t for the key at position s <= t is

    ((q_h(t) + u_h) . k_g(s) + (q_h(t) + v_h) . r_g(t - s)) / sqrt(D),    r(distance) = W_r p(distance),

p being the sinusoidal vector of a distance. Queries are processed in blocks of rows, and the backward pass computes the
scores again, so that no tensor of [S, K] is kept: memory grows with n K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.documents import Documents

ROWS = 128
"""Query rows of a block."""

BASE = 10_000.0
"""Base of the wavelengths, as published."""


class Relative(NamedTuple):
    """Position keys and biases of a layer.

    r: Position keys [K', G', D] of the distances 0 .. K' - 1, K' >= K. A multiple of G' heads can attend with them:
        consecutive ones share a position key.
    u, v: Biases [H, D] of the queries against keys and against position keys; both None if the layer has none.
    """

    r: Tensor
    u: Tensor | None = None
    v: Tensor | None = None


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """p: vectors [length, width] of the distances 0 .. length - 1, fp32; all sines, then all cosines.

    Computed in float64. An odd width has one more sine than cosines.
    """
    plane = torch.arange(0, width, 2, dtype=torch.float64, device=device)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * BASE ** (-plane / width)
    return torch.cat([angle.sin(), angle.cos()[:, : width // 2]], -1).float()


def relative_core(q: Tensor, k: Tensor, v: Tensor, relative: Relative, documents: Documents | None) -> Tensor:
    """Causal attention with relative positions. q [B, S, H, D]; k, v [B, K, G, D], K >= S; returns [B, S, H, D].

    If K > S, the queries are the last S of K positions (decoding with a cache). `documents` as in
    `headway.kernels.attention.core`: positions are relative, so boundaries are a mask and nothing else.
    """
    r = relative.r[: k.shape[1]]
    r = r.repeat_interleave(k.shape[2] // r.shape[1], 1)
    content = q if relative.u is None else q + relative.u
    position = q if relative.v is None else q + relative.v
    numbers = None if documents is None else documents.numbers(q.device)
    return _Core.apply(content, position, k, v, r, numbers)


class _Core(torch.autograd.Function):
    """Inside, heads come first: [B, G, M, rows, D] for queries, [B, G, K, D] for keys and values, [G, K, D] for r."""

    @staticmethod
    def forward(
        ctx: Any, content: Tensor, position: Tensor, k: Tensor, v: Tensor, r: Tensor, numbers: Tensor | None
    ) -> Tensor:
        out = torch.empty_like(content, memory_format=torch.contiguous_format)
        lse = content.new_empty(
            k.shape[0], k.shape[2], content.shape[2] // k.shape[2], content.shape[1], dtype=_wide(content)
        )
        values = v.transpose(1, 2)
        for start, end, scores in _blocks(content, position, k, r, numbers):
            total = lse[..., start:end] = scores.logsumexp(-1)
            weights = (scores - total.unsqueeze(-1)).exp_().to(v.dtype)
            _heads(out, k.shape[2])[..., start:end, :] = _times(weights, values[:, :, : scores.shape[-1]])
        ctx.save_for_backward(content, position, k, v, r, out, lse)
        ctx.numbers = numbers
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (as the decorator is typed)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        content, position, k, v, r, out, lse = ctx.saved_tensors
        groups, wide, scale = k.shape[2], lse.dtype, content.shape[-1] ** -0.5
        keys, values, places = k.transpose(1, 2), v.transpose(1, 2), r.transpose(0, 1)
        d_content, d_position = (torch.empty_like(content, memory_format=torch.contiguous_format) for _ in range(2))
        d_keys, d_values = (
            torch.zeros_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in (keys, values)
        )
        d_places = torch.zeros_like(places, dtype=wide, memory_format=torch.contiguous_format)
        d_out, out, first, second = (_heads(t, groups) for t in (grads[0], out, content, position))
        for start, end, scores in _blocks(content, position, k, r, ctx.numbers):
            last = scores.shape[-1]
            weights = (scores - lse[..., start:end, None]).exp_()
            step = d_out[..., start:end, :]
            d_values[:, :, :last] += _summed(weights.to(v.dtype), step)
            d_weights = _times(step, values[:, :, :last].transpose(2, 3)).to(wide)
            mean = (step.to(wide) * out[..., start:end, :].to(wide)).sum(-1, keepdim=True)
            d_scores = (weights * (d_weights - mean) * scale).to(k.dtype)
            _heads(d_content, groups)[..., start:end, :] = _times(d_scores, keys[:, :, :last])
            d_keys[:, :, :last] += _summed(d_scores, first[..., start:end, :])
            d_distances = _unshifted(d_scores).flip(-1)
            _heads(d_position, groups)[..., start:end, :] = _times(
                d_distances, places[:, :last].expand(len(k), -1, -1, -1)
            )
            d_places[:, :last] += _summed(d_distances, second[..., start:end, :]).sum(0)
        d_k, d_v = d_keys.transpose(1, 2).to(k.dtype), d_values.transpose(1, 2).to(v.dtype)
        return d_content, d_position, d_k, d_v, d_places.transpose(0, 1).to(r.dtype), None


def _blocks(
    content: Tensor, position: Tensor, k: Tensor, r: Tensor, numbers: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """First row, end, and masked scores [B, G, M, n, last] of each block, over the keys up to its last row."""
    queries, total = content.shape[1], k.shape[1]
    first, second = _heads(content, k.shape[2]), _heads(position, k.shape[2])
    keys, places = k.transpose(1, 2), r.transpose(0, 1)
    for start in range(0, queries, ROWS):
        end = min(start + ROWS, queries)
        past, last = total - queries + start, total - queries + end
        scores = _times(first[..., start:end, :], keys[:, :, :last].transpose(2, 3)).to(_wide(k))
        far_first = places[:, :last].flip(1).transpose(1, 2).expand(len(k), -1, -1, -1)
        scores += _shifted(_times(second[..., start:end, :], far_first))
        place = torch.arange(last, device=k.device)
        hidden = place > place[past:, None]
        if numbers is not None:
            hidden = (hidden | (numbers[:, past:last, None] != numbers[:, None, :last]))[:, None, None]
        yield start, end, scores.mul_(content.shape[-1] ** -0.5).masked_fill_(hidden, float("-inf"))


def _shifted(far_first: Tensor) -> Tensor:
    """Scores [..., n, K] of the distances K - 1 .. 0 -> those of the keys 0 .. K - 1, for queries at the last n places.

    Row i moves to the left by n - 1 - i. What follows its own key is of other rows and must be masked.
    """
    rows, keys = far_first.shape[-2:]
    flat = F.pad(far_first, (0, 1)).flatten(-2)
    return flat[..., rows - 1 :].narrow(-1, 0, rows * keys).unflatten(-1, (rows, keys))


def _unshifted(scores: Tensor) -> Tensor:
    """The transpose of `_shifted`, for gradients [..., n, K] that are 0 where scores are masked."""
    rows, keys = scores.shape[-2:]
    return F.pad(scores.flatten(-2), (rows - 1, 1)).unflatten(-1, (rows, keys + 1))[..., :keys]


def _heads(x: Tensor, groups: int) -> Tensor:
    """View [B, S, H, D] as [B, G, M, S, D]."""
    return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [B, G, M, n, a] times matrix [B, G, a, b] -> [B, G, M, n, b]."""
    return (rows.flatten(2, 3) @ matrix).unflatten(2, rows.shape[2:4])


def _summed(weights: Tensor, rows: Tensor) -> Tensor:
    """weights [B, G, M, n, K], rows [B, G, M, n, D] -> their products [B, G, K, D], summed over M and n."""
    return weights.flatten(2, 3).transpose(2, 3) @ rows.flatten(2, 3)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
