"""Supervise the ranks of this host: forward signals, detect ranks that die or hang, end all within a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from headway.launcher.base.signals import put_back, say, stop_signals
from headway.launcher.hosts.faults import CONSEQUENCE, Ended, Fault, explain, host_log, stopped
from headway.launcher.hosts.forked import VARIABLE as FORK_SERVER
from headway.launcher.hosts.forked import Forked
from headway.launcher.hosts.place import Place
from headway.launcher.hosts.processes import become_child
from headway.launcher.hosts.restarts import Restarts
from headway.launcher.hosts.watch import Child, Watch
from headway.launcher.run.heartbeat import STACKS
from headway.launcher.run.run_dir import RunDir

_POLL_S, _WATCH_S = 0.1, 0.5
_LEAVE_S = 10.0  # after a rank has failed, the others have this long to end by themselves


class Control(Protocol):
    """The connection between the launchers of a run. A run on one host has no other launcher (see `Alone`)."""

    def wait(self, seconds: float) -> Fault | None:
        """Wait `seconds`. Returns early with the fault if all hosts must end, else None."""
        ...

    def settle(self, own: Fault | None) -> Fault | None:
        """Report how this host ended (None: without a fault). Returns how the run ended, the same on every host."""
        ...


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
    """Run `command` until it ends. Returns 0 if all hosts ended without a fault.

    Otherwise raises Ended with the cause and its exit status, after all ranks of this host have ended.
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
            with contextlib.suppress(OSError, ValueError):  # no server answers: the ranks start cold
                return Forked.ranks(server, worker, place.processes, env, log.fileno())
        return subprocess.Popen(
            list(command),
            env=env,
            stdin=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches only the launcher, which forwards it to the ranks
            preexec_fn=become_child,
        )


def _see_through(
    run: RunDir, place: Place, child: Child, watch: Watch, control: Control, stop: _Stop, stop_s: float
) -> Fault | None:
    """Wait until the child has ended by itself or was killed here. Returns the fault if it was detected here."""
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
        # Do not wait for torchrun or DeepSpeed's launcher: after SIGTERM it gives its processes half a minute or more.
        if hung is None and not (watch.broken() and now - failed > _LEAVE_S):
            continue
        fault = watch.find_culprit(hung)
        watch.end_all(child)
        return fault
    return None


def _cut_short(run: RunDir, place: Place, stop: _Stop, stop_s: float) -> Fault:
    why = "at a second Ctrl-C" if stop.at_once else f"{stop_s:g} s after the signal (launch.stop_s)"
    return stopped(run, place, f"and the ranks were killed {why}, before they had saved and ended")


@dataclass
class _Stop:
    """Whether a signal has asked the run to end."""

    asked: bool = False
    at_once: bool = False
    since_s: float = 0.0


@contextlib.contextmanager
def _forwarding(child: Child, watch: Watch) -> Iterator[_Stop]:
    """Handle signals while ranks run.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1: the ranks save and stop. A second SIGINT: the ranks are killed at once.
    SIGUSR2: the ranks write their stacks to their logs.
    """
    stop = _Stop()

    def forward(signum: int, frame: Any) -> None:
        stop.at_once = stop.asked and signum == signal.SIGINT
        stop.since_s = stop.since_s or time.monotonic()
        if not stop.asked:
            say("stopping: the ranks finish their step and save ...")
        stop.asked = True
        watch.signal_ranks(child, signal.SIGTERM)

    handlers: dict[signal.Signals, Any] = dict.fromkeys(stop_signals(), forward)
    handlers[STACKS] = lambda *_: watch.ask_stacks()
    old = {s: signal.signal(s, handler) for s, handler in handlers.items()}
    try:
        yield stop
    finally:
        put_back(old, stopped=stop.asked)
