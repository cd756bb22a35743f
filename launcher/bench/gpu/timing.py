"""Times of calls on a device: taken in turns, with the noise of the measurement beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headway.launcher.base.spread import spread

Call = Callable[[int], Any]
"""What is timed; it is given a number that grows, by which it takes one of several inputs."""

WARMUP = 2
BURST_S = 2e-3
"""A short call is repeated until it takes about so long: a pair of events costs a few microseconds."""
ROTATED_BYTES = 150 << 20
"""Inputs together; more than twice the L2 cache of an H100 or H200, so that none is found there."""


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, from an idle device to an idle device."""
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
    """Seconds of each call in each round. Every round begins with another one, so that a drift hits all of them."""
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
    """`in_turns` for calls of microseconds: each is repeated, as a CUDA graph where it can be captured.

    A graph leaves out the host's time for starting operations, which is no property of a kernel. Calls in `waiting`
    wait for the host and are not tried: their time includes that.
    """
    bursts = {name: _burst(call, device, capture=name not in waiting) for name, call in calls.items()}
    found = in_turns({name: (lambda _, run=run: run()) for name, (run, _) in bursts.items()}, device, rounds=rounds)
    return {name: [s / bursts[name][1] for s in seconds] for name, seconds in found.items()}


def _burst(call: Call, device: torch.device, *, capture: bool) -> tuple[Callable[[], Any], int]:
    """One call that makes several, and how many."""
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
    """Inputs of seeds 0, 1, ..., so many that the cache holds none of them when its turn comes again."""
    first = make(0)
    size = sum(t.numel() * t.element_size() for t in first)
    return [first, *(make(seed) for seed in range(1, max(2, min(most, -(-ROTATED_BYTES // max(1, size))))))]


def randn(shape: Sequence[int], device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers; zeros would run faster, as a chip that toggles less clocks higher."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), device=device, dtype=torch.float32, generator=generator).to(dtype)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Spread, and the times themselves."""
    return {**spread(seconds), "raw": list(seconds)}


def ratio(baseline: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times as fast as the baseline `other` is, pairwise by round."""
    return spread([a / b for a, b in zip(baseline, other, strict=True)])


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)
