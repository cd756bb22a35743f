"""Threads that prepare numbered items ahead of their consumer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Prepares `prepare(first)`, `prepare(first + 1)`, ... in `workers` threads, at most `ahead` beyond the consumer.

    Threads suffice: the work is copying and hashing, which release the interpreter lock, and a thread cannot leave
    shared memory or child processes behind. They are daemons, so a crash of the main thread is not held up by them.
    """

    def __init__(
        self, prepare: Callable[[int], Item], *, first: int, end: int | None, ahead: int, workers: int
    ) -> None:
        self._prepare, self._end, self._ahead = prepare, end, ahead
        self._claimed = self._wanted = first
        self._ready: dict[int, Item | _Failure] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"data-{number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def get(self, number: int) -> Item:
        """The item `number`; numbers are asked for one after the other. Raises what preparing it raised."""
        with self._changed:
            # While item n is used, items n + 1 .. n + ahead are prepared.
            self._wanted = number
            self._changed.notify_all()
            self._changed.wait_for(lambda: number in self._ready or self._closed)
            if self._closed:
                raise RuntimeError("the loader is closed")
            item = self._ready[number]
            if isinstance(item, _Failure):
                raise item.error
            del self._ready[number]
            return item

    def close(self) -> None:
        """End the threads; an item in preparation is finished and thrown away."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=10)

    def _may_claim(self) -> bool:
        return self._claimed <= self._wanted + self._ahead and (self._end is None or self._claimed < self._end)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_claim())
                if self._closed:
                    return
                number = self._claimed
                self._claimed += 1
            try:
                item: Item | _Failure = self._prepare(number)
            except BaseException as error:
                item = _Failure(error)
            with self._changed:
                self._ready[number] = item
                self._changed.notify_all()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error
