"""What the kernel says of processes that others started."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from headway.launcher.base.command import die_with_parent
from headway.launcher.run.run_dir import RunDir

STOPPED = "Tt"
"""Letters of `state` for a process that was stopped."""


def state(pid: int) -> str:
    """The kernel's letter for what the process does; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def status(pid: int) -> int | None:
    """How a process ended, negative for a signal; None where its parent has already asked."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    raw = int(fields[-1])
    return (-(raw & 0x7F) or raw >> 8) if fields[0] == "Z" else None


def live_pid(run: RunDir, rank: int) -> int | None:
    """Process id of a rank that runs now: a file may be half-written, and the id of a dead rank anybody's."""
    try:
        pid = int((run.logs / f"rank-{rank}.pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    ours = b"headway.launcher.train.worker" in words and os.fsencode(run.path.resolve()) in words
    return pid if ours else None  # a process that has ended and waits for its parent has no command line


def send(pid: int, signum: int) -> None:
    """A signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def become_child() -> None:
    """`die_with_parent`, for a child that starts ranks: signals that only ranks and launchers understand, and that
    Slurm may send to all processes of a job, must not end what stands between them.
    """
    die_with_parent()
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
