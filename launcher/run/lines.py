"""Lines of metrics.jsonl: JSON objects with a checksum each, so that damaged numbers are detected."""

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
_MOST_BYTES = 64 << 20  # maximum size of the records that wait for free disk space


def encode(record: dict[str, Any]) -> str:
    """Encode a record, which must not be empty, as a line of JSON. Its last key is the CRC-32 of the text before it."""
    body = json.dumps(record)[:-1]
    return f'{body}{_KEY}{zlib.crc32(body.encode()):08x}"}}'


def decode(line: str) -> dict[str, Any] | None:
    """The record of a line; None if it was truncated or changed. A record without a checksum is accepted unchecked."""
    return _decoded(line)[0]


def _decoded(line: str) -> tuple[dict[str, Any] | None, bool]:
    """The record of a line, and whether it has a checksum."""
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
    """Numbers (from 1) of damaged lines: lines that end with a line break but are not a record.

    A last line without a line break is not included: a killed process leaves one, and a line that is just being written
    has none yet.
    """

    lines: list[int] = field(default_factory=list)


def read_lines(path: Path, damage: Damage | None = None) -> Iterator[dict[str, Any]]:
    """Yield all undamaged records; the numbers of damaged lines are added to `damage`. Raises OSError.

    A missing file has no records. A line without a checksum after a line with one is damaged: either all lines of a
    file have checksums, or none have if an earlier version wrote it.
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
    """Missing records of a file: number of damaged `lines`; `gaps`, (first, last) of each range of missing steps."""

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
    """(first, last) of each range of steps that is missing from `steps`.

    The steps are counted from 1 to the larger of `last_step` and the last of `steps`.
    """
    there = sorted({0, *steps})
    there.append(max(there[-1], last_step) + 1)
    return tuple((a + 1, b - 1) for a, b in pairwise(there) if b - a > 1)


class LineFile:
    """Append lines to a file. On a full disk, lines are kept in memory and written once there is space again."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._path, self._waiting = path, b""

    def write(self, line: str) -> OSError | None:
        """Append a line. Returns the error if this line is the first that must wait.

        Raises OSError if more than `_MOST_BYTES` are waiting.
        """
        waited = bool(self._waiting)
        self._waiting += line.encode() + b"\n"
        error = self._push()
        if error is not None and len(self._waiting) > _MOST_BYTES:
            raise self._unwritten(error)
        return None if waited else error

    def sync(self) -> OSError | None:
        """Make the written lines survive a power failure. Returns the error if some could not be written."""
        error = self._push()
        try:
            os.fsync(self._fd)
        except OSError as e:
            return error or e
        return error

    def require(self) -> None:
        """Raise OSError unless all lines are in the file."""
        if (error := self._push()) is not None:
            raise self._unwritten(error)

    def close(self) -> None:
        """Close the file. Raises OSError if lines remain that could not be written."""
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
