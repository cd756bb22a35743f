"""See the processes of this host through: pass signals on, notice ranks that die or hang, end all within a bound."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from headway.launcher.hosts.faults import (
    CAUSE,
    CONSEQUENCE,
    CONTINUES,
    Ended,
    Fault,
    explain,
    host_log,
    quoted,
    stopped,
    tail,
)
from headway.launcher.hosts.forked import VARIABLE as FORK_SERVER
from headway.launcher.hosts.forked import Forked
from headway.launcher.hosts.oom import MemoryWatch
from headway.launcher.hosts.place import Place
from headway.launcher.hosts.processes import STOPPED, become_child, live_pid, send, state, status
from headway.launcher.hosts.restarts import Restarts
from headway.launcher.run.heartbeat import STACKS, Beat, allowed_s, beat_file, can_beat, read_beat
from headway.launcher.run.run_dir import RunDir

_POLL_S, _WATCH_S = 0.1, 0.5
_LEAVE_S = 10.0  # what the others have to end by themselves once a rank has ended in failure
_STACKS_S = 2.0

# In a stack: a rank that waits for others, and so is not the one they all wait for.
_WAITS = re.compile(r'File "[^"]*/(torch/distributed|deepspeed/comm)/')


class Control(Protocol):
    """What connects the launchers of a run. With one host nobody is at the other end."""

    def wait(self, seconds: float) -> Fault | None:
        """Let `seconds` pass; why all must end, as soon as it is known."""
        ...

    def settle(self, own: Fault | None) -> Fault | None:
        """Say how this host ended (None: well); how the run ended, which is the same on every host."""
        ...


class Child(Protocol):
    """What the launcher of a host has started around its ranks: leader of a process group of its own."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


class Alone:
    """Control of a run on one host."""

    def __init__(self, restarts: Restarts) -> None:
        self._restarts = restarts

    def wait(self, seconds: float) -> Fault | None:
        time.sleep(seconds)
        return None

    def settle(self, own: Fault | None) -> Fault | None:
        return self._restarts.grant(own)


def supervise(
    run: RunDir,
    place: Place,
    control: Control,
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    hang_s: float,
    stop_s: float,
) -> int:
    """Run `command` to its end; returns 0 when every host came to a good one.

    Raises Ended with the cause and its exit status otherwise, when no rank is left on this host.
    """
    run.logs.mkdir(parents=True, exist_ok=True)
    for rank in place.ranks:
        for suffix in ("error.json", "pid", "beat"):
            (run.logs / f"rank-{rank}.{suffix}").unlink(missing_ok=True)
    child = _start(run, place, command, {**env, "HEADWAY_LAUNCHER_PID": str(os.getpid())})
    watch = Watch(run, place, hang_s)
    try:
        with _forwarding(child, watch) as stop:
            fault = _see_through(run, place, child, watch, control, stop, stop_s)
            if child.returncode != 0 and (fault is None or fault.weight == CONSEQUENCE):
                status = child.returncode if fault is None else None
                told = explain(run, place, status, signalled=stop.asked, died=watch.died, memory=watch.memory)
                fault = told if fault is None or told.weight > CONSEQUENCE else fault
            if fault is not None and stop.asked:
                fault = replace(fault, again=False)
            verdict = control.settle(fault)
    finally:
        watch.end_all(child)
        watch.memory.close()
    if verdict is not None:
        raise Ended(verdict)
    return 0


def _start(run: RunDir, place: Place, command: Sequence[str], env: Mapping[str, str]) -> Child:
    server = os.environ.get(FORK_SERVER)
    with host_log(run, place.host).open("wb") as log:
        if server is not None and place.hosts == 1 and "deepspeed.launcher.runner" not in command:
            worker = ["headway.launcher.train.worker", str(run.path.resolve())]
            return Forked.ranks(server, worker, place.processes, env, log.fileno())
        return subprocess.Popen(
            list(command),
            env=env,
            stdin=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on in order
            preexec_fn=become_child,
        )


def _see_through(
    run: RunDir, place: Place, child: Child, watch: Watch, control: Control, stop: _Stop, stop_s: float
) -> Fault | None:
    """Until the child has ended, by itself or by us; the fault if that was seen here."""
    looked = failed = 0.0
    while child.poll() is None:
        if control.wait(_POLL_S) is not None:
            watch.end_all(child)
            return None
        watch.note_deaths()
        now = time.monotonic()
        if stop.at_once or (stop.asked and now - stop.since_s > stop_s):
            watch.end_all(child)
            return _cut_short(run, place, stop, stop_s)
        if now - looked < _WATCH_S:
            continue
        looked = now
        failed = failed or (now if watch.died else 0.0)
        hung = watch.hung(now)
        # A launcher may wait half a minute for a stopped process to heed its SIGTERM, and longer for one that cannot.
        if hung is None and not (watch.broken() and now - failed > _LEAVE_S):
            continue
        fault = watch.find_culprit(hung)
        watch.end_all(child)
        return fault
    return None


def _cut_short(run: RunDir, place: Place, stop: _Stop, stop_s: float) -> Fault:
    why = "at a second Ctrl-C" if stop.at_once else f"{stop_s:g} s after the signal (launch.stop_s)"
    return stopped(run, place, f"and the ranks were killed {why}: they had not saved and ended yet")


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


@dataclass
class _Stop:
    """Whether somebody has asked the run to end."""

    asked: bool = False
    at_once: bool = False
    since_s: float = 0.0


@contextlib.contextmanager
def _forwarding(child: Child, watch: Watch) -> Iterator[_Stop]:
    """At SIGTERM, SIGINT, SIGHUP and SIGUSR1 let the ranks save and stop, at a second SIGINT end them at once; at
    SIGUSR2 let them write their stacks into their logs.
    """
    stop = _Stop()

    def forward(signum: int, frame: Any) -> None:
        stop.at_once = stop.asked and signum == signal.SIGINT
        stop.since_s = stop.since_s or time.monotonic()
        stop.asked = True
        with contextlib.suppress(OSError):
            print("stopping: the ranks finish their step and save ...", file=sys.stderr, flush=True)
        watch.signal_ranks(child, signal.SIGTERM)

    handlers: dict[signal.Signals, Any] = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), forward)
    handlers[STACKS] = lambda *_: watch.ask_stacks()
    # SIGHUP: the terminal or connection has gone; under nohup it is ignored, and stays so.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        handlers[signal.SIGHUP] = forward
    old = {s: signal.signal(s, handler) for s, handler in handlers.items()}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
