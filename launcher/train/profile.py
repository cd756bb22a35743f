"""Traces of chosen steps by PyTorch's profiler, one file for each rank: `tracking.profile_steps`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headway.launcher.run.run_dir import RunDir
from headway.launcher.train.session import Hook, Session
from headway.launcher.train.tracking import say
from headway.parallel.engine import StepStats

if TYPE_CHECKING:
    from torch.profiler import profile


def trace_file(run: RunDir, step: int, rank: int) -> Path:
    """The trace of a step: JSON of Chrome's trace viewer, which https://ui.perfetto.dev opens, compressed by gzip."""
    return run.traces / f"step-{step}.rank-{rank}.json.gz"


class Profile(Hook):
    """Write a trace of each step of `tracking.profile_steps`, and mark the records of these steps with `profiled`.

    Ranges in the trace: `step N`, and in it `data` (which includes the agreement of the ranks), `forward`, `backward`,
    `optimizer` and `losses`. The time of such a step is longer than that of others, so readers leave it out of speeds.
    """

    def __init__(self) -> None:
        self._steps: frozenset[int] = frozenset()
        self._profiler: profile | None = None
        self._ranges = contextlib.ExitStack()
        self._data = contextlib.ExitStack()

    def on_start(self, s: Session) -> None:
        self._steps = s.spec.tracking.profiled

    def before_data(self, s: Session) -> None:
        if s.step + 1 not in self._steps:
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if s.layout.device.type == "cuda" else [])]
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._ranges.enter_context(torch.profiler.record_function(f"step {s.step + 1}"))
        self._data.enter_context(torch.profiler.record_function("data"))
        s.engine.name_phases(True)

    def before_step(self, s: Session) -> None:
        self._data.close()

    def after_step(self, s: Session, stats: StepStats, record: dict[str, Any]) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        self._ranges.close()
        s.engine.name_phases(False)
        profiler.stop()
        record["profiled"] = True
        s.step_times.pop()  # the time left is estimated from other steps
        path = trace_file(s.run, s.step, s.layout.rank)
        try:
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f".{path.stem}.{os.getpid()}.gz")
            profiler.export_chrome_trace(str(temporary))
            temporary.replace(path)
        except (OSError, RuntimeError) as e:
            say(f"NO TRACE of step {s.step}: {e}; training goes on")

    def on_close(self, s: Session) -> None:
        self._data.close()
        self._ranges.close()
        if self._profiler is not None:  # the step failed
            self._profiler.stop()
