"""Time calls on a device, in turns, and report the noise of the measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headway.launcher.base.spread import spread

Call = Callable[[int], Any]
"""A function to time. Its argument is a call number, by which it selects one of several inputs."""

WARMUP = 2
BURST_S = 2e-3
"""A short call is repeated for about this many seconds, because a pair of events costs a few microseconds."""
ROTATED_BYTES = 150 << 20
"""Total bytes of all inputs: more than twice the L2 cache of an H100 or H200, so that no input is in the cache."""


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call. The device is idle before and after it."""
    if device.type != "cuda":
        t0 = time.perf_counter()
        call()
        return time.perf_counter() - t0
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def in_turns(calls: Mapping[str, Call], device: torch.device, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round. The order rotates, so that a drifting speed affects all calls."""
    names, found = list(calls), {name: [] for name in calls}
    for i in range(WARMUP + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            elapsed = seconds_of(lambda name=name, i=i: calls[name](i), device)
            if i >= WARMUP:
                found[name].append(elapsed)
    return found


def short(
    calls: Mapping[str, Call], device: torch.device, *, rounds: int, waiting: Collection[str] = ()
) -> dict[str, list[float]]:
    """`in_turns` for calls of microseconds: each is repeated, as a CUDA graph if it can be captured.

    A graph excludes the host's launch time, which is not a property of a kernel. Calls in `waiting` wait for the host,
    so they are not captured, and their time includes the wait.
    """
    bursts = {name: _burst(call, device, capture=name not in waiting) for name, call in calls.items()}
    found = in_turns({name: (lambda _, run=run: run()) for name, (run, _) in bursts.items()}, device, rounds=rounds)
    return {name: [s / bursts[name][1] for s in seconds] for name, seconds in found.items()}


def _burst(call: Call, device: torch.device, *, capture: bool) -> tuple[Callable[[], Any], int]:
    """(function that repeats the call, number of repetitions)."""
    for i in range(WARMUP):
        call(i)
    once = min(seconds_of(lambda i=i: call(i), device) for i in range(3))
    repeats = max(1, min(200, round(BURST_S / max(once, 1e-7))))

    def run() -> None:
        for i in range(repeats):
            call(i)

    if device.type != "cuda" or not capture:
        return run, repeats
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay, repeats
    except RuntimeError:  # what cannot be captured after all is started by the host each time
        torch.cuda.set_stream(torch.cuda.default_stream(device))
        torch.cuda.synchronize(device)
        return run, repeats


def rotated(make: Callable[[int], Sequence[Tensor]], *, most: int = 16) -> list[Sequence[Tensor]]:
    """Inputs with seeds 0, 1, ...; enough that an input is no longer in the cache when it is used again."""
    first = make(0)
    size = sum(t.numel() * t.element_size() for t in first)
    return [first, *(make(seed) for seed in range(1, max(2, min(most, -(-ROTATED_BYTES // max(1, size))))))]


def randn(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normally distributed numbers. Zeros would be faster, because fewer bit flips allow higher clock rates."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), device=device, dtype=torch.float32, generator=generator).to(dtype)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """The spread of the times, and the raw times."""
    return {**spread(seconds), "raw": list(seconds)}


def ratio(baseline: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Speedup of `other` over the baseline, pairwise by round."""
    return spread([a / b for a, b in zip(baseline, other, strict=True)])


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)
