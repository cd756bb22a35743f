"""A short causal convolution of each channel, followed by SiLU, within documents.

Legend: B batch, S sequence, C channels, W taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.documents import Documents


def short_convolution(
    x: Tensor, weight: Tensor, *, documents: Documents | None = None, tail: Tensor | None = None
) -> Tensor:
    """silu(y), y_t = sum over i < W of weight[:, W-1-i] x_{t-i}. x [B, S, C], weight [C, W] -> [B, S, C].

    The last tap is that of the token itself. Tokens before the sequence and of other documents count as 0.

    tail: In incremental decoding, the W - 1 tokens before x, [B, W - 1, C]; only without documents.

    Computed in fp32 or wider. The backward pass keeps x and the weight, and computes y again.
    """
    if tail is not None:
        assert documents is None, "a cache holds one document per sequence"
        return _Convolved.apply(torch.cat([tail, x], 1), weight, None)[:, tail.shape[1] :]
    numbers = None if documents is None or documents.whole else documents.numbers(x.device)
    return _Convolved.apply(x, weight, numbers)


def _same(numbers: Tensor, back: int) -> Tensor:
    """Whether the token `back` places before each is of its document, [B, S, 1]; False where there is none."""
    return F.pad(numbers[:, back:] == numbers[:, : numbers.shape[1] - back], (back, 0)).unsqueeze(-1)


def _earlier(x: Tensor, back: int, numbers: Tensor | None) -> Tensor:
    """x_{t - back}, or 0."""
    if back == 0:
        return x
    moved = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
    return moved if numbers is None else moved * _same(numbers, back)


def _later(x: Tensor, back: int, numbers: Tensor | None) -> Tensor:
    """The transpose of `_earlier`: x_{t + back}, or 0."""
    if back == 0:
        return x
    x = x if numbers is None else x * _same(numbers, back)
    return F.pad(x, (0, 0, 0, back))[:, back:]


def _sums(x: Tensor, weight: Tensor, numbers: Tensor | None) -> Tensor:
    """y of `short_convolution`."""
    taps = weight.shape[1]
    y = x * weight[:, taps - 1]
    for back in range(1, min(taps, x.shape[1])):
        y = y + _earlier(x, back, numbers) * weight[:, taps - 1 - back]
    return y


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, numbers: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, numbers)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.silu(_sums(x.to(wide), weight.to(wide), numbers)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, numbers = ctx.saved_tensors
        wide, taps = torch.promote_types(x.dtype, torch.float32), weight.shape[1]
        values, taken = x.to(wide), weight.to(wide)
        y = _sums(values, taken, numbers)
        gate = y.sigmoid()
        grad = grad_outputs[0].to(wide) * gate * (1 + y * (1 - gate))
        grad_x, grad_weight = grad * taken[:, taps - 1], torch.zeros_like(taken)
        grad_weight[:, taps - 1] = (grad * values).sum((0, 1))
        for back in range(1, min(taps, x.shape[1])):
            grad_x = grad_x + _later(grad, back, numbers) * taken[:, taps - 1 - back]
            grad_weight[:, taps - 1 - back] = (grad * _earlier(values, back, numbers)).sum((0, 1))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
