"""Norms and MLP of the decoder, and helpers to declare parameters.

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
    """An uninitialized parameter. `headway.model.init` initializes it by its full name."""
    return nn.Parameter(torch.empty(*shape))


class FixedBuffers(nn.Module):
    """A module whose own buffers keep their dtype in `.to(dtype)`.

    Example: in bf16, adding 1e-3 to a bias of 0.25 would leave it unchanged.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Replaceable(nn.Module):
    """A module whose functions can be replaced by faster kernels with the same semantics."""

    @abstractmethod
    def use(self, operations: Operations) -> None: ...


def use_operations(module: nn.Module, operations: Operations) -> None:
    """Set `operations` on every `Replaceable` in `module`."""
    for part in module.modules():
        if isinstance(part, Replaceable):
            part.use(operations)


class _Gain(Replaceable):
    """Base of the norms: a gain [width]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.gain = parameter(width)
        self.eps = eps
        self.use(Operations())


class RMSNorm(_Gain):
    """RMSNorm over the last dimension, with a gain."""

    def use(self, operations: Operations) -> None:
        self._norm = operations.norm

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x, self.gain, self.eps)


class AddNorm(_Gain):
    """Residual addition and the following RMSNorm: returns x + y and norm(x + y)."""

    def use(self, operations: Operations) -> None:
        self._add_norm = operations.add_norm

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._add_norm(x, y, self.gain, self.eps)


class SwiGLU(Replaceable):
    """w_down (silu(w_gate x) * w_up x) (Shazeer, 2020, arXiv 2002.05202); no biases.

    w_gate and w_up are separate matrices. One fused matmul with 2F rows was not faster on CPU (56 against 54 ms for
    forward and backward at T=2048, d=256, F=704), and separate matrices can be sharded without reordering rows.
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
