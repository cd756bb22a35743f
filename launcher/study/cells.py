"""Running the cells of a study as child processes, one after another."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from headway.launcher.base.command import die_with_parent

_STEP = re.compile(r"\bstep +(\d+)/(\d+)\b")


class Eta:
    """Seconds until the last cell ends, from the pace of this invocation. Cells count as equally long."""

    def __init__(self, cells: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._cells, self._clock, self._start = cells, clock, clock()
        self._finished, self._before, self._now = 0, 0.0, 0.0
        self._skipped = 0.0

    def begin(self, share_done: float) -> None:
        """A cell starts, `share_done` (0..1) of it trained earlier."""
        self._before = self._now = share_done

    def step(self, share_done: float) -> None:
        self._now = max(self._now, share_done)

    def end(self) -> None:
        self._finished += 1
        self._skipped += self._before
        self._before = self._now = 0.0

    def seconds_left(self) -> float | None:
        """None until 2 % of one cell is done: before that the start-up of the process is all there is to see."""
        done = self._finished - self._skipped + self._now - self._before
        if done < 0.02:
            return None
        left = self._cells - self._finished - self._now
        return (self._clock() - self._start) / done * left


class CellRunner:
    """Runs commands one after another; while it is entered, SIGINT and SIGTERM go to the child and stop the study.

    The first signal asks the child to stop (SIGTERM: it saves a checkpoint and ends with 75), the second one kills it.
    """

    def __init__(self) -> None:
        self.stopping = False
        self._child: subprocess.Popen[str] | None = None
        self._signals = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> CellRunner:
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], *, log: Path, show: Callable[[str], None]) -> dict[str, Any]:
        """Run to its end; every line of output goes to `log` and to `show`. Returns the outcome record."""
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
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"},
                start_new_session=True,  # a Ctrl-C in the terminal must reach it once, through us
                preexec_fn=partial(die_with_parent, signal.SIGTERM),
            )
            if self.stopping:  # a signal came between the last check and the start
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
            reader.join(timeout=10)  # a stray grandchild may hold the pipe open for ever
            self._child = None
        return {
            "exit_code": code,
            "wall_s": round(time.monotonic() - started, 3),
            "ended_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "last_lines": list(last),
            "log": str(log),
        }

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.stopping = True
        self._signals += 1
        child = self._child
        if child is None or child.poll() is not None:
            return
        if self._signals == 1:
            print(f"{signal.Signals(number).name}: the running cell stops; once more kills it", flush=True)
            child.terminate()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def step_share(line: str) -> float | None:
    """Share of the run that a console line `step 12/80 ...` reports as done; None for other lines."""
    match = _STEP.search(line)
    return int(match[1]) / int(match[2]) if match and int(match[2]) else None
