"""A sink that keeps what it is given in memory, as W&B and MLflow would show it: points of named scalars by step."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from headway.launcher.board.scalars import scalars_of
from headway.launcher.board.trackers.sink import Record


class MemorySink:
    """`shown`: the last step that it has from an earlier process. `gate`: writing waits until it is set.

    `failures`: raised by the next calls of `write`, one each.
    """

    name, mend = "memory", "it is gone with the process"

    def __init__(self, *, per_layer: bool = False, failures: Iterable[Exception] = (), shown: int = -1) -> None:
        self.shown = shown
        self.per_layer, self.failures = per_layer, list(failures)
        self.records: list[Record] = []
        self.points: dict[str, dict[int, float]] = {}
        self.calls: list[int] = []  # records of each call
        self.summary: Any = None
        self.closed = 0
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def write(self, records: Iterable[Record]) -> None:
        batch = list(records)
        self.entered.set()
        self.gate.wait(60)
        if self.failures:
            raise self.failures.pop(0)
        self.calls.append(len(batch))
        for record in batch:
            found = scalars_of(record, per_layer=self.per_layer)
            self.records.append(record)
            for tag, value in found.items():
                self.points.setdefault(tag, {})[record["step"]] = value

    def finish(self, summary: Record) -> None:
        self.summary = summary

    def flush(self) -> None:
        return

    def close(self) -> None:
        self.closed += 1
