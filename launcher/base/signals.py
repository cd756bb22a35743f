"""Signals that ask a run to stop: the same for a launcher, its ranks and a study."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

_ends = _stopped = False


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP; without SIGHUP if it is ignored.

    SIGHUP means that the terminal or connection was closed. nohup ignores it, and that stays so.
    """
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup)


def this_process_ends() -> None:
    """Declare that this process ends with its command, so that `put_back` can ignore signals after a stop."""
    global _ends
    _ends = True


def put_back(old: Mapping[signal.Signals, Any], *, stopped: bool) -> None:
    """Restore handlers of signals. After a stop in a process that ends with its command, ignore the signals instead.

    Otherwise a second signal between the save and the end of the process would end it with another exit status.
    """
    global _stopped
    _stopped = _stopped or (stopped and _ends)
    for signum, handler in old.items():
        signal.signal(signum, signal.SIG_IGN if _stopped else handler)


def say(text: str) -> None:
    """Write a line to stderr from a signal handler, where print may meet itself and fail."""
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"{text}\n".encode())
