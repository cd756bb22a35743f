"""Determine why a run ended: from the error reports of ranks, or from exit statuses and logs if a report is missing."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headway.launcher.base.errors import PREEMPTED, HeadwayError
from headway.launcher.hosts.oom import MemoryWatch
from headway.launcher.hosts.place import Place
from headway.launcher.run.heartbeat import beat_file, read_beat
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.parallel.manifest import step_of, steps_on_disk

ATTEMPT = "=== attempt of "
CONTINUES = "the same command continues from the last checkpoint"

_WITHIN_STEP = ("data", "first step", "step")  # sections of a step that is not finished

# How much a fault explains. The hosts of a run compare their faults: a cause takes precedence over its consequences.
CONSEQUENCE, STOPPED, CAUSE = 1, 2, 3

# Exit statuses that a rank sets deliberately. They count even if the rank could not write its report.
_EXIT_CODES = (64, 65, 66, 70, 74, 75)

# Errors that a rank reports when it loses the connection to another rank: a consequence, not a cause.
_PEER_LOST = re.compile(
    r"onnection (was likely )?(reset|closed|refused)|Broken pipe|failed to recv, got 0 bytes|gloo/transport|"
    r"NCCL.*remote|Timed out waiting \d+ms|timed out after \d+ seconds|Watchdog caught collective|No route to host|"
    r"Connection timed out|wait timeout after",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why the ranks of a host ended.

    `weight`: CONSEQUENCE, STOPPED (a regular stop after a signal) or CAUSE. `again`: a restart may help, for example
    after the death of a process, but not after a mistake in the spec.
    """

    text: str
    code: int = HeadwayError.exit_code
    weight: int = CAUSE
    again: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Fault:
        code, weight = int(value["code"]), int(value["weight"])
        return cls(text=str(value["text"]), code=code, weight=weight, again=value["again"] is True)


class Ended(HeadwayError):
    """The run ended before its last step. Carries the exit status of the launcher."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.text)
        self.fault, self.exit_code = fault, fault.code


def explain(
    run: RunDir,
    place: Place,
    status: int | None,
    *,
    signalled: bool,
    died: Mapping[int, int | None],
    memory: MemoryWatch | None = None,
) -> Fault:
    """Returns why the processes of this host ended with `status` (None: this launcher killed them).

    `died`: rank -> exit status (None if unknown), in the order in which the ranks were seen to end. `memory` knows
    which processes the kernel killed because memory ran out.
    """
    files = [path for rank in place.ranks if (path := run.logs / f"rank-{rank}.error.json").exists()]
    files.sort(key=lambda path: path.stat().st_mtime)
    # On a full disk, a report can be truncated or empty.
    reports = [r for r in map(read_mapping, files) if _is_report(r)]
    known = [r for r in reports if isinstance(r.get("exit_code"), int)]
    if known:
        first = known[0]
        weight = STOPPED if first["exit_code"] == PREEMPTED else CAUSE
        return Fault(text=f"rank {first['rank']}: {first['message']}", code=first["exit_code"], weight=weight)
    causes = [r for r in reports if not _PEER_LOST.search(r["message"]) and r["type"] != "KeyboardInterrupt"]
    if signalled and not causes:
        return stopped(run, place, "before the ranks could save")
    killed = [] if causes else _killed_ranks(run, place, status, reports, died)
    lines = []
    for rank, pid, code in killed:
        short = memory.reason(int(pid)) if memory is not None and code in (None, -9) and pid.isdigit() else None
        lines.append(f"rank {rank} (process {pid}) on {place.name} {_how(code)}{f': {short}' if short else ''}")
        lines += quoted(tail(run.logs / f"rank-{rank}.log"))
    for r in [] if killed else (causes or reports)[:1]:
        lines.append(f"rank {r['rank']} on {place.name} failed: {r['type']}: {r['message']}")
        lines += quoted(tail(run.logs / f"rank-{r['rank']}.log"))
    if not lines:
        lines = [f"the processes on {place.name} ended with status {status}", *tail(host_log(run, place.host))]
    lines.append(f"full logs are in {run.logs}; {CONTINUES}")
    told = next((code for *_, code in killed if code in _EXIT_CODES), None)
    weight = CAUSE if killed or causes else CONSEQUENCE
    # An error before the first step would occur again: a missing device, a model that does not fit in memory.
    again = told is None and not signalled and (not causes or _has_stepped(run, place))
    return Fault(text="\n".join(lines), code=told or HeadwayError.exit_code, weight=weight, again=again)


def stopped(run: RunDir, place: Place, how: str) -> Fault:
    """The fault of a run that was stopped by a signal, if no rank reports that it has saved. `how`: for the message.

    The exit status is PREEMPTED only if no step is lost.
    """
    saved, done = _saved_and_done(run, place)
    lost = f"steps {saved + 1} to {done} are lost, and" if done > saved else "no step is lost, and"
    text = f"stopped by a signal, {how}; {lost} the same command continues from step {saved}"
    return Fault(text=text, code=HeadwayError.exit_code if done > saved else PREEMPTED, weight=STOPPED)


def _saved_and_done(run: RunDir, place: Place) -> tuple[int, int]:
    """The step of the newest checkpoint, and the last step that a rank of this host has finished in this start."""
    saved = max((step_of(path) for path in steps_on_disk(run.checkpoints)), default=0)
    beats = [beat for rank in place.ranks if (beat := read_beat(beat_file(run.logs, rank))) is not None]
    return saved, max((b.step - (b.section in _WITHIN_STEP) for b in beats), default=0)


def _has_stepped(run: RunDir, place: Place) -> bool:
    """Whether a rank of this host has finished a step in this start."""
    beats = [read_beat(beat_file(run.logs, rank)) for rank in place.ranks]
    return any(beat is not None and beat.section not in ("setup", "data", "first step") for beat in beats)


def _is_report(value: dict[str, Any]) -> bool:
    """Whether `value` has all fields of a rank's report, with the right types."""
    kinds = {"rank": int, "type": str, "message": str}
    return all(isinstance(value.get(key), kind) for key, kind in kinds.items())


