"""Stop requests to a rank by signals."""

from __future__ import annotations

import signal
from typing import Any

from headway.launcher.base.errors import PREEMPTED
from headway.launcher.base.signals import stop_signals


class Preempted(Exception):
    """Training stopped on a signal of `stop_signals`. The state is saved, and the same command continues the run."""

    exit_code = PREEMPTED


class StopFlag:
    """Flag that is set by the signals of `stop_signals`. A second SIGINT stops the process immediately."""

    def __init__(self) -> None:
        self.raised = False
        for signum in stop_signals():
            signal.signal(signum, self._raise)

    def _raise(self, signum: int, frame: Any) -> None:
        if self.raised and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True
