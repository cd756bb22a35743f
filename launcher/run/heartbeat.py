"""Signs of life of the ranks: each writes where it stands, and its host's launcher reads it.

`start` and `beat` are the ranks' side, `read_beat` and `allowed_s` the launcher's. A beat is one small write to an open
file; no thread takes part, so a rank that hangs in any way stops beating.
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
"""Times launch.hang_s that a rank may stay in each: modules are read and kernels built before the steps, saves wait for
disks."""

STACKS = signal.SIGUSR2
"""Asks a rank to write the stacks of its threads into its log, and a launcher to ask all its ranks for theirs."""

_BYTES = 512  # every record has this length, so that a reader never sees the rest of a longer one


@dataclass(frozen=True)
class Beat:
    """The last sign of a rank: in `section` of `step` since `time_s` on its host's monotonic clock."""

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
        """Say that this rank begins `section` (a key of SECTIONS) of optimizer step `step`."""
        if section == "step":
            section = "step" if self._stepped else "first step"
            self._stepped = True
        assert section in SECTIONS, section
        # The monotonic clock of the host: the launcher reads the same one, and nobody sets it back.
        beat = {"rank": self._rank, "host": self._host, "section": section, "step": step, "time_s": time.monotonic()}
        with contextlib.suppress(OSError):  # a disk that is not well must not end a training
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            os.pwrite(self._fd, json.dumps(beat).ljust(_BYTES).encode()[:_BYTES], 0)


_current: Heartbeat | None = None


def start(logs: Path, rank: int) -> None:
    """Begin to beat in this process, show all stacks on stderr at the signal STACKS, and end when the launcher does."""
    global _current
    faulthandler.register(STACKS, file=sys.stderr, all_threads=True, chain=False)
    launcher = os.environ.get("HEADWAY_LAUNCHER_PID")
    if launcher is not None:
        threading.Thread(target=_end_with, args=(int(launcher),), daemon=True).start()
    _current = Heartbeat(beat_file(logs, rank), rank)


def beat(section: str, step: int) -> None:
    """`Heartbeat.beat` of this process; nothing where `start` was not called."""
    if _current is not None:
        _current.beat(section, step)


def beat_file(logs: Path, rank: int) -> Path:
    """Where a rank's beats are."""
    return logs / f"rank-{rank}.beat"


def read_beat(path: Path) -> Beat | None:
    """The last beat in `path`; None where there is none, or one is being written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        beat = Beat(**{key: found[key] for key in Beat.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    kinds = (int, str, str, int, (int, float))
    fields = (beat.rank, beat.host, beat.section, beat.step, beat.time_s)
    return beat if all(map(isinstance, fields, kinds)) and math.isfinite(beat.time_s) else None


def can_beat(path: Path) -> bool:
    """Whether a record can be written into `path` now, as a rank does it. A full disk takes one where one has stood."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(fd, b" " * _BYTES, 0)
            os.fsync(fd)  # network file systems tell of a full disk only then
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


def allowed_s(section: str, hang_s: float) -> float:
    """How long a rank may stay in `section` without another sign."""
    return hang_s * SECTIONS.get(section, 1)


def _end_with(pid: int) -> None:
    """End this process when process `pid` does: programs between the two need not pass its end on."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    except OSError:  # not allowed in some containers; the kernel's own signal at a parent's death is left
        return
    else:
        select.select([descriptor], [], [])
        os.kill(os.getpid(), signal.SIGKILL)
