"""Compare every kernel on this device with float64, by the checks that the tests run in Triton's interpreter.

What the headline of `headway bench gpu` uses is checked first, at its sizes: routing and slots in bf16, the routed
products, the attention core with and without documents.

Legend: S tokens, H query heads, G KV heads, D head size, k chosen heads per group.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import headway.kernels.checks
from headway.kernels.backends import attention_core
from headway.kernels.device import has_triton
from headway.kernels.documents import Documents
from headway.kernels.masked import document_mask, masked_core
from headway.launcher.bench.gpu.rows import Absent, Failed, Machine, Row
from headway.launcher.bench.gpu.shapes import Size

Check = Callable[[torch.device, torch.dtype], dict[str, tuple[float, float]]]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


HEADLINE_KERNELS = ("top_k", "gates", "balance_sums", "select_rope", "expand")
"""Checks of the kernels that every routed pass uses."""
CHECKED_TOKENS = 700
CORE_TOLERANCES = {torch.bfloat16: (6e-3, 1.2e-2), torch.float32: (2e-6, 5e-6)}
"""Errors allowed of the core's output and of its gradients: in bf16 of operands, scores and sums over tiles."""


def correctness() -> list[Row]:
    """One row per check in kernels/checks and precision."""
    if not has_triton():
        return [_without_triton()]
    return [_row(name, precision, check, "") for name, check in _checks().items() for precision in DTYPES]


def headline_correctness(machine: Machine) -> list[Row]:
    """What gqa and rgqa at the first size use, in bf16, and no more."""
    size = machine.scale.sizes[0]
    core = Row(
        key=f"correctness/core {size.name}",
        what=f"attention core of {size.name}, with and without documents, against float64",
        seconds=6,
        run=functools.partial(compare_core, size),
    )
    if not has_triton():
        return [core, _without_triton()]
    every = _checks()
    rows = [_row(name, "bf16", every[name], "") for name in HEADLINE_KERNELS]
    for k in (1, 2):
        what = f", at the sizes of {size.name}"
        rows.append(
            _row(f"routed products {size.name} k={k}", "bf16", functools.partial(routed_products, size, k), what)
        )
    return [core, *rows]


def _row(name: str, precision: str, check: Check, at: str) -> Row:
    return Row(
        key=f"correctness/{name} {precision}",
        what=f"{name} in {precision} against float64{at}",
        seconds=6,
        run=functools.partial(compare, check, DTYPES[precision]),
    )


def routed_products(size: Size, k: int, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Lists, projection and combination of one layer of rgqa at a size, forward and every gradient."""
    from headway.kernels.checks import v1

    case = v1.Case(
        seq=CHECKED_TOKENS,
        experts=size.heads // size.kv_heads,
        k=k,
        head_dim=size.head_dim,
        rotated=size.head_dim,
        groups=size.kv_heads,
        width=size.width,
    )
    return v1.lists_check(case, device, dtype) | v1.products_check(case, device, dtype)


def compare_core(size: Size, machine: Machine) -> dict[str, Any]:
    """The core that training uses by default, for gqa's query heads and for one slot per group, against a dense mask in
    float64. Longer than the sequences for which one mask is built.
    """
    dtype, device = machine.scale.dtype, machine.device
    attend = attention_core("auto", device_type=device.type, dtype=dtype)
    made = torch.Generator().manual_seed(3)
    segments = torch.randint(0, 40, (1, CHECKED_TOKENS), generator=made).eq(0).cumsum(1).int()
    found: dict[str, tuple[float, float]] = {}
    for heads in (size.heads, size.kv_heads):
        shapes = [(1, CHECKED_TOKENS, n, size.head_dim) for n in (heads, size.kv_heads, size.kv_heads, heads)]
        *given, grad = (torch.randn(shape, generator=made).to(dtype) for shape in shapes)
        for kind, documents in (("whole", None), ("documents", Documents.of(segments))):
            near = [t.to(device).requires_grad_() for t in given]
            far = [t.double().requires_grad_() for t in given]
            mask = document_mask(segments if documents else torch.zeros_like(segments), torch.float64)
            out, wanted = attend(*near, documents), masked_core(far[0], far[1], far[2], mask)
            pairs = zip(
                (out, *torch.autograd.grad(out, near, grad.to(device))),
                (wanted, *torch.autograd.grad(wanted, far, grad.double())),
                strict=True,
            )
            for what, (a, b) in zip(("output", "d q", "d k", "d v"), pairs, strict=True):
                allowed = CORE_TOLERANCES[dtype][what != "output"]
                found[f"{heads} heads, {kind}: {what}"] = _relative(a, b), allowed
    return judged(found)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().cpu().double() - expected.detach()).norm() / expected.detach().norm())


def compare(check: Check, dtype: torch.dtype, machine: Machine) -> dict[str, Any]:
    """Comparison -> (error, tolerance). Raises Failed if an error exceeds its tolerance."""
    if not machine.is_gpu:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise Absent("kernels run on a GPU; TRITON_INTERPRET=1 runs them in Triton's interpreter")
        if dtype != torch.float32:
            raise Absent("Triton's interpreter multiplies bf16 wrongly")
    return judged(check(machine.device, dtype))


def judged(found: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The row of comparisons -> (error, tolerance). Raises Failed if an error exceeds its tolerance or is NaN."""
    data = {"comparisons": [{"what": what, "error": e, "tolerance": t} for what, (e, t) in found.items()]}
    wrong = [f"{what}: error {e:.2e}, allowed {t:.0e}" for what, (e, t) in found.items() if not e <= t]
    if wrong:
        raise Failed(f"{len(wrong)} of {len(found)} comparisons: {'; '.join(wrong[:5])}", data)
    return data | {"worst": max((e / t for e, t in found.values() if t), default=None)}


def _checks() -> dict[str, Check]:
    names = sorted(found.name for found in pkgutil.iter_modules(headway.kernels.checks.__path__))
    modules = [importlib.import_module(f"headway.kernels.checks.{name}") for name in names]
    return {name: check for module in modules for name, check in getattr(module, "CHECKS", {}).items()}


def _without_triton() -> Row:
    return Row(key="correctness/kernels", what="kernels against float64", seconds=0, run=_no_triton)


def _no_triton(machine: Machine) -> dict[str, Any]:
    raise Absent("Triton is not installed")
