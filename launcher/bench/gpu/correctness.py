"""Compare every kernel on this device with float64, by the checks that the tests run in Triton's interpreter."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

import headway.kernels.checks
from headway.kernels.device import has_triton
from headway.launcher.bench.gpu.rows import Absent, Failed, Machine, Row

Check = Callable[[torch.device, torch.dtype], dict[str, tuple[float, float]]]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def correctness() -> list[Row]:
    """One row per check in kernels/checks and precision."""
    if not has_triton():
        return [Row(key="correctness/kernels", what="kernels against float64", seconds=0, run=_no_triton)]
    return [
        Row(
            key=f"correctness/{name} {precision}",
            what=f"{name} in {precision} against float64",
            seconds=6,
            run=functools.partial(compare, check, dtype),
        )
        for name, check in _checks().items()
        for precision, dtype in DTYPES.items()
    ]


def compare(check: Check, dtype: torch.dtype, machine: Machine) -> dict[str, Any]:
    """Comparison -> (error, tolerance). Raises Failed if an error exceeds its tolerance."""
    if not machine.is_gpu:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise Absent("kernels run on a GPU; TRITON_INTERPRET=1 runs them in Triton's interpreter")
        if dtype != torch.float32:
            raise Absent("Triton's interpreter multiplies bf16 wrongly")
    found = check(machine.device, dtype)
    data = {"comparisons": [{"what": what, "error": e, "tolerance": t} for what, (e, t) in found.items()]}
    wrong = [f"{what}: error {e:.2e}, allowed {t:.0e}" for what, (e, t) in found.items() if not e <= t]
    if wrong:
        raise Failed(f"{len(wrong)} of {len(found)} comparisons: {'; '.join(wrong[:5])}", data)
    return data | {"worst": max((e / t for e, t in found.values() if t), default=None)}


def _checks() -> dict[str, Check]:
    names = sorted(found.name for found in pkgutil.iter_modules(headway.kernels.checks.__path__))
    modules = [importlib.import_module(f"headway.kernels.checks.{name}") for name in names]
    return {name: check for module in modules for name, check in getattr(module, "CHECKS", {}).items()}


def _no_triton(machine: Machine) -> dict[str, Any]:
    raise Absent("Triton is not installed")
