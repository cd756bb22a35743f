"""The ranks of this host, seen from outside: which have ended, which hangs, what their stacks say."""

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

# In a stack: a rank that waits for others, and so is not the one they all wait for.
_WAITS = re.compile(r'File "[^"]*/(torch/distributed|deepspeed/comm)/')


class Child(Protocol):
    """What the launcher of a host has started around its ranks: leader of a process group of its own."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


class Watch:
    """The ranks of this host, seen from outside."""

    def __init__(self, run: RunDir, place: Place, hang_s: float) -> None:
        self.died: dict[int, int | None] = {}
        self.memory = MemoryWatch()
        self._run, self._place, self._hang_s = run, place, hang_s
        self._probe = run.logs / f"host-{place.host}.beat"
        can_beat(self._probe)  # it must stand there before the disk is full, as the ranks' beats do
        self._seen: dict[int, int] = {}

    def live(self) -> dict[int, int]:
        """Rank -> process id of those that run now."""
        return {rank: pid for rank in self._place.ranks if (pid := live_pid(self._run, rank)) is not None}

    def note_deaths(self) -> None:
        """Remember in which order ranks ended, and how."""
        live = self.live()
        for rank, pid in self._seen.items():
            if rank not in live and rank not in self.died:
                self.died[rank] = status(pid)
        for pid in set(live.values()) - set(self._seen.values()):
            self.memory.note(pid)
        self._seen |= live

    def broken(self) -> bool:
        """Whether a rank has ended that should not have, or has said that it failed."""
        reported = any((self._run.logs / f"rank-{rank}.error.json").exists() for rank in self.died)
        silent = any(self._beats().get(rank, _NO_BEAT).section != "finish" for rank in self.died)
        return bool(self.died) and (reported or silent)

    def hung(self, now: float) -> Beat | None:
        """The beat of a rank that is overdue."""
        live = self.live()
        overdue = [b for r, b in self._beats().items() if r in live and self._late_s(b, now) > 0]
        # Nobody hangs for a disk that takes no beats: the training goes on, and only its signs cannot be seen.
        return min(overdue, key=lambda b: b.time_s) if overdue and can_beat(self._probe) else None

    def find_culprit(self, hung: Beat | None) -> Fault:
        """Show the stacks of all live ranks in their logs, and say which one the others wait for.

        `hung`: the beat that was overdue; None where others ended and these did not.
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
            return Fault(text=f"the ranks on {self._place.name} ended without a word", weight=CONSEQUENCE, again=True)
        rank = max(marks, key=lambda r: marks[r])
        evidence, beat = marks[rank][0], beats.get(rank)
        lines = [f"rank {rank} (process {live[rank]}) on {self._place.name} hangs: {_EVIDENCE[evidence]}"]
        if beat is not None:
            lines[0] += f"; no sign of it for {now - beat.time_s:.0f} s, since {beat.section} of step {beat.step}"
        if hung is not None:
            limit = allowed_s(hung.section, self._hang_s)
            lines[0] += f" (limit {limit:.0f} s in {hung.section}: launch.hang_s)"
        text = "".join(stacks[rank].partition("Current thread")[1:]).splitlines()[:12]
        log = self._run.logs / f"rank-{rank}.log"
        lines += quoted(["stack:", *text] if text else tail(log))
        lines.append(f"full logs with the stacks of all ranks are in {self._run.logs}; {CONTINUES}")
        # One that is merely busy after another has ended may be tidying up.
        sure = evidence > (0 if hung is not None else 1)
        return Fault(text="\n".join(lines), weight=CAUSE if sure else CONSEQUENCE, again=True)

    def end_all(self, child: Child) -> None:
        """Kill what is left of this host's processes, ranks first, and wait until they are gone."""
        end = time.monotonic() + 10
        while (live := self.live()) and time.monotonic() < end:
            for pid in live.values():
                send(pid, signal.SIGKILL)
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with what a launcher that has ended itself left behind
        child.wait()

    def signal_ranks(self, child: Child, signum: int) -> None:
        """To the ranks, or to the child where there are none yet."""
        for pid in self.live().values() or [child.pid]:
            send(pid, signum)

    def ask_stacks(self) -> None:
        """Let all ranks write where they are into their logs."""
        for pid in self.live().values():
            send(pid, STACKS)

    def _beats(self) -> dict[int, Beat]:
        found = {rank: read_beat(beat_file(self._run.logs, rank)) for rank in self._place.ranks}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    def _late_s(self, beat: Beat, now: float) -> float:
        return now - beat.time_s - allowed_s(beat.section, self._hang_s)

    def _stacks(self, live: Mapping[int, int]) -> dict[int, str]:
        """What each rank writes into its log when it is asked where it is; empty for one that does not react."""
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
    0: "it waits for other ranks, as they all do, and has done so the longest",
    1: "it is busy with something else than the others wait for",
    2: "it does not react to signals",
    3: "it is stopped (SIGSTOP, or a debugger)",
}


def _evidence(pid: int, stacks: str) -> int:
    """How surely the process is the one that the others wait for: a key of _EVIDENCE."""
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
