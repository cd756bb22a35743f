"""Heartbeats of the ranks: each rank writes its current section, and the launcher of its host reads it.

The ranks use `start` and `beat`; the launcher uses `read_beat` and `allowed_s`. A beat is one small write to an open
file. No thread is involved, so that a rank that hangs for any reason stops beating.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SECTIONS = {"setup": 6, "first step": 4, "data": 1, "step": 1, "validate": 4, "save": 4, "finish": 4}
"""Maximum time of a rank in each section, in multiples of launch.hang_s. Before the steps, modules are imported and
kernels are compiled; saves wait for disks."""

STACKS = signal.SIGUSR2
"""Signal on which a rank writes the stacks of its threads to its log. A launcher forwards it to all its ranks."""

_BYTES = 512  # length of every record, so that a reader never sees the remainder of a longer record


@dataclass(frozen=True)
class Beat:
    """The last beat of a rank: in `section` of `step` since `time_s` on the monotonic clock of its host."""

    rank: int
    host: str
    section: str
    step: int
    time_s: float


class Heartbeat:
    """Writes the beats of one rank into `path`."""

    def __init__(self, path: Path, rank: int) -> None:
        self._rank, self._host, self._stepped = rank, socket.gethostname()[:64], False
        self._path, self._fd = path, -1
        self.beat("setup", 0)

    def beat(self, section: str, step: int) -> None:
        """Record that this rank begins `section` (a key of SECTIONS) of optimizer step `step`."""
        if section == "step":
            section = "step" if self._stepped else "first step"
            self._stepped = True
        assert section in SECTIONS, section
        # The launcher reads the same monotonic clock of the host, which is never set back.
        beat = {"rank": self._rank, "host": self._host, "section": section, "step": step, "time_s": time.monotonic()}
        with contextlib.suppress(OSError):  # a disk error must not end a training run
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            os.pwrite(self._fd, json.dumps(beat).ljust(_BYTES).encode()[:_BYTES], 0)


_current: Heartbeat | None = None


def start(logs: Path, rank: int) -> None:
    """Start the heartbeat of this process.

    The process also writes all stacks to stderr on the signal STACKS, and ends when the launcher ends.
    """
    global _current
    faulthandler.register(STACKS, file=sys.stderr, all_threads=True, chain=False)
    launcher = os.environ.get("HEADWAY_LAUNCHER_PID")
    if launcher is not None:
        threading.Thread(target=_end_with, args=(int(launcher),), daemon=True).start()
    _current = Heartbeat(beat_file(logs, rank), rank)


def beat(section: str, step: int) -> None:
    """`Heartbeat.beat` of this process. Does nothing if `start` was not called."""
    if _current is not None:
        _current.beat(section, step)


def beat_file(logs: Path, rank: int) -> Path:
    """Path of the heartbeat file of a rank."""
    return logs / f"rank-{rank}.beat"


def read_beat(path: Path) -> Beat | None:
    """The last beat in `path`; None if there is none or if one is being written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        beat = Beat(**{key: found[key] for key in Beat.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    kinds = (int, str, str, int, (int, float))
    fields = (beat.rank, beat.host, beat.section, beat.step, beat.time_s)
    return beat if all(map(isinstance, fields, kinds)) and math.isfinite(beat.time_s) else None


def can_beat(path: Path) -> bool:
    """Whether a record can be written to `path` now, as a rank writes it.

    On a full disk an existing record can still be overwritten.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(fd, b" " * _BYTES, 0)
            os.fsync(fd)  # network file systems report a full disk only here
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


def allowed_s(section: str, hang_s: float) -> float:
    """Maximum time in seconds that a rank may stay in `section` without another beat."""
    return hang_s * SECTIONS.get(section, 1)


def _end_with(pid: int) -> None:
    """End this process when process `pid` ends, even if the programs between the two keep running."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    except OSError:  # not permitted in some containers; the parent-death signal of the kernel remains
        return
    else:
        select.select([descriptor], [], [])
        os.kill(os.getpid(), signal.SIGKILL)
