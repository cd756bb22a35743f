"""Lines of metrics.jsonl: JSON objects with a checksum of themselves, so that no damaged number is taken for one."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

_KEY = ', "crc": "'
_MOST_BYTES = 64 << 20  # records that wait for room on the disk


def encode(record: dict[str, Any]) -> str:
    """The record (not an empty one) as a line of JSON; its last key is the CRC-32 of what stands before it."""
    body = json.dumps(record)[:-1]
    return f'{body}{_KEY}{zlib.crc32(body.encode()):08x}"}}'


def decode(line: str) -> dict[str, Any] | None:
    """The record of a line; None for one that was cut off or changed. One without a checksum is taken as it is."""
    return _decoded(line)[0]


def _decoded(line: str) -> tuple[dict[str, Any] | None, bool]:
    """The record, and whether it has a checksum."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, False
    if not isinstance(record, dict):
        return None, False
    crc = record.pop("crc", None)
    body = line.rpartition(_KEY)[0]
    right = crc is None or crc == f"{zlib.crc32(body.encode(errors='replace')):08x}"
    return (record if right else None), crc is not None


@dataclass
class Damage:
    """What was found while lines were read: numbers (from 1) of those that are no record, each ended by a line break.

    A last line without its break is none of them: a kill leaves one, and a reader may come while it is written.
    """

    lines: list[int] = field(default_factory=list)


def read_lines(path: Path, damage: Damage | None = None) -> Iterator[dict[str, Any]]:
    """Every whole record, one at a time; `damage` is told of the others. No file: no record. Raises OSError.

    After a line with a checksum one without is damaged: a file has them all or, from before there were any, none.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        checked = False
        for number, line in enumerate(file, 1):
            record, has_checksum = _decoded(line.decode(errors="replace"))
            if record is not None and (has_checksum or not checked):
                checked = has_checksum
                yield record
            elif damage is not None and line.endswith(b"\n"):
                damage.lines.append(number)


@dataclass(frozen=True, kw_only=True)
class Lost:
    """What a file of records lacks: `lines` were damaged; `gaps` are the first and last of steps without a record."""

    lines: int
    gaps: tuple[tuple[int, int], ...]

    def __bool__(self) -> bool:
        return bool(self.lines or self.gaps)

    def __str__(self) -> str:
        shown = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in self.gaps[:5])
        if len(self.gaps) > 5:
            shown += f" and {len(self.gaps) - 5} more gaps"
        parts = [f"{self.lines} {'line is' if self.lines == 1 else 'lines are'} damaged"] if self.lines else []
        return " and ".join(parts + ([f"no record of step {shown}"] if self.gaps else []))


def gaps(steps: Iterable[int], last_step: int = 0) -> tuple[tuple[int, int], ...]:
    """(first, last) of each stretch of steps, from 1 to `last_step` or the last one there, that is not in `steps`."""
    there = sorted({0, *steps})
    there.append(max(there[-1], last_step) + 1)
    return tuple((a + 1, b - 1) for a, b in pairwise(there) if b - a > 1)


class LineFile:
    """Appends lines; those for which a disk has no room wait for it, and go on where the disk stopped."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._path, self._waiting = path, b""

    def write(self, line: str) -> OSError | None:
        """Append the line; why it must wait, when that is news. Raises OSError when too much waits."""
        waited = bool(self._waiting)
        self._waiting += line.encode() + b"\n"
        error = self._push()
        if error is not None and len(self._waiting) > _MOST_BYTES:
            raise self._unwritten(error)
        return None if waited else error

    def sync(self) -> OSError | None:
        """Make what was written last through a power cut; why not all of it does."""
        error = self._push()
        try:
            os.fsync(self._fd)
        except OSError as e:
            return error or e
        return error

    def require(self) -> None:
        """Raises OSError unless every line is in the file."""
        if (error := self._push()) is not None:
            raise self._unwritten(error)

    def close(self) -> None:
        """Raises OSError when lines are left that the disk has no room for."""
        error = self._push()
        os.close(self._fd)
        if error is not None:
            raise self._unwritten(error)

    def _push(self) -> OSError | None:
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._fd, self._waiting) :]
        except OSError as e:
            return e
        return None

    def _unwritten(self, error: OSError) -> OSError:
        return OSError(error.errno, f"{error.strerror}: the last records of {self._path} could not be written")
