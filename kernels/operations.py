"""The operations of a block that speed options can replace: selection, compilation and a trial run.

Legend: B batch, S sequence, H heads, D head size, d width, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from headway.kernels.attention import core, core_of_blocks
from headway.kernels.backends import Backend, attention_core
from headway.kernels.delta.library import Delta, delta_of
from headway.kernels.delta.rule import chunked_delta
from headway.kernels.dropout import Rate, dropout
from headway.kernels.elementwise import (
    add_layer_norm,
    add_norm,
    gelu,
    gelu_tanh,
    gelu_tanh_mul,
    layer_norm,
    relu,
    silu_mul,
)
from headway.kernels.fp8 import Product, check_fp8, scaled_product
from headway.kernels.levers import LeverError
from headway.kernels.libraries import Loss, Norm, loss_of, norm_of
from headway.kernels.loss import linear_cross_entropy_sum
from headway.kernels.norm import rms_norm
from headway.kernels.rope import apply_rope, rope_tables

Compile = Literal["auto", "none", "elementwise", "block"]
Matmul = Literal["none", "fp8"]

SHAPES = 64
"""Maximum number of shapes per compiled function (different layers, heads, stages, training and validation)."""

POINTWISE = ("silu_mul", "gelu_tanh_mul", "gelu", "gelu_tanh", "relu")
"""The inner functions of the MLP types."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Pure functions. A replacement must have the signature and the semantics of the default."""

    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_norm
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = layer_norm
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_layer_norm
    silu_mul: Callable[[Tensor, Tensor], Tensor] = silu_mul
    gelu_tanh_mul: Callable[[Tensor, Tensor], Tensor] = gelu_tanh_mul
    gelu: Callable[[Tensor], Tensor] = gelu
    gelu_tanh: Callable[[Tensor], Tensor] = gelu_tanh
    relu: Callable[[Tensor], Tensor] = relu
    dropout: Callable[..., Tensor] = dropout
    rope: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor] = apply_rope
    core: Callable[..., Tensor] = core
    delta: Callable[..., tuple[Tensor, Tensor | None]] = chunked_delta
    loss: Callable[..., Tensor] = linear_cross_entropy_sum
    fp8: Product | None = None  # of the matrices of a block; None: in the precision of the model


def compile_on(device_type: str, compile: Compile) -> Literal["none", "elementwise", "block"]:
    """What `compile` means on a device. auto: elementwise on CUDA, none elsewhere, the same for every mechanism.

    On the CPU nothing is compiled, so that results there depend only on PyTorch.
    """
    if compile != "auto":
        return compile
    return "elementwise" if device_type == "cuda" else "none"


def make_operations(
    *,
    device: torch.device,
    dtype: torch.dtype,
    compile: Compile = "auto",
    attention: Backend = "auto",
    norm: Norm = "torch",
    loss: Loss = "chunked",
    matmul: Matmul = "none",
    delta: Delta = "auto",
) -> Operations:
    """The operations that a spec selects, on `device`. Compiled ones have been run once, with gradients.

    Raises LeverError (64), which names the key, if one is not available.
    """
    operations = Operations(
        core=attention_core(attention, device_type=device.type, dtype=dtype),
        loss=loss_of(loss, device_type=device.type, dtype=dtype),
        delta=delta_of(delta, device_type=device.type, dtype=dtype),
    )
    if matmul == "fp8":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        check_fp8(device.type, dtype, capability)
        operations = replace(operations, fp8=scaled_product)
    if norm != "torch":
        operations = with_norm(operations, norm_of(norm, device_type=device.type))
    if compile == "block":
        if device.type != "cpu":
            raise LeverError(
                f"speed.compile: block is for the CPU, and this run is on {device.type}; use speed.compile: auto"
            )
        return replace(operations, core=core_of_blocks)
    if compile_on(device.type, compile) == "elementwise":
        operations = compiled(operations)
        try:
            try_elementwise(operations, device, dtype)
        except Exception as error:  # any error of a compiler, a linker or a driver
            raise LeverError(
                f"speed.compile: {compile}{f' (elementwise on {device.type})' if compile == 'auto' else ''} does not "
                f"compile here ({short(error)}); use speed.compile: none, or "
                "install a C++ compiler (g++) where it runs on the CPU, or Triton and gcc where on a GPU"
            ) from error
    return operations


def compiled(operations: Operations) -> Operations:
    """Compile the elementwise functions with torch.compile, per shape. Norms of a library are not compiled."""
    config: Any = torch._dynamo.config
    # A function raises beyond this limit. A model with windows can have more shapes than the default of 8.
    config.recompile_limit = max(config.recompile_limit, SHAPES)
    if operations.norm is rms_norm:
        operations = replace(operations, norm=_compile(operations.norm), add_norm=_compile(operations.add_norm))
    names = (*POINTWISE, "layer_norm", "add_layer_norm", "dropout")
    pointwise = {name: _compile(getattr(operations, name)) for name in names}
    return replace(operations, **pointwise, rope=_compile(operations.rope))


def with_norm(operations: Operations, norm: Callable[[Tensor, Tensor, float], Tensor]) -> Operations:
    """Replace `norm` and `add_norm` by a library's norm."""

    def added_and_normed(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        added = x + y
        return added, norm(added, gain, eps)

    return replace(operations, norm=norm, add_norm=added_and_normed)


def _compile(function: Any) -> Any:
    # Products of indices wrap around in 64 bits, which the compiler's own arithmetic on indices does not.
    options: Any = {"constant_and_index_propagation": False} if function is dropout else None
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


def try_elementwise(operations: Operations, device: torch.device, dtype: torch.dtype) -> None:
    """Run a small forward and backward pass of each elementwise function."""
    x = torch.ones(1, 2, 4, 16, device=device, dtype=dtype, requires_grad=True)  # [B, S, H, D]
    gain = torch.ones(16, device=device, dtype=dtype, requires_grad=True)
    added, normed = operations.add_norm(x, operations.norm(x, gain, 1e-6), gain, 1e-6)
    turned = operations.rope(normed, rope_tables(2, 16, 10_000.0, device))
    found = operations.silu_mul(turned, added)
    added, normed = operations.add_layer_norm(x, operations.layer_norm(x, gain, gain, 1e-6), gain, gain, 1e-6)
    for function in (operations.gelu, operations.gelu_tanh, operations.relu):
        found = found + function(normed + added)
    seeds = torch.zeros(1, dtype=torch.int64, device=device)
    operations.dropout(found.flatten(2), seeds, *Rate.of(0.1)).sum().backward()


def short(error: BaseException) -> str:
    """The type and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
