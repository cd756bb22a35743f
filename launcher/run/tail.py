"""The newest records of a run, read from the end of metrics.jsonl. Does not import numpy or torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from headway.launcher.run.lines import decode

_TAILS = (64 << 10, 1 << 20)  # bytes of metrics.jsonl: the first suffices unless validations are rare


def end_of_records(metrics: Path) -> tuple[int, int, float | None, int | None]:
    """(step, tokens, validation loss, validation step) of the newest records."""
    step, tokens, loss, at = 0, 0, None, None
    for size in _TAILS:
        step, tokens, loss, at = 0, 0, None, None
        for record in _backwards(metrics, size):
            kind, number = record.get("kind"), record.get("step")
            if not isinstance(number, int):
                continue
            if kind == "train" and not step:
                found = record.get("tokens")
                step, tokens = number, int(found) if is_number(found) else 0
            elif kind == "validation" and loss is None and is_number(record.get("loss")):
                loss, at = float(record["loss"]), number
            if step and loss is not None:
                return step, tokens, loss, at
    return step, tokens, loss, at


def _backwards(metrics: Path, size: int) -> Iterator[dict[str, Any]]:
    """Complete records in the last `size` bytes, newest first."""
    try:
        with metrics.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            lines = file.read().splitlines()
    except OSError:
        return
    for line in reversed(lines if end <= size else lines[1:]):
        if (record := decode(line.decode(errors="replace"))) is not None:
            yield record


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