def host_log(run: RunDir, host: int) -> Path:
    """Path of the output of torchrun or DeepSpeed's launcher on a host."""
    return run.logs / f"host-{host}.log"


def read_pid(run: RunDir, rank: int) -> str:
    """Process id that a rank wrote to its file; "unknown" if the file cannot be read."""
    try:
        return (run.logs / f"rank-{rank}.pid").read_text(errors="replace").strip()[:20]
    except OSError:
        return "unknown"


def tail(path: Path, lines: int = 12) -> list[str]:
    """Last lines of a log, from its latest attempt only."""
    try:
        # Logs of earlier attempts stay in the file; each begins with this line.
        return path.read_text(errors="replace").split(ATTEMPT)[-1].splitlines()[-lines:]
    except OSError:
        return []


def quoted(lines: Sequence[str]) -> list[str]:
    """Format lines of a log for a message."""
    return [f"  | {line}" for line in lines]


def _killed_ranks(
    run: RunDir, place: Place, status: int | None, reports: list[Any], died: Mapping[int, int | None]
) -> list[tuple[int, str, int | None]]:
    """(rank, process, status) of ranks that ended without an error report."""
    told = {r.get("rank") for r in reports}
    if len(place.ranks) == 1 and (status is not None or died):
        rank = place.ranks[0]
        text = host_log(run, place.host)
        code = next((c for r, _, c in _in_log(text) if r == rank), _decoded(status))
        return [] if rank in told else [(rank, read_pid(run, rank), code)]
    found = [f for f in _in_log(host_log(run, place.host)) if f[0] not in told]
    if not found:  # some launchers do not report which process failed
        silent = [rank for rank in died if rank not in told]
        passed_on = None if told else _decoded(status)  # with a report, `status` may belong to the rank that reported
        return [(rank, read_pid(run, rank), died[rank] or passed_on) for rank in silent[:1]]
    # torchrun ends the surviving ranks with SIGTERM; they are not the cause.
    return [f for f in found if f[2] != -signal.SIGTERM] or found


def _in_log(path: Path) -> list[tuple[int, str, int | None]]:
    """(rank, process, status) of failed ranks, from torchrun's output."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    pattern = r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+) \(pid: (\d+)\)"
    return [(int(rank), pid, int(code)) for rank, code, pid in re.findall(pattern, text)]


def _decoded(status: int | None) -> int | None:
    """Decode an exit status that torchrun or DeepSpeed's launcher forwards: its sys.exit(-9) arrives as 247."""
    return status - 256 if status is not None and status > 192 else status


def _how(code: int | None) -> str:
    if code is None:
        return "ended without an error report"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with status {code}"
