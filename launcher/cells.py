"""The cells of a study: what state each is in, and running one as a child process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from headway.launcher.records import last_progress, read_json

State = Literal["done", "running", "partial", "failed", "missing"]

OUTCOMES = "outcomes.json"
"""File in the study's folder: cell key -> exit code, last lines and times of its latest attempt."""

PREEMPTED = 75

_STEP = re.compile(r"\bstep +(\d+)/(\d+)\b")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class CellState:
    """`tokens` done, `loss` the last training loss (nats per token), `detail` why a cell failed."""

    state: State
    tokens: int = 0
    loss: float | None = None
    detail: str = ""


def cell_state(run_dir: Path, outcome: dict[str, Any] | None) -> CellState:
    """State of a cell from its run folder and the outcome of its latest attempt."""
    tokens, loss = last_progress(run_dir)
    if read_json(run_dir / "summary.json").get("complete") is True:
        return CellState(state="done", tokens=tokens, loss=loss)
    if _held_by_live_process(run_dir):
        return CellState(state="running", tokens=tokens, loss=loss)
    if outcome and outcome.get("exit_code") not in (0, PREEMPTED):
        return CellState(state="failed", tokens=tokens, loss=loss, detail=failure(outcome))
    return CellState(state="partial" if tokens else "missing", tokens=tokens, loss=loss)


def failure(outcome: dict[str, Any]) -> str:
    """One line: exit code or signal, and the line that best says why."""
    code, lines = outcome.get("exit_code"), [str(line).strip() for line in outcome.get("last_lines", [])]
    told = [line for line in lines if "error" in line.lower()] or [line for line in lines if line]
    how = f"signal {-code}" if isinstance(code, int) and code < 0 else f"exit code {code}"
    return f"{how}: {told[-1][:300]}" if told else how


def _held_by_live_process(run_dir: Path) -> bool:
    # Reading the holder's id, and not trying the lock, so that looking at a study can never keep a run out.
    try:
        pid, _, host = (run_dir / "run.lock").read_text().partition(" on ")
        if host not in ("", socket.gethostname()[:64]):
            return False  # its processes cannot be seen from here
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


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
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
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


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
