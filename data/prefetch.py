"""Threads that prepare numbered items ahead of their consumer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class LateError(Exception):
    """An item was not ready in time."""


_LOOK_S = 0.5
_CLOSE_S = 2.0


def join(threads: list[threading.Thread]) -> None:
    """Wait for all threads, at most two seconds. A daemon thread that hangs does not block the end of a run."""
    end = time.monotonic() + _CLOSE_S
    for thread in threads:
        thread.join(timeout=max(0.0, end - time.monotonic()))


class Prefetch(Generic[Item]):
    """Runs `prepare(first)`, `prepare(first + 1)`, ... in `workers` threads, at most `ahead` items before the consumer.

    Threads suffice, because copying and hashing release the GIL. Unlike processes, they leave no shared memory or child
    processes behind. They are daemons, so they do not block the exit after a crash of the main thread.
    """

    def __init__(
        self, prepare: Callable[[int], Item], *, first: int, end: int | None, ahead: int, workers: int
    ) -> None:
        self._prepare, self._end, self._ahead = prepare, end, ahead
        self._claimed = self._wanted = first
        self._ready: dict[int, Item | _Failure] = {}
        self._claims: dict[int, threading.Thread] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"data-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def get(self, number: int, *, timeout_s: float) -> Item:
        """Wait for item `number`. Items must be requested in order.

        Raises the exception of `prepare`, LateError if the item is not ready after `timeout_s`, and RuntimeError if the
        thread that should prepare it has died.
        """
        end = time.monotonic() + timeout_s
        with self._changed:
            # While item n is used, items n + 1 .. n + ahead are prepared.
            self._wanted = number
            self._changed.notify_all()
            while number not in self._ready:
                if self._closed:
                    raise RuntimeError("the loader is closed")
                preparing = [self._claims[number]] if number in self._claims else self._threads
                if not any(thread.is_alive() for thread in preparing):
                    raise RuntimeError(f"the data thread for step {number + 1} ended without a result")
                if (left_s := end - time.monotonic()) <= 0:
                    raise LateError
                # Wake up regularly, because a thread that dies does not notify.
                self._changed.wait(min(left_s, _LOOK_S))
            item = self._ready[number]
            if isinstance(item, _Failure):
                raise item.error
            del self._ready[number]
            return item

    def has(self, number: int) -> bool:
        """Whether `get` returns item `number`, or raises the exception of its `prepare`, without waiting."""
        with self._changed:
            return number in self._ready

    def close(self) -> None:
        """End the threads after their current item, which is discarded. Does not wait for threads that hang."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        join(self._threads)

    def _may_claim(self) -> bool:
        return self._claimed <= self._wanted + self._ahead and (self._end is None or self._claimed < self._end)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_claim())
                if self._closed:
                    return
                number = self._claimed
                self._claims[number] = threading.current_thread()
                self._claimed += 1
            try:
                item: Item | _Failure = self._prepare(number)
            except BaseException as error:
                item = _Failure(number, error)
            with self._changed:
                self._ready[number] = item
                del self._claims[number]
                self._changed.notify_all()


class _Failure:
    """An exception to raise in the consumer. StopIteration and non-Exceptions, which would end it, are wrapped."""

    def __init__(self, number: int, error: BaseException) -> None:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            self.error = error
        else:
            self.error = RuntimeError(f"preparing step {number + 1} ended with {type(error).__name__}: {error}")
            self.error.__cause__ = error
