"""Child processes of a study: several at once, each in a session of its own, all stopped by one signal."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from headway.launcher.base import console
from headway.launcher.base.command import COMMAND, die_with_parent
from headway.launcher.base.signals import put_back, say, stop_signals
from headway.launcher.hosts.forked import Forked

POLL_S = 0.05
"""Longest time until the end of a child is noticed. Output is read at once."""

DRAIN_S = 10.0
"""An orphan of a child may hold its output open. What it writes later than this is not waited for."""


@dataclass(kw_only=True, eq=False)
class Child:
    """A running command. `task`: what its caller knows it by. `beside`: most other children at one time.

    `outcome`: the record of its end; empty while it runs.
    """

    task: Any
    process: subprocess.Popen[bytes] | Forked
    log: Path
    file: TextIO
    show: Callable[[str], None]
    output: int
    started_s: float
    beside: int = 0
    ended_s: float | None = None
    outcome: dict[str, Any] = field(default_factory=dict)
    rest: bytes = b""
    last: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    @property
    def lost(self) -> bool:
        """Whether it was stopped because its fork server ended."""
        return isinstance(self.process, Forked) and self.process.lost


class Pool:
    """Runs commands at once. Within its context, the signals of `stop_signals` stop them all.

    They send SIGTERM to each child, which saves a checkpoint and exits with status 75. A second SIGINT kills the
    children. Other signals may arrive any number of times: a closed terminal or a batch system sends several.

    Everything happens in the thread that calls `wait`: no child is forked while another thread holds a lock.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.children: list[Child] = []
        self._selector = selectors.DefaultSelector()
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Pool:
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._on_signal) for s in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        self._end_all()
        self._selector.close()
        put_back(self._old, stopped=self.stopping)

    def start(
        self,
        task: Any,
        command: Sequence[str],
        *,
        log: Path,
        show: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        server: str | None = None,
    ) -> Child:
        """Start a command. Every line of its output goes to `log` and to `show`.

        `environment` is added to that of this process. `server`: socket of a fork server, which forks a command of
        Headway; a server that does not answer is not used.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        reader, writer = os.pipe()
        added = {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", **(environment or {})}
        file = log.open("a", encoding="utf-8")
        started = time.monotonic()
        try:
            process = _forked(command, server, writer, added) or _cold(command, writer, added)
        except BaseException:
            os.close(reader)
            file.close()
            raise
        finally:
            os.close(writer)
        os.set_blocking(reader, False)
        child = Child(task=task, process=process, log=log, file=file, show=show, output=reader, started_s=started)
        self._selector.register(reader, selectors.EVENT_READ, child)
        self.children.append(child)
        for one in self.children:
            one.beside = max(one.beside, len(self.children) - 1)
        if self.stopping:  # a signal arrived between the last check and the start
            _send(child, signal.SIGTERM)
        return child

    def wait(self, seconds: float = 0.0) -> list[Child]:
        """Read output until a child has ended or `seconds` are over (0: no limit). Returns those that have ended."""
        end = time.monotonic() + seconds if seconds else None
        while self.children:
            for key, _ in self._selector.select(POLL_S):
                self._read(key.data)
            if ended := [child for child in self.children if self._has_ended(child)]:
                for child in ended:
                    self._conclude(child)
                return ended
            if end is not None and time.monotonic() >= end:
                break
        return []

    def stop(self) -> None:
        """Ask all children to stop, as a signal does. Does nothing if they are asked already."""
        if self.stopping:
            return
        self.stopping = True
        for child in self.children:
            _send(child, signal.SIGTERM)

    def _read(self, child: Child) -> None:
        """Read what is there. At the end of the output, the descriptor is closed."""
        try:
            data = os.read(child.output, 1 << 16)
        except BlockingIOError:
            return
        lines = (child.rest + data).split(b"\n")
        child.rest = lines.pop()
        if not data:
            self._close(child)
        for line in lines:
            _show(child, line)

    def _close(self, child: Child) -> None:
        if child.output >= 0:
            self._selector.unregister(child.output)
            os.close(child.output)
            child.output = -1

    def _has_ended(self, child: Child) -> bool:
        if child.ended_s is None and child.process.poll() is not None:
            child.ended_s = time.monotonic()
        return child.ended_s is not None and (child.output < 0 or time.monotonic() - child.ended_s > DRAIN_S)

    def _conclude(self, child: Child) -> None:
        self._close(child)
        if child.rest:
            _show(child, child.rest)
        child.file.close()
        self.children.remove(child)
        assert child.ended_s is not None
        child.outcome = {
            "exit_code": child.process.poll(),
            "wall_s": round(child.ended_s - child.started_s, 3),
            "ended_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "last_lines": list(child.last),
            "log": str(child.log),
            "beside": child.beside,
        }

    def _end_all(self) -> None:
        """Stop what still runs, if the context is left by an error."""
        for child in self.children:
            _send(child, signal.SIGTERM)
        while self.wait():
            pass

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        again, self.stopping = self.stopping, True
        running = [child for child in self.children if child.ended_s is None]
        if not running:
            return
        if not again:
            stop, kill = ("cell stops", "it") if len(running) == 1 else (f"{len(running)} cells stop", "them")
            say(f"{signal.Signals(number).name}: the running {stop}; Ctrl-C once more kills {kill}")
        for child in running:
            _send(child, signal.SIGKILL if again and number == signal.SIGINT else signal.SIGTERM)


def _cold(command: Sequence[str], output: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**console.plain_environment(), **environment},
        start_new_session=True,  # Ctrl-C in the terminal must reach the child only once, through this process
        preexec_fn=partial(die_with_parent, signal.SIGTERM),
    )


def _forked(command: Sequence[str], server: str | None, output: int, environment: Mapping[str, str]) -> Forked | None:
    """The command as a process that the server forks; None if it is no command of Headway, or no server answers."""
    if server is None or tuple(command[: len(COMMAND)]) != COMMAND:
        return None
    try:
        environment = {**console.plain_environment(), **environment}
        return Forked.cell(server, list(command[len(COMMAND) :]), log=output, env=environment)
    except (OSError, ValueError):
        return None


def _send(child: Child, signum: signal.Signals) -> None:
    """SIGKILL goes to the session of the child, other signals to the child alone."""
    if child.ended_s is None and child.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if signum == signal.SIGKILL else os.kill)(child.process.pid, signum)


def _show(child: Child, line: bytes) -> None:
    text = line.decode("utf-8", errors="replace").rstrip()
    child.file.write(text + "\n")
    child.file.flush()
    child.last.append(text)
    child.show(text)
