"""Matrix products in 8-bit floating point: the linear layers of a block, forward and backward.

Operands are scaled so that their largest magnitude is the largest number of the format, rounded, multiplied with fp32
accumulation, and the scales are divided out (Micikevicius et al., 2022, arXiv 2209.05433). One scale per tensor,
computed from the tensor itself. Inputs and weights are e4m3, gradients of outputs e5m2, which has more range and one
bit less. Weights, and the gradients that the optimizer gets, stay in the precision of the model.

Legend: T tokens, N output and K input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels.levers import LeverError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""The product of a GPU takes inner and output sizes that are multiples of this."""
CAPABILITY = (8, 9)  # Ada and Hopper

Product = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
"""(a [M, K] fp8, b [K, N] fp8, scale of the result fp32, dtype of the result) -> [M, N]."""

_USE = "use speed.matmul: none"


def check_fp8(device_type: str, dtype: torch.dtype, capability: tuple[int, int] | None) -> None:
    """Raise LeverError (64) unless fp8 products run on this device for a model of `dtype`."""
    if device_type != "cuda":
        raise LeverError(f"speed.matmul: fp8 runs on NVIDIA GPUs, and this run is on {device_type}; {_USE}")
    if capability is None or capability < CAPABILITY:
        found = "unknown" if capability is None else f"{capability[0]}.{capability[1]}"
        raise LeverError(f"speed.matmul: fp8 needs compute capability 8.9 or higher, this GPU has {found}; {_USE}")
    if dtype != torch.bfloat16:
        raise LeverError(f"speed.matmul: fp8 replaces products in bf16; {_USE}, or parallel.precision: bf16")


def quantised(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as numbers of `kind`, and the scale to multiply them with: fp32 scalar; no synchronization with the host."""
    largest = torch.finfo(kind).max
    scale = x.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny * largest) / largest
    return (x.float() / scale).clamp(-largest, largest).to(kind), scale


def scaled_product(a: Tensor, b: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`Product` on a GPU. The first operand must be row-major and the second column-major."""
    one = torch.ones((), device=a.device)
    b = b if b.stride(0) == 1 else b.t().contiguous().t()
    return cast(Tensor, torch._scaled_mm(a.contiguous(), b, scale_a=scale, scale_b=one, out_dtype=dtype))


def emulated_product(a: Tensor, b: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`Product` on any device: the same numbers, multiplied in fp32. For tests."""
    return ((a.float() @ b.float()) * scale).to(dtype)


class _Linear(torch.autograd.Function):
    """y = x W^T. The three products of forward and backward are in fp8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, product: Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        rows, x_scale = quantised(x.flatten(0, -2), E4M3)
        matrix, w_scale = quantised(weight, E4M3)
        return product(rows, matrix.t(), x_scale * w_scale, x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad, g_scale = quantised(grads[0].flatten(0, -2), E5M2)
        rows, x_scale = quantised(x.flatten(0, -2), E4M3)
        matrix, w_scale = quantised(weight, E4M3)
        d_x = ctx.product(grad, matrix, g_scale * w_scale, x.dtype).view_as(x)
        if missing := -len(rows) % MULTIPLE:  # tokens are the inner size here; rows of zeros add nothing
            grad, rows = (torch.cat([t, t.new_zeros(missing, t.shape[1])]) for t in (grad, rows))
        return d_x, ctx.product(grad.t(), rows, g_scale * x_scale, weight.dtype), None


def fp8_linear(x: Tensor, weight: Tensor, product: Product = scaled_product) -> Tensor:
    """x [..., K], weight [N, K] -> [..., N], like `linear` without a bias."""
    return cast(Tensor, _Linear.apply(x, weight, product))


class Fp8Parameter(nn.Parameter):
    """A matrix whose `linear` is `fp8_linear`. In every other operation it is an ordinary parameter."""

    product: Product
    used: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and not kwargs and isinstance(args[1], Fp8Parameter):
                args[1].used = True
                made = fp8_linear(args[0], args[1], args[1].product)
                return made if len(args) == 2 or args[2] is None else made + args[2]
            return func(*args, **(kwargs or {}))


def to_fp8(matrices: Iterable[tuple[str, nn.Parameter]], product: Product) -> list[tuple[str, Fp8Parameter]]:
    """Let `linear` of these parameters be in fp8, in place. Raises LeverError for a size that fp8 does not take."""
    found: list[tuple[str, Fp8Parameter]] = []
    for name, matrix in matrices:
        if any(side % MULTIPLE for side in matrix.shape):
            shape = " x ".join(map(str, matrix.shape))
            raise LeverError(
                f"speed.matmul: fp8 takes matrices whose sides are multiples of {MULTIPLE}, and {name} is {shape}; "
                f"change the sizes of the model, or {_USE}"
            )
        matrix.__class__ = Fp8Parameter
        changed = cast(Fp8Parameter, matrix)
        changed.product, changed.used = product, False
        found.append((name, changed))
    return found


def check_used(matrices: Iterable[tuple[str, Fp8Parameter]]) -> None:
    """Raise LeverError if a pass has not used all of these in `linear`: their products would not be in fp8."""
    if unused := [name for name, matrix in matrices if not matrix.used]:
        raise LeverError(
            f"speed.matmul: fp8 has no form of the products with {', '.join(unused)} in this mechanism, and a "
            f"comparison would be unequal; {_USE}, or attention.projections: dense if that is another value now"
        )
