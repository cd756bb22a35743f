"""Norm and MLP of the decoder, and how parameters are declared.

Legend: B batch, S sequence, d width, F FFN width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels.operations import Operations
from headway.model.base import Shard


def parameter(*shape: int) -> nn.Parameter:
    """Uninitialised; `headway.model.init` draws it, by its full name."""
    return nn.Parameter(torch.empty(*shape))


class FixedBuffers(nn.Module):
    """Moves like any module, but its own buffers keep their dtype: in bf16 a bias of 0.25 takes no step of 1e-3."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Replaceable(nn.Module):
    """A module that computes by functions which can be replaced by faster ones of equal meaning."""

    @abstractmethod
    def use(self, operations: Operations) -> None: ...


def use_operations(module: nn.Module, operations: Operations) -> None:
    """Give them to every part of `module`."""
    for part in module.modules():
        if isinstance(part, Replaceable):
            part.use(operations)


class _Gain(Replaceable):
    """What has the gain of a norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.gain = parameter(width)
        self.eps = eps
        self.use(Operations())


class RMSNorm(_Gain):
    """Norm over the last axis with a gain."""

    def use(self, operations: Operations) -> None:
        self._norm = operations.norm

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x, self.gain, self.eps)


class AddNorm(_Gain):
    """x + y, and the norm of that with a gain: the residual addition together with the norm behind it."""

    def use(self, operations: Operations) -> None:
        self._add_norm = operations.add_norm

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._add_norm(x, y, self.gain, self.eps)


class SwiGLU(Replaceable):
    """w_down (silu(w_gate x) * w_up x) (Shazeer, 2020, arXiv 2002.05202); no biases.

    Two input matrices, not one of 2F rows: the fused product was no faster on CPU (56 against 54 ms forward and
    backward at T=2048, d=256, F=704), and two are cut over tensor ranks without reordering.
    """

    output_matrices = ("w_down",)

    def __init__(self, width: int, ffn_width: int, *, layers: int, init_std: float) -> None:
        super().__init__()
        self.w_gate = parameter(ffn_width, width)
        self.w_up = parameter(ffn_width, width)
        self.w_down = parameter(width, ffn_width)
        self.init_stds = {"w_gate": init_std, "w_up": init_std, "w_down": init_std / (2 * layers) ** 0.5}
        self.shards = {"w_gate": Shard(0, ffn_width), "w_up": Shard(0, ffn_width), "w_down": Shard(1, ffn_width)}
        self.use(Operations())

    def use(self, operations: Operations) -> None:
        self._silu_mul = operations.silu_mul

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._silu_mul(F.linear(x, self.w_gate), F.linear(x, self.w_up)), self.w_down)
