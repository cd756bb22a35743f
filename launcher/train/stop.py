"""How a rank is asked to stop."""

from __future__ import annotations

import signal
from typing import Any

from headway.launcher.base.errors import PREEMPTED


class Preempted(Exception):
    """SIGTERM, SIGUSR1 or SIGINT came; the state is saved and the same command continues."""

    exit_code = PREEMPTED


class StopFlag:
    """Raised by SIGTERM, SIGUSR1 or SIGINT; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.raised = False
        signal.signal(signal.SIGTERM, self._raise)
        signal.signal(signal.SIGUSR1, self._raise)
        signal.signal(signal.SIGINT, self._raise)

    def _raise(self, signum: int, frame: Any) -> None:
        if self.raised and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True
