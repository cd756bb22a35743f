"""How Headway starts itself in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys

COMMAND = (sys.executable, "-P", "-m", "headway.launcher")
"""The `headway` command. -P: the folder the user stands in must not be able to shadow a module."""


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `signum` to this process when its parent ends. Does nothing where there is no prctl.

    A child calls it before it becomes another program (`preexec_fn`), or when it starts.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signum)  # PR_SET_PDEATHSIG
