"""Observe the ranks of this host from the launcher: which have ended, which one hangs, what their stacks show."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from headway.launcher.hosts.faults import CAUSE, CONSEQUENCE, CONTINUES, Fault, quoted, tail
from headway.launcher.hosts.oom import MemoryWatch
from headway.launcher.hosts.place import Place
from headway.launcher.hosts.processes import STOPPED, live_pid, send, state, status
from headway.launcher.run.heartbeat import STACKS, Beat, allowed_s, beat_file, can_beat, read_beat
from headway.launcher.run.run_dir import RunDir

_STACKS_S = 2.0

# A stack with this line belongs to a rank that waits for others, so the others do not wait for this rank.
_WAITS = re.compile(r'File "[^"]*/(torch/distributed|deepspeed/comm)/')


class Child(Protocol):
    """The process that the launcher of a host starts, which starts the ranks. It leads its own process group."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


class Watch:
    """Observes the ranks of this host from the launcher: process states, beats and stacks."""

    def __init__(self, run: RunDir, place: Place, hang_s: float) -> None:
        self.died: dict[int, int | None] = {}
        self.memory = MemoryWatch()
        self._run, self._place, self._hang_s = run, place, hang_s
        self._probe = run.logs / f"host-{place.host}.beat"
        can_beat(self._probe)  # create the file before the disk is full, as the ranks do with theirs
        self._seen: dict[int, int] = {}

    def live(self) -> dict[int, int]:
        """Rank -> process id of the ranks that run now."""
        return {rank: pid for rank in self._place.ranks if (pid := live_pid(self._run, rank)) is not None}

    def note_deaths(self) -> None:
        """Record the order in which ranks ended, and their exit statuses."""
        live = self.live()
        for rank, pid in self._seen.items():
            if rank not in live and rank not in self.died:
                self.died[rank] = status(pid)
        for pid in set(live.values()) - set(self._seen.values()):
            self.memory.note(pid)
        self._seen |= live

    def broken(self) -> bool:
        """Whether a rank has ended too early, or has reported a failure."""
        reported = any((self._run.logs / f"rank-{rank}.error.json").exists() for rank in self.died)
        silent = any(self._beats().get(rank, _NO_BEAT).section != "finish" for rank in self.died)
        return bool(self.died) and (reported or silent)

    def hung(self, now: float) -> Beat | None:
        """The oldest beat of the live ranks whose beats are overdue; None if no rank hangs."""
        live = self.live()
        overdue = [b for r, b in self._beats().items() if r in live and self._late_s(b, now) > 0]
        # If the disk takes no beats (it is full, for example), an old beat does not show that a rank hangs.
        return min(overdue, key=lambda b: b.time_s) if overdue and can_beat(self._probe) else None

    def find_culprit(self, hung: Beat | None) -> Fault:
        """Let all live ranks write their stacks to their logs. Returns the fault that names the rank others wait for.

        `hung`: the overdue beat; None if other ranks ended and the live ones did not.
        """
        live, now = self.live(), time.monotonic()
        stacks = self._stacks(live)
        beats = self._beats()
        last = max((b.time_s for b in beats.values()), default=now)
        marks = {
            rank: (_evidence(pid, stacks[rank]), last - beats[rank].time_s if rank in beats else 0.0)
            for rank, pid in live.items()
        }
        if not marks:
            text = f"the ranks on {self._place.name} ended without an error report; see the logs in {self._run.logs}"
            return Fault(text=f"{text}; {CONTINUES}", weight=CONSEQUENCE, again=True)
        rank = max(marks, key=lambda r: marks[r])
        evidence, beat = marks[rank][0], beats.get(rank)
        lines = [f"rank {rank} (process {live[rank]}) on {self._place.name} hangs: {_EVIDENCE[evidence]}"]
        if beat is not None:
            last_seen = f"section {beat.section!r} of step {beat.step}"
            lines[0] += f"; no sign of life for {now - beat.time_s:.0f} s, the last in {last_seen}"
        if hung is not None:
            limit = allowed_s(hung.section, self._hang_s)
            lines[0] += f" (limit {limit:.0f} s in section {hung.section!r}, from launch.hang_s)"
        text = "".join(stacks[rank].partition("Current thread")[1:]).splitlines()[:12]
        log = self._run.logs / f"rank-{rank}.log"
        lines += quoted(["stack:", *text] if text else tail(log))
        lines.append(f"full logs with the stacks of all ranks are in {self._run.logs}; {CONTINUES}")
        # If another rank has ended, a rank that is only busy may be cleaning up.
        sure = evidence > (0 if hung is not None else 1)
        return Fault(text="\n".join(lines), weight=CAUSE if sure else CONSEQUENCE, again=True)

    def end_all(self, child: Child) -> None:
        """Kill the remaining processes of this host, ranks first, and wait until they have ended."""
        end = time.monotonic() + 10
        while (live := self.live()) and time.monotonic() < end:
            for pid in live.values():
                send(pid, signal.SIGKILL)
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # includes processes that an already ended torchrun left running
        child.wait()

    def signal_ranks(self, child: Child, signum: int) -> None:
        """Send a signal to the ranks, or to the child if no rank runs yet."""
        for pid in self.live().values() or [child.pid]:
            send(pid, signum)

    def ask_stacks(self) -> None:
        """Let all ranks write their stacks to their logs."""
        for pid in self.live().values():
            send(pid, STACKS)

    def _beats(self) -> dict[int, Beat]:
        found = {rank: read_beat(beat_file(self._run.logs, rank)) for rank in self._place.ranks}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def _late_s(self, beat: Beat, now: float) -> float:
        return now - beat.time_s - allowed_s(beat.section, self._hang_s)

    def _stacks(self, live: Mapping[int, int]) -> dict[int, str]:
        """Rank -> the stacks that it writes to its log on request; empty if it does not respond."""
        logs = {rank: self._run.logs / f"rank-{rank}.log" for rank in live}
        before = {rank: _size(path) for rank, path in logs.items()}
        self.ask_stacks()
        end = time.monotonic() + _STACKS_S
        able = [rank for rank, pid in live.items() if state(pid) not in STOPPED]
        while time.monotonic() < end and any(_size(logs[rank]) == before[rank] for rank in able):
            time.sleep(0.05)
        time.sleep(0.1)
        return {rank: _from(path, before[rank]) for rank, path in logs.items()}


_NO_BEAT = Beat(rank=-1, host="", section="setup", step=0, time_s=0.0)
_EVIDENCE = {
    0: "it waits for other ranks, as all ranks do, and has waited the longest",
    1: "it is busy while the other ranks wait for it",
    2: "it does not respond to signals",
    3: "it is stopped (SIGSTOP, or a debugger)",
}


def _evidence(pid: int, stacks: str) -> int:
    """How strong the evidence is that the other ranks wait for this process: a key of _EVIDENCE."""
    now = state(pid)
    if not now:
        return 0
    if now in STOPPED:
        return 3
    if not stacks.strip():
        return 2
    return 0 if _WAITS.search(stacks) else 1


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _from(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(1 << 20).decode(errors="replace")
    except OSError:
        return ""
