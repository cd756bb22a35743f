"""Read the progress of a run from its folder in a few milliseconds.

Only the end of metrics.jsonl is parsed; the records of a finished run are checked against its summary. This module does
not import torch.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headway.launcher.base.errors import PREEMPTED
from headway.launcher.run.record_check import check_records
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.launcher.run.tail import end_of_records, is_number

State = Literal["done", "running", "partial", "failed", "damaged"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Progress of a run: `step` of `steps` and `tokens` are done. `validation_loss`: newest recorded value in nats per
    token, of step `validation_step`; None if the end of the records has none.
    """

    state: State
    step: int
    steps: int | None
    tokens: int
    validation_loss: float | None
    validation_step: int | None


def run_state(run: RunDir) -> RunState:
    """Read the state from a run folder. Missing or damaged values are None or 0."""
    summary = read_mapping(run.summary)
    step, tokens, loss, at = end_of_records(run.metrics)
    complete = summary.get("complete") is True
    if complete and is_number(summary.get("final_validation_loss")):
        loss, at = float(summary["final_validation_loss"]), step
    if complete and check_records(run.path).damage:
        state: State = "damaged"
        loss = at = None  # the summary or the records are not those of this run
    elif complete:
        state = "done"
    elif held_by_live_process(run.path):
        state = "running"
    else:
        state = "failed" if _failed(run) else "partial"
    steps = _steps(read_mapping(run.spec))
    return RunState(state=state, step=step, steps=steps, tokens=tokens, validation_loss=loss, validation_step=at)


def held_by_live_process(run_dir: Path, lock: str = "run.lock") -> bool:
    """Whether a process on this host holds the lock of the folder.

    This reads the process id of the holder and does not acquire the lock, so that it can never block a run.
    """
    try:
        pid, _, host = (run_dir / lock).read_text().partition(" on ")
        if host not in ("", socket.gethostname()[:64]):
            return False  # processes of another host are not visible here
        return _has_open(int(pid), run_dir / lock)
    except (OSError, ValueError):
        return False


def _has_open(pid: int, file: Path) -> bool:
    """Whether a process has a file open. After a kill, the lock still names a process, and another one may have its id.

    Of a process of another user, whose files are not visible, its command line is read instead. Raises OSError.
    """
    wanted = file.stat()
    try:
        with os.scandir(f"/proc/{pid}/fd") as descriptors:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    if os.path.samestat(descriptor.stat(), wanted):
                        return True
        return False
    except PermissionError:
        return b"headway" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _steps(spec: dict[str, Any]) -> int | None:
    train, data = spec.get("train"), spec.get("data")
    if not isinstance(train, dict) or not isinstance(data, dict):
        return None
    given = [train.get("tokens"), train.get("global_batch"), data.get("seq_len")]
    numbers = [number for number in given if isinstance(number, int) and number > 0]
    if len(numbers) < 3:
        return None
    tokens, batch, length = numbers
    return -(-tokens // (batch * length))


def _failed(run: RunDir) -> bool:
    """Whether the newest start ended with a fault and no restart followed (logs/attempts.jsonl)."""
    try:
        *_, last = (run.logs / "attempts.jsonl").read_bytes().splitlines()
        fault = json.loads(last)
        started = read_mapping(run.card)["attempts"][-1]["started_at"]
        again, code = fault["started_again"], fault["exit"]
        return not again and code not in (0, PREEMPTED) and _seconds(fault["time"]) >= _seconds(started)
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError):
        return False


def _seconds(text: str) -> int:
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))
