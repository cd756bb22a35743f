"""A sink in a thread of its own, so that it can neither stop nor slow the training."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Protocol

from headway.launcher.board.trackers.sink import Record, Sink

MOST_RECORDS = 20_000
"""Records that wait for a sink that fails or is slow. When there are more, the oldest are dropped."""

MOST_AT_ONCE = 200
"""Records that are written in one call."""

PAUSE_S = 2.0
"""From one call to the next, so that many records are written together."""

CLOSE_S = 120.0
"""How long the end of a process waits for records that are not written yet. The first connection of MLflow to a new
database took above 30 s on a loaded machine of two cores."""

LONGEST_WAIT_S = 60.0
"""The longest time from a failure to the next attempt. It begins with a second and doubles."""

_FORMAT = (TypeError, ValueError, KeyError, AttributeError, IndexError)
"""Errors of the records, not of the service: they are not written again."""


class Shown(Sink, Protocol):
    """A sink that keeps what it was given, beyond the process."""

    @property
    def shown(self) -> int:
        """The last step that it has when it is opened; -1 without any."""
        ...


class Background:
    """Connects to a service and writes to it in a thread. No method raises an exception, and only `close` waits.

    `connect`: opens the sink; called in the thread, and again after a failure. `say`: prints a message. `hide`: takes
    secrets out of one. `earlier`: the records of earlier starts of the run after a step, which are written first: those
    that the service did not get before a kill or a failure. `later`: how what is missing in the end can be sent, for a
    message.
    """

    mend = "metrics.jsonl has every record"

    def __init__(
        self,
        name: str,
        connect: Callable[[], Shown],
        *,
        say: Callable[[str], None],
        hide: Callable[[str], str] = str,
        earlier: Callable[[int], Iterable[Record]] = lambda shown: (),
        most: int = MOST_RECORDS,
        close_s: float = CLOSE_S,
        later: str = "",
    ) -> None:
        self.name, self._connect, self._say, self._hide = name, connect, say, hide
        self._earlier, self._most, self._close_s, self._later = earlier, most, close_s, later
        self._waiting: deque[Record] = deque()
        self._batch: list[Record] = []  # being written
        self._summary: Record | None = None
        self._lost, self._failures, self._closing, self._left = 0, 0, False, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, records: Iterable[Record]) -> None:
        with self._changed:
            self._waiting.extend(records)
            while len(self._waiting) > self._most:
                self._waiting.popleft()
                self._lost += 1
            self._changed.notify_all()

    def finish(self, summary: Record) -> None:
        with self._changed:
            self._summary = summary

    def flush(self) -> None:
        return

    def close(self) -> None:
        """Write what waits, for at most `close_s` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(self._close_s)
        with self._changed:
            self._left = True  # a thread that hangs says nothing any more
            lost = self._lost + len(self._waiting) + len(self._batch)
            unfinished = self._thread.is_alive()
        if lost or unfinished:
            what = f"{lost} records were not written" if lost else "its end was not written"
            later = "" if self._lost else self._later  # what was dropped is before records that the service has
            self._say(f"{self.name.upper()} IS NOT COMPLETE: {what}; {self.mend}{later}")

    def _run(self) -> None:
        sink: Shown | None = None
        older: Iterator[list[Record]] = iter(())
        while not self._left:
            try:
                if sink is None:
                    sink = self._connect()
                    older = in_batches(self._earlier(sink.shown))
                if not self._batch:
                    self._batch = next(older, None) or self._next()
                if not self._batch:
                    break
                sink.write(self._batch)
            except Exception as e:
                if sink is None or not isinstance(e, _FORMAT):
                    if not self._wait_after(e):
                        break
                    continue
                self._drop(e)
            else:
                self._written()
            self._batch = []
        self._end(sink)

    def _next(self) -> list[Record]:
        """The records to write; none when the process ends and all are written."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, PAUSE_S)
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), MOST_AT_ONCE))]

    def _wait_after(self, error: Exception) -> bool:
        """Wait until the next attempt. Returns False if the process ends and there is none."""
        self._failures += 1
        if self._failures == 1:
            self._tell(f"{self.name.upper()} FAILS: {error}; training goes on, and it is tried again. {self.mend}")
        with self._changed:
            if self._closing:
                return False
            self._changed.wait_for(lambda: self._closing, min(LONGEST_WAIT_S, 2.0 ** min(self._failures - 1, 10)))
            return True

    def _drop(self, error: Exception) -> None:
        count = len(self._batch)
        with self._changed:
            first, self._lost = self._lost == 0, self._lost + count
        if first:
            self._tell(f"{self.name.upper()} DOES NOT TAKE {count} RECORDS: {error}; training goes on. {self.mend}")

    def _written(self) -> None:
        if self._failures:
            self._tell(f"{self.name} is written again" + (f"; {self._lost} records are missing" if self._lost else ""))
        self._failures = 0

    def _end(self, sink: Sink | None) -> None:
        if sink is None:
            return
        try:
            if self._summary is not None and not self._batch and not self._waiting:
                sink.finish(self._summary)
            sink.close()
        except Exception as e:
            self._tell(f"{self.name.upper()} DOES NOT END: {e}; {self.mend}")

    def _tell(self, text: str) -> None:
        if not self._left:
            self._say(self._hide(" ".join(text.split())))


def in_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Lists of at most `MOST_AT_ONCE` records, in order."""
    left = iter(records)
    while batch := list(islice(left, MOST_AT_ONCE)):
        yield batch
