"""Times of the phases of an optimizer step: by the host's clock on a CPU, by events of the stream on a GPU.

On a GPU, passes only queue kernels, so the host's clock would measure the queueing. Events are recorded in the stream
between the phases, and are read once per step, after its last event has completed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

FORWARD, BACKWARD, OPTIMIZER = range(3)
_AFTER = ("backward", "optimizer", "forward")
"""Name of the phase that follows each phase."""
Seconds = tuple[float, float, float]
"""Forward, backward and optimizer, summed over the micro-batches of a step."""


class PhaseClock(Protocol):
    """Measures the phases of one step after the other. A phase lasts from the previous mark to its own."""

    def start(self) -> None:
        """Begin a step: forget the previous one, and set the first mark."""
        ...

    def end(self, phase: int) -> None:
        """Mark the end of a phase: FORWARD, BACKWARD or OPTIMIZER."""
        ...

    def read(self) -> Seconds:
        """Seconds of each phase since `start`. Call it once per step, at its end: on a GPU it waits for the step."""
        ...


class HostClock:
    """For a CPU, where every call returns after its work."""

    def __init__(self) -> None:
        self._last, self._seconds = 0.0, [0.0, 0.0, 0.0]

    def start(self) -> None:
        self._last, self._seconds = time.perf_counter(), [0.0, 0.0, 0.0]

    def end(self, phase: int) -> None:
        now = time.perf_counter()
        self._seconds[phase] += now - self._last
        self._last = now

    def read(self) -> Seconds:
        forward, backward, optimizer = self._seconds
        return forward, backward, optimizer


class EventClock:
    """For a GPU: one event per mark in the current stream. Events are reused in the next step.

    `make`: makes an event with the methods `record`, `synchronize` and `elapsed_time` (in milliseconds) of
    `torch.cuda.Event`.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._events: list[Any] = []
        self._phases: list[int] = []

    def start(self) -> None:
        self._phases = []
        self._record(0)

    def end(self, phase: int) -> None:
        self._phases.append(phase)
        self._record(len(self._phases))

    def _record(self, index: int) -> None:
        if index == len(self._events):
            self._events.append(self._make())
        self._events[index].record()

    def read(self) -> Seconds:
        # The step has already waited for its sums, except if it was asked for them before the update.
        self._events[len(self._phases)].synchronize()
        seconds = [0.0, 0.0, 0.0]
        for index, phase in enumerate(self._phases):
            seconds[phase] += self._events[index].elapsed_time(self._events[index + 1]) / 1e3
        forward, backward, optimizer = seconds
        return forward, backward, optimizer


class NamedClock:
    """Another clock, with a range in the trace of a profiler for each phase, and `losses` for what follows them.

    `passes`: forward passes of a step.
    """

    def __init__(self, inner: PhaseClock, passes: int) -> None:
        self.inner, self._passes = inner, passes
        self._left = 0
        self._range = contextlib.ExitStack()

    def start(self) -> None:
        self.inner.start()
        self._left = self._passes
        self._open("forward")

    def end(self, phase: int) -> None:
        self._range.close()
        self.inner.end(phase)
        self._left -= phase == OPTIMIZER
        self._open(_AFTER[phase] if self._left else "losses")

    def read(self) -> Seconds:
        self._range.close()
        return self.inner.read()

    def _open(self, name: str) -> None:
        self._range.enter_context(torch.profiler.record_function(name))


def clock_of(device: torch.device) -> PhaseClock:
    """The clock for phases on this device."""
    return EventClock(lambda: torch.cuda.Event(enable_timing=True)) if device.type == "cuda" else HostClock()
