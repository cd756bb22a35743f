"""Handle signals that stop a launcher while no ranks run: before the first start, and between two starts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from headway.launcher.base.signals import put_back, stop_signals
from headway.launcher.hosts.faults import CONTINUES, PREEMPTED, STOPPED, Ended, Fault
from headway.launcher.run.heartbeat import STACKS


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM, SIGINT, SIGUSR1 and SIGHUP raise Ended with status 75, because no training step can be lost.

    While ranks run, `supervise` replaces these handlers with its own. SIGUSR2 asks for the stacks of ranks. It is
    ignored here because no ranks run.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set signal handlers
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        for each in signals:  # a second one must not interrupt what ends this process
            signal.signal(each, signal.SIG_IGN)
        text = f"stopped by {signal.Signals(signum).name} while no ranks ran; {CONTINUES}"
        raise Ended(Fault(text=text, code=PREEMPTED, weight=STOPPED))

    signals: dict[signal.Signals, Any] = {**dict.fromkeys(stop_signals(), stop), STACKS: signal.SIG_IGN}
    old = {signum: signal.signal(signum, handler) for signum, handler in signals.items()}
    stopped = False
    try:
        yield
    except Ended as e:
        stopped = e.exit_code == PREEMPTED
        raise
    finally:
        put_back(old, stopped=stopped)
