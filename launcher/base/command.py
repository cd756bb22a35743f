"""Start Headway in a separate process."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys

COMMAND = (sys.executable, "-P", "-m", "headway.launcher")
"""The `headway` command. -P keeps the working folder off sys.path, so that no file there can shadow a module."""


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `signum` to this process when its parent ends. Does nothing on systems without prctl.

    A child process calls this before it executes another program (`preexec_fn`), or when it starts.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signum)  # PR_SET_PDEATHSIG
