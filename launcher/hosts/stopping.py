"""Signals that ask a launcher to stop while no ranks run: before they are started, and between two starts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from headway.launcher.hosts.faults import CONTINUES, PREEMPTED, STOPPED, Ended, Fault
from headway.launcher.run.heartbeat import STACKS


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP raise Ended with the status of a stop in order: nothing is being trained.

    While ranks run, `supervise` puts its own handlers in the place of these. SIGUSR2 asks for the stacks of ranks, and
    there are none.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        text = f"stopped by {signal.Signals(signum).name} while no ranks ran; {CONTINUES}"
        raise Ended(Fault(text=text, code=PREEMPTED, weight=STOPPED))

    signals: dict[signal.Signals, Any] = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), stop)
    signals[STACKS] = signal.SIG_IGN
    # SIGHUP: the terminal has gone; under nohup it is ignored, and stays so.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals[signal.SIGHUP] = stop
    old = {signum: signal.signal(signum, handler) for signum, handler in signals.items()}
    try:
        yield
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
