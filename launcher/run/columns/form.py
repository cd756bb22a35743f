"""Read training records of one form without building objects of them.

A run writes the same keys in the same order in every step. After some lines, a regular expression is made of one: it
accepts the texts that differ from it in numbers, booleans and plain strings only, so what it accepts is JSON with these
keys. All other lines go to the JSON parser. Both ways check the checksum of the line and return the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from typing import Any
from zlib import crc32

from headway.launcher.run.lines import Found, Line, Row, is_step, parse_raw

NUMBERS = ("tokens", "loss", "train_s", "grad_norm", "step_s", "data_s")
"""Keys of a training record whose numbers a reader keeps."""

_NOT_TIMED = "profiled"
"""Key of records whose times of a step are not read, because a profiler made it slower. No form is made of them."""
_TIMES = ("step_s", "data_s")

_AFTER = 32  # lines of a file that are parsed before a form is made, which takes as long as hundreds of lines
_MOST_FORMS = 4
_MOST_BYTES = 1 << 16  # of a line
_MOST_PATTERN = 1 << 15  # bytes of a pattern, which is compiled in less than 0.1 s
# Longer numbers go to the JSON parser, and so does -0, which is the integer 0 in JSON. Python's float() reads all of
# these as the JSON parser does. Possessive quantifiers, since no other split of a number can match.
_NUMBER = (
    rb"(?:(?!-0[,\]}])-?+(?:(?:0(?![0-9])|[1-9][0-9]{0,17}+)(?:\.[0-9]{1,30}+)?+(?:[eE][-+]?+[0-9]{1,3}+)?+|Infinity)"
    rb"|NaN)"
)
_STEP = rb"(0|[1-9][0-9]{0,14})"
_CHARACTERS = rb"[ !#-\[\]-~]*"  # ASCII that JSON does not escape
_END = rb', "chain": "([0-9a-f]{16})", "crc": "([0-9a-f]{8})"\}\n'
_END_BYTES = len(', "crc": "01234567"}\n')


def row_of(record: dict[str, Any]) -> Row | None:
    """The row of a parsed training record; None without a step."""
    step, hashed = record.get("step"), record.get("batch_hash")
    if not is_step(step):
        return None
    untimed = _TIMES if record.get(_NOT_TIMED) else ()
    return Row(
        step=step,
        values=[math.nan if key in untimed else number(record.get(key)) for key in NUMBERS],
        skipped=record.get("skipped") is True,
        hash=hashed if isinstance(hashed, str) else None,
        router=isinstance(record.get("router"), dict),
    )


def kind_and_step(line: Found) -> tuple[Any, Any]:
    """Kind and step of a record, whatever they are; the step is 0 where the record has none."""
    if line.row is not None:
        return "train", line.row.step
    return line.record.get("kind"), line.record.get("step", 0)


def number(value: Any) -> float:
    """A recorded number; nan for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.copysign(math.inf, value)


class _TooLongError(ValueError):
    """A record whose form would take long to make."""


class _Form:
    """A regular expression for the lines of one form."""

    def __init__(self, record: dict[str, Any]) -> None:
        """`record`: of a line with chain and checksum. Raises _TooLongError."""
        parts, names = list[bytes](), list[str]()
        for key, value in record.items():
            captured = _captured(key, value)
            if captured is not None:
                names.append(key)
            if key == "kind":
                captured = b'"train"'
            parts.append(_key(key) + b": " + (captured or _any(value)))
        text = rb"\{" + b", ".join(parts) + _END
        if len(text) > _MOST_PATTERN:
            raise _TooLongError
        self.pattern = re.compile(text)
        place = {name: i for i, name in enumerate([*names, "chain", "crc"], 1)}
        self._match = self.pattern.fullmatch
        self._numbers = [place.get(key, place["step"]) for key in NUMBERS]
        self._absent = [i for i, key in enumerate(NUMBERS) if key not in place]
        self._others = [place.get(key, 0) for key in ("step", "skipped", "batch_hash", "chain", "crc")]
        self._has_hash = "batch_hash" in place
        self._router = isinstance(record.get("router"), dict)

    def line(self, raw: bytes) -> Line | None:
        """The line of this form with its row; None if it has another form, or its checksum is wrong."""
        found = self._match(raw)
        if found is None:
            return None
        step, skipped, hashed, chain, crc = found.group(*self._others)
        if crc32(raw[:-_END_BYTES]) != int(crc, 16):
            return None
        values = list(map(float, found.group(*self._numbers)))
        for i in self._absent:
            values[i] = math.nan
        row = Row(int(step), values, skipped == b"true", hashed.decode() if self._has_hash else None, self._router)
        return Line({}, True, chain.decode(), row)


class Forms:
    """The forms of the training records of one file."""

    def __init__(self) -> None:
        self._forms, self._parsed, self._tried = list[_Form](), 0, 0

    def read(self, raw: bytes) -> Line:
        """Parse a line and check its own checksum. A training record has a `Row` if a form fits, else its record."""
        for form in self._forms:
            if (line := form.line(raw)) is not None:
                return line
        line = parse_raw(raw)
        if line.record is not None and line.chain is not None and line.record.get("kind") == "train":
            self._learn(raw, line.record)
        return line

    def _learn(self, raw: bytes, record: dict[str, Any]) -> None:
        self._parsed += 1
        if self._parsed < _AFTER or self._tried == _MOST_FORMS or len(raw) > _MOST_BYTES:
            return
        if _NOT_TIMED in record:
            return
        self._tried += 1
        if is_step(record.get("step")):
            with contextlib.suppress(_TooLongError, RecursionError):
                form = _Form(record)
                if form.pattern.fullmatch(raw):  # not if a key occurs twice, say
                    self._forms.append(form)


def _captured(key: str, value: Any) -> bytes | None:
    """The pattern of a value that the row contains; None for other values."""
    if key == "step":
        return _STEP
    if key in NUMBERS and isinstance(value, int | float) and not isinstance(value, bool):
        return b"(" + _NUMBER + b")"
    if key == "skipped" and isinstance(value, bool):
        return b"(true|false)"
    return b'"(' + _CHARACTERS + b')"' if key == "batch_hash" and isinstance(value, str) else None


def _any(value: Any) -> bytes:
    """The pattern of all values of the same form, which match no group."""
    match value:
        case dict():
            return rb"\{" + b", ".join(_key(k) + b": " + _any(v) for k, v in value.items()) + rb"\}"
        case list() if value:  # of any length: numbers of experts, say
            item = b"(?:" + b"|".join(dict.fromkeys(_any(v) for v in value)) + b")"
            return rb"\[(?:" + item + rb"(?:, (?!\])|(?=\])))++\]"
        case list():
            return rb"\[\]"
        case bool():
            return b"(?:true|false)"
        case None:
            return b"null"
        case str():
            return b'"' + _CHARACTERS + b'"'
        case _:
            return _NUMBER


def _key(key: str) -> bytes:
    return re.escape(json.dumps(key).encode())
