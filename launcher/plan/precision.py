"""Whether bf16 is faster than fp32 on this machine's CPU: its instructions, and a short measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

SIDE = 512
ROUNDS, LEAST_ROUNDS = 15, 3
LIMIT_S = 1.0
FASTER = 1.1
"""Least ratio of fp32's time to bf16's that is called faster: smaller ones are within the noise of a shared machine."""

_INSTRUCTIONS = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}


def bf16_instructions() -> list[str]:
    """Names of the CPU's instructions for bf16 products, as PyTorch detects them; empty if there are none."""
    import torch

    found: list[str] = []
    for name, function in _INSTRUCTIONS.items():
        supported: Callable[[], bool] | None = getattr(torch.cpu, function, None)  # absent in other releases
        if supported is not None and supported():
            found.append(name)
    return found


def bf16_ratio(seconds_of: Callable[[Any], float] | None = None) -> float:
    """Time of an fp32 matrix product over that of the bf16 product: the median of rounds that run both, in turns.

    [512, 512] x [512, 512], random numbers. Ends after 15 rounds or about a second. `seconds_of` stands in for the
    clock: it runs a product of two matrices and returns its seconds.
    """
    import torch

    measure = seconds_of or _seconds
    made = torch.Generator().manual_seed(1)
    pairs = {}
    for dtype in (torch.float32, torch.bfloat16):
        pairs[dtype] = tuple(torch.randn(SIDE, SIDE, generator=made).to(dtype) for _ in range(2))
    for pair in pairs.values():
        measure(pair)  # the first product sets up threads and kernels
    ratios, begin = list[float](), time.perf_counter()
    while len(ratios) < ROUNDS and (len(ratios) < LEAST_ROUNDS or time.perf_counter() - begin < LIMIT_S):
        wide, narrow = measure(pairs[torch.float32]), measure(pairs[torch.bfloat16])
        ratios.append(wide / max(narrow, 1e-9))
    return statistics.median(ratios)


def _seconds(pair: Any) -> float:
    begin = time.perf_counter()
    pair[0].mm(pair[1])
    return time.perf_counter() - begin


def bf16_on_cpu() -> tuple[str, str]:
    """(what the CPU has, what follows for `parallel.precision: bf16`)."""
    names, ratio = bf16_instructions(), bf16_ratio()
    has = f"the CPU has {' and '.join(names)}" if names else "the CPU has no instructions for bf16 (AVX512-BF16 or AMX)"
    measured = f"matrix products in bf16 take {1 / ratio:.2f} of the time of fp32, measured now"
    if ratio >= FASTER:
        return has, f"precision bf16 is faster here: {measured}; a whole step gains less"
    return has, f"precision bf16 works but is not faster here: {measured}"


def bf16_note(spec: Spec) -> str | None:
    """Line of a plan for a run in fp32 on the CPU, if this machine's CPU has bf16 instructions that prove faster."""
    if spec.launch.device != "cpu" or spec.parallel.precision != "fp32" or not (names := bf16_instructions()):
        return None
    if (ratio := bf16_ratio()) < FASTER:
        return None
    return (
        f"note: parallel.precision=bf16 may be faster on this CPU, which has {' and '.join(names)}: matrix products "
        f"take {1 / ratio:.2f} of the time of fp32, measured now; a whole step gains less, and losses differ slightly"
    )
