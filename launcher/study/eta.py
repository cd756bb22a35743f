"""Estimate when the cells of a study end, from the pace of those that run."""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from headway.launcher.base.text import duration

_STEP = re.compile(r"\bstep +(\d+)/(\d+)\b")

ENOUGH = 0.05
"""Minimum share of the longest cell whose steps must be timed before an estimate of the remaining time is shown."""


@dataclass(kw_only=True)
class _Running:
    """A running cell. `marks`: (time, work done) at its console lines. `before`: work of earlier starts."""

    total: float
    before: float
    begun_s: float
    marks: list[tuple[float, float]] = field(default_factory=list)

    def steady(self) -> tuple[float, float]:
        """(seconds, work) between the second and the last console line."""
        if len(self.marks) < 3:
            return 0.0, 0.0
        (begin_s, begin), (end_s, end) = self.marks[1], self.marks[-1]
        return end_s - begin_s, end - begin

    @property
    def left(self) -> float:
        return self.total - (self.marks[-1][1] if self.marks else self.before)


class Eta:
    """Estimated seconds until the last of the cells ends that `jobs` workers train, from the steps of this invocation.

    Work is measured in one unit for all cells, such as FLOPs. The start of a process and its first steps are slower
    than the later steps. The pace of a cell is therefore measured from its second console line on, beside the cells
    that run at that time. The start-up time is added once for each remaining cell.
    """

    def __init__(
        self, cells: Mapping[Any, float], *, jobs: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`cells`: work that each cell has yet to do, in the order in which they start."""
        self._left, self._jobs, self._clock = dict(cells), jobs, clock
        self._enough = ENOUGH * max(cells.values(), default=0.0)
        self._steady_s = self._steady_work = 0.0  # sums over finished cells
        self._starts: list[float] = []  # seconds of each finished cell outside its steady steps
        self._running: dict[Hashable, _Running] = {}

    def begin(self, cell: Hashable, done: float, total: float) -> None:
        """Record the start of a cell, of whose `total` work `done` was done earlier or by another run."""
        self._left.pop(cell, None)
        self._running[cell] = _Running(total=total, before=done, begun_s=self._clock())

    def step(self, cell: Hashable, done: float) -> None:
        """Record that a running cell has done `done`, with what was done before it began."""
        marks = self._running[cell].marks
        if not marks or done > marks[-1][1]:
            marks.append((self._clock(), done))

    def end(self, cell: Hashable) -> None:
        """Record the end of a cell, after success or failure, or without a start."""
        self._left.pop(cell, None)
        ended = self._running.pop(cell, None)
        if ended is None:
            return
        seconds, work = ended.steady()
        took = self._clock() - ended.begun_s
        if not work and ended.marks:  # fewer than three console lines: use the whole duration
            seconds, work = took, ended.marks[-1][1] - ended.before
        if work > 0:
            self._steady_s += seconds
            self._steady_work += work
            self._starts.append(took - seconds)

    def seconds_left(self) -> float | None:
        """Estimated seconds until the last cell ends; None while too few steps were timed."""
        steady = [cell.steady() for cell in self._running.values()]
        seconds = self._steady_s + sum(s for s, _ in steady)
        work = self._steady_work + sum(w for _, w in steady)
        if not work or work < self._enough:
            return None
        pace = seconds / work
        starts = self._starts or [r.marks[1][0] - r.begun_s for r in self._running.values() if len(r.marks) > 1]
        start_s = sum(starts) / len(starts) if starts else 0.0
        free = [r.left * pace for r in self._running.values()]
        free += [0.0] * (self._jobs - len(free))
        heapq.heapify(free)
        for left in self._left.values():  # each goes to the worker that is free first
            heapq.heappush(free, heapq.heappop(free) + start_s + left * pace)
        return max(free)

    def __str__(self) -> str:
        left = self.seconds_left()
        return "estimating" if left is None else duration(left)


def step_share(line: str) -> float | None:
    """Finished share of the run according to a console line `step 12/80 ...`; None for other lines."""
    match = _STEP.search(line)
    return int(match[1]) / int(match[2]) if match and int(match[2]) else None
