"""The operations of a block that levers of speed replace, and how they are chosen, compiled and tried out.

Legend: B batch, S sequence, H heads, D head size, d width, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from headway.kernels.attention import core
from headway.kernels.backends import Backend, attention_core
from headway.kernels.elementwise import add_norm, silu_mul
from headway.kernels.levers import LeverError
from headway.kernels.libraries import Loss, Norm, loss_of, norm_of
from headway.kernels.loss import linear_cross_entropy_sum
from headway.kernels.norm import rms_norm
from headway.kernels.rope import apply_rope, rope_tables

Compile = Literal["none", "elementwise"]

SHAPES = 64
"""Shapes for which one function may be compiled: those of layers, heads, stages, training and validation."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Pure functions; each with the signature and the meaning of its default."""

    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_norm
    silu_mul: Callable[[Tensor, Tensor], Tensor] = silu_mul
    rope: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor] = apply_rope
    core: Callable[..., Tensor] = core
    loss: Callable[..., Tensor] = linear_cross_entropy_sum


def make_operations(
    *,
    device: torch.device,
    dtype: torch.dtype,
    compile: Compile = "none",
    attention: Backend = "auto",
    norm: Norm = "torch",
    loss: Loss = "chunked",
) -> Operations:
    """Those that a spec asks for, on `device`; what is compiled or brought by a library has run once, with gradients.

    Raises LeverError (64) where one cannot run here; its message names the key.
    """
    operations = Operations(
        core=attention_core(attention, device_type=device.type, dtype=dtype),
        loss=loss_of(loss, device_type=device.type, dtype=dtype),
    )
    if norm != "torch":
        operations = with_norm(operations, norm_of(norm, device_type=device.type))
    if compile == "elementwise":
        operations = compiled(operations)
        try:
            try_elementwise(operations, device, dtype)
        except Exception as error:  # whatever a compiler, a linker or a driver comes up with
            raise LeverError(
                f"speed.compile: elementwise does not compile here ({_short(error)}); use speed.compile: none, or "
                "install a C++ compiler (g++) where it runs on the CPU, or Triton and gcc where on a GPU"
            ) from error
    return operations


def compiled(operations: Operations) -> Operations:
    """Its elementwise functions through torch.compile, one kernel each way and per shape; a library's norm as it is."""
    config: Any = torch._dynamo.config
    # Beyond the limit a function would raise; the default of 8 is less than the shapes of one model with windows.
    config.recompile_limit = max(config.recompile_limit, SHAPES)
    if operations.norm is rms_norm:
        operations = replace(operations, norm=_compile(operations.norm), add_norm=_compile(operations.add_norm))
    return replace(operations, silu_mul=_compile(operations.silu_mul), rope=_compile(operations.rope))


def with_norm(operations: Operations, norm: Callable[[Tensor, Tensor, float], Tensor]) -> Operations:
    """With a norm that a library brings, alone and behind the residual addition."""

    def added_and_normed(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        added = x + y
        return added, norm(added, gain, eps)

    return replace(operations, norm=norm, add_norm=added_and_normed)


def _compile(function: Any) -> Any:
    return torch.compile(function, dynamic=False, fullgraph=True)


def try_elementwise(operations: Operations, device: torch.device, dtype: torch.dtype) -> None:
    """One small forward and backward pass of each elementwise function."""
    x = torch.ones(1, 2, 4, 16, device=device, dtype=dtype, requires_grad=True)  # [B, S, H, D]
    gain = torch.ones(16, device=device, dtype=dtype, requires_grad=True)
    added, normed = operations.add_norm(x, operations.norm(x, gain, 1e-6), gain, 1e-6)
    turned = operations.rope(normed, rope_tables(2, 16, 10_000.0, device))
    operations.silu_mul(turned, added).sum().backward()


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
