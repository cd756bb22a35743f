"""Run the cells of a study as child processes, one after another."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.command import die_with_parent
from headway.launcher.base.signals import put_back, say, stop_signals
from headway.launcher.base.text import duration

_STEP = re.compile(r"\bstep +(\d+)/(\d+)\b")


ENOUGH = 0.05
"""Minimum share of the longest cell whose steps must be timed before an estimate of the remaining time is shown."""


class Eta:
    """Estimated seconds until the last cell ends, from the steps of this invocation. A token counts alike in all cells.

    The start of a process and its first steps are slower than the later steps. The pace of a cell is therefore measured
    from its second console line on. The start-up time is added once for each remaining cell.
    """

    def __init__(self, cells: Sequence[float], clock: Callable[[], float] = time.monotonic) -> None:
        """`cells`: tokens that each cell has yet to train, in the order in which they run."""
        self._left, self._clock = deque(cells), clock
        self._enough = ENOUGH * max(cells, default=0.0)
        self._steady_s = self._steady_tokens = 0.0  # sums over finished cells
        self._starts: list[float] = []  # seconds of each finished cell outside its steady steps
        self._begun_s = clock()
        self._marks: list[tuple[float, float]] = []  # (time, tokens done) at the console lines of the running cell
        self._running = False
        self._before = self._total = 0.0

    def begin(self, done: float, total: float) -> None:
        """Record the start of a cell, of whose `total` tokens `done` were trained earlier or by another run."""
        self._begun_s, self._marks, self._running, self._before = self._clock(), [], True, done
        self._total = total

    def step(self, done: float) -> None:
        """Record that the running cell has trained `done` tokens, with those before it began."""
        if not self._marks or done > self._marks[-1][1]:
            self._marks.append((self._clock(), done))

    def end(self) -> None:
        """Record the end of the cell whose turn it is, after success or failure, or without a start."""
        seconds, tokens = self._steady()
        took = self._clock() - self._begun_s
        if not tokens and self._marks:  # fewer than two console lines: use the whole duration
            seconds, tokens = took, self._marks[-1][1] - self._before
        if tokens > 0:
            self._steady_s += seconds
            self._steady_tokens += tokens
            self._starts.append(took - seconds)
        self._left.popleft()
        self._marks, self._running = [], False

    def seconds_left(self) -> float | None:
        """Estimated seconds until the last cell ends; None while too few steps were timed."""
        seconds, tokens = self._steady()
        seconds, tokens = seconds + self._steady_s, tokens + self._steady_tokens
        if not tokens or tokens < self._enough:
            return None
        token_s, running, others = seconds / tokens, 0.0, list(self._left)
        starts = self._starts
        if self._running:
            others = others[1:]
            done = self._marks[-1][1] if self._marks else self._before
            running = (self._total - done) * token_s
            starts = starts or [self._marks[1][0] - self._begun_s]
        return running + sum(others) * token_s + len(others) * sum(starts) / len(starts)

    def __str__(self) -> str:
        left = self.seconds_left()
        return "estimating" if left is None else duration(left)

    def _steady(self) -> tuple[float, float]:
        """(seconds, tokens) between the second and the last console line of the running cell."""
        if len(self._marks) < 3:
            return 0.0, 0.0
        (begin_s, begin), (end_s, end) = self._marks[1], self._marks[-1]
        return end_s - begin_s, end - begin


class CellRunner:
    """Run commands one after another. Within its context, the signals of `stop_signals` stop the study.

    They send SIGTERM to the child, which saves a checkpoint and exits with status 75. A second SIGINT kills the child.
    Other signals may arrive any number of times: a closed terminal or a batch system sends several.
    """

    def __init__(self) -> None:
        self.stopping = False
        self._child: subprocess.Popen[str] | None = None
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> CellRunner:
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._on_signal) for s in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        put_back(self._old, stopped=self.stopping)

    def run(
        self,
        command: Sequence[str],
        *,
        log: Path,
        show: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run a command to its end and return the outcome record. Every line of output goes to `log` and to `show`.

        `environment` is added to that of this process.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        last: deque[str] = deque(maxlen=20)
        started = time.monotonic()
        with log.open("a", encoding="utf-8") as file:
            self._child = child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env={
                    **console.plain_environment(),
                    "PYTHONUNBUFFERED": "1",
                    "PYTHONSAFEPATH": "1",
                    **(environment or {}),
                },
                start_new_session=True,  # Ctrl-C in the terminal must reach the child only once, through this process
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
            )
            if self.stopping:  # a signal arrived between the last check and the start
                child.terminate()

            def read() -> None:
                assert child.stdout is not None
                for line in child.stdout:
                    file.write(line)
                    file.flush()
                    last.append(line.rstrip())
                    show(line.rstrip())

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            code = child.wait()
            reader.join(timeout=10)  # an orphaned grandchild may keep the pipe open forever
            self._child = None
        return {
            "exit_code": code,
            "wall_s": round(time.monotonic() - started, 3),
            "ended_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "last_lines": list(last),
            "log": str(log),
        }

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        again, self.stopping = self.stopping, True
        child = self._child
        if child is None or child.returncode is not None:
            return
        if not again:
            say(f"{signal.Signals(number).name}: the running cell stops; Ctrl-C once more kills it")
        if not again or number != signal.SIGINT:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def step_share(line: str) -> float | None:
    """Finished share of the run according to a console line `step 12/80 ...`; None for other lines."""
    match = _STEP.search(line)
    return int(match[1]) / int(match[2]) if match and int(match[2]) else None
