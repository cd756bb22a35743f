"""Stop requests to a rank by signals."""

from __future__ import annotations

import signal
from typing import Any

from headway.launcher.base.errors import PREEMPTED


class Preempted(Exception):
    """Training stopped on SIGTERM, SIGUSR1 or SIGINT. The state is saved, and the same command continues the run."""

    exit_code = PREEMPTED


class StopFlag:
    """Flag that is set by SIGTERM, SIGUSR1 or SIGINT. A second SIGINT stops the process immediately."""

    def __init__(self) -> None:
        self.raised = False
        signal.signal(signal.SIGTERM, self._raise)
        signal.signal(signal.SIGUSR1, self._raise)
        signal.signal(signal.SIGINT, self._raise)

    def _raise(self, signum: int, frame: Any) -> None:
        if self.raised and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True
