"""Read the state of processes from /proc, send them signals, and prepare child processes."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from headway.launcher.base.command import die_with_parent
from headway.launcher.run.run_dir import RunDir

STOPPED = "Tt"
"""Values of `state` for a stopped process."""


def state(pid: int) -> str:
    """The state letter of a process in /proc/PID/stat; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def status(pid: int) -> int | None:
    """Exit status of a zombie process, negative for a signal; None if it runs or its parent has already waited."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    raw = int(fields[-1])
    return (-(raw & 0x7F) or raw >> 8) if fields[0] == "Z" else None


def live_pid(run: RunDir, rank: int) -> int | None:
    """Process id of a rank if it runs now, else None.

    The command line is checked, because the pid file may be incomplete, and the id may now belong to another process.
    """
    try:
        pid = int((run.logs / f"rank-{rank}.pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    ours = b"headway.launcher.train.worker" in words and os.fsencode(run.path.resolve()) in words
    return pid if ours else None  # a zombie has no command line


def send(pid: int, signum: int) -> None:
    """Send a signal to a process that may already have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def become_child() -> None:
    """Prepare a child that starts ranks, such as torchrun: it ends with its parent and ignores SIGUSR1 and SIGUSR2.

    Slurm may send these signals to all processes of a job. Only ranks and Headway's launchers handle them, so they
    must not end a process between the two.
    """
    die_with_parent()
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
