"""Lines of metrics.jsonl: JSON objects with checksums, so that damaged, removed and foreign records are detected."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

_KEY = ', "crc": "'
_END_BYTES = len(', "chain": "0123456789abcdef", "crc": "01234567"}')
_CHAIN = re.compile("[0-9a-f]{16}")
_MOST_BYTES = 64 << 20  # maximum size of the records that wait for free disk space


def encode(record: dict[str, Any], chain: str | None = None) -> str:
    """Encode a record, which must not be empty, as a line of JSON. Its last key is the CRC-32 of the text before it.

    `chain`: 16 hex digits, the tag of the run and the CRC-32 of all bytes of the file before this line. See
    `headway.launcher.run.chain`.
    """
    body = json.dumps(record)[:-1]
    if chain is not None:
        body = f'{body}, "chain": "{chain}"'
    return f'{body}{_KEY}{zlib.crc32(body.encode()):08x}"}}'


def relinked(raw: bytes, chain: str) -> bytes:
    """An encoded line that has a chain, with another one. `raw`: its bytes without the line break."""
    body = raw[:-_END_BYTES] + f', "chain": "{chain}"'.encode()
    return body + f'{_KEY}{zlib.crc32(body):08x}"}}'.encode()


def decode(line: str) -> dict[str, Any] | None:
    """The record of a line; None if it was truncated or changed. A record without a checksum is accepted unchecked."""
    return parse_line(line).record


class Row(NamedTuple):
    """A training record. `values`: numbers of the keys that its reader keeps, nan where the record has
    no number.

    `hash`: of its batch, or None. `router`: whether it has figures of routers.
    """

    step: int
    values: list[float]
    skipped: bool
    hash: str | None
    router: bool


class Line(NamedTuple):
    """A parsed line. `record`: None if it is damaged. `chain`: see `encode`; None in the format before chains.

    `row`: in place of a record, which is empty then (`headway.launcher.run.columns.form`).
    """

    record: dict[str, Any] | None = None
    has_checksum: bool = False
    chain: str | None = None
    row: Row | None = None


_DAMAGED = Line()


def parse_line(text: str) -> Line:
    """Parse a line and check its own checksum, if it has one."""
    if not text.startswith("{") or text.rstrip() == "{}":  # soon, because a damaged file may have a million such lines
        return _DAMAGED
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return _DAMAGED
    crc, chain = record.pop("crc", None), record.pop("chain", None)
    body = text.rpartition(_KEY)[0]
    if crc is not None and crc != f"{zlib.crc32(body.encode(errors='replace')):08x}":
        return Line(has_checksum=True)
    return Line(
        record=record, has_checksum=crc is not None, chain=chain if crc is not None and _is_chain(chain) else None
    )


def parse_raw(raw: bytes) -> Line:
    """Parse the bytes of a line."""
    return parse_line(raw.decode(errors="replace")) if raw[:1] == b"{" else _DAMAGED


def is_step(value: Any) -> TypeGuard[int]:
    """Whether a recorded value is the number of a step."""
    return type(value) is int and abs(value) < 1 << 53


def _is_chain(value: Any) -> bool:
    return isinstance(value, str) and _CHAIN.fullmatch(value) is not None


@dataclass
class Damage:
    """Numbers (from 1) of damaged lines: lines that end with a line break but are not a record.

    A last line without a line break is not included: a killed process leaves one, and a line that is just being written
    has none yet. `missing`: numbers of lines before which lines were removed. `foreign`: numbers of lines that belong
    to another run. `unchained`: number of lines of the format before chains, whose removal cannot be noticed.
    """

    lines: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    foreign: list[int] = field(default_factory=list)
    unchained: int = 0


def read_lines(path: Path, damage: Damage | None = None, *, tag: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield all undamaged records; the numbers of damaged lines are added to `damage`. Raises OSError.

    A missing file has no records. A line without a checksum after a line with one is damaged: either all lines of a
    file have checksums, or none have if an earlier version wrote it. The same applies to chains. `tag`: tag of the run;
    records with another tag belong to another run and are left out. None: they are not.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for found in lines_of(file, damage or Damage(), tag=tag):
            yield found.record


class Found(NamedTuple):
    """An undamaged line of a file: its bytes without the line break, and its record or row."""

    raw: bytes
    record: dict[str, Any]
    chain: str | None
    row: Row | None


def lines_of(
    file: Iterable[bytes],
    damage: Damage,
    *,
    tag: str | None,
    before: int | None = None,
    parse: Callable[[bytes], Line] = parse_raw,
) -> Iterator[Found]:
    """The undamaged lines of an open file, as for `read_lines`.

    `before`: CRC-32 of all bytes before the first line, if it is known; None: that of the beginning of a file.
    """
    start = int(tag, 16) if tag is not None else None
    running = start if before is None else before  # None after a damaged line: nothing is known about lines in between
    checked = chained = False
    for number, raw in enumerate(file, 1):
        line = parse(raw)
        whole = line.record is not None and (line.has_checksum or not checked) and (line.chain or not chained)
        if line.record is None or not whole:
            if raw.endswith(b"\n"):
                damage.lines.append(number)
            running = None
            continue
        checked, chained = line.has_checksum, line.chain is not None
        if line.chain is None:
            damage.unchained += 1
        elif tag is not None and line.chain[:8] != tag:
            damage.foreign.append(number)
            running = None
            continue
        else:
            at = int(line.chain[8:], 16)
            if running is not None and running != at:
                damage.missing.append(number)
            running = at
        running = None if running is None else zlib.crc32(raw, running)
        yield Found(raw.rstrip(b"\n"), line.record, line.chain, line.row)


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Missing records of a file: number of damaged `lines`; `gaps`, (first, last) of each range of missing steps.

    `foreign`: number of lines that belong to another run. `missing`: number of places where lines were removed.
    """

    lines: int
    gaps: tuple[tuple[int, int], ...]
    foreign: int = 0
    missing: int = 0

    @classmethod
    def of(cls, damage: Damage, gaps: tuple[tuple[int, int], ...]) -> Lost:
        return cls(lines=len(damage.lines), gaps=gaps, foreign=len(damage.foreign), missing=len(damage.missing))

    def __bool__(self) -> bool:
        return bool(self.lines or self.gaps or self.foreign or self.missing)

    def __str__(self) -> str:
        shown = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in self.gaps[:5])
        if len(self.gaps) > 5:
            shown += f" and {len(self.gaps) - 5} more gaps"
        parts = [f"{self.lines} {'line is' if self.lines == 1 else 'lines are'} damaged"] if self.lines else []
        if self.foreign:
            parts.append(f"{self.foreign} {'line belongs' if self.foreign == 1 else 'lines belong'} to another run")
        if self.missing:
            parts.append(f"lines were removed in {self.missing} {'place' if self.missing == 1 else 'places'}")
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
