"""Lines of metrics.jsonl: JSON objects with a checksum of themselves, so that no damaged number is taken for one."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
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
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    crc = record.pop("crc", None)
    body = line.rpartition(_KEY)[0]
    return record if crc is None or crc == f"{zlib.crc32(body.encode(errors='replace')):08x}" else None


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
            raise error
        return None if waited else error

    def sync(self) -> None:
        """Make what could be written last through a power cut."""
        self._push()
        with contextlib.suppress(OSError):
            os.fsync(self._fd)

    def close(self) -> None:
        """Raises OSError when lines are left that the disk has no room for."""
        error = self._push()
        os.close(self._fd)
        if error is not None:
            raise OSError(error.errno, f"{error.strerror}: the last records of {self._path} could not be written")

    def _push(self) -> OSError | None:
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._fd, self._waiting) :]
        except OSError as e:
            return e
        return None
