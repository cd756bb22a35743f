"""The chain of checksums that binds the lines of metrics.jsonl to each other and to their run.

Every line contains the tag of its run and the CRC-32 of all bytes of the file before it, which begins with the tag. A
line that is changed, removed, moved, or taken from another run is noticed by the line after it; summary.json names the
end of the file, so that a cut end is noticed too. Each checkpoint names the end at its step, so that a resume checks
the beginning of the file without parsing it. This detects damage and mistakes, not forgery.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from headway.launcher.run.lines import encode

_BLOCK = 1 << 20


def tag_of(run_id: str | None) -> str:
    """The tag of a run in its records: 8 hex digits."""
    return f"{zlib.crc32((run_id or '').encode()):08x}"


@dataclass
class Chain:
    """The end of a file of records. `run`: tag of the run. `crc`: CRC-32 of all bytes, 8 hex digits.

    `lines`, `bytes`: length of the file. `step`: that of the last line.
    """

    run: str
    lines: int
    bytes: int
    step: int
    crc: str

    @classmethod
    def start(cls, tag: str) -> Chain:
        """The end of an empty file."""
        return cls(run=tag, lines=0, bytes=0, step=0, crc=tag)

    @classmethod
    def restored(cls, value: Any) -> Chain | None:
        """The chain that `state` returned; None if `value` is something else."""
        try:
            found = cls(**value)
            fits = all(type(n) is int and n >= 0 for n in (found.lines, found.bytes, found.step))
            return found if fits and int(found.crc, 16) >= 0 and int(found.run, 16) >= 0 else None
        except (TypeError, ValueError):
            return None

    @classmethod
    def of_file(cls, path: Path, tag: str) -> Chain:
        """The end of an existing file; that of an empty one if there is none. Raises OSError."""
        chain = cls.start(tag)
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    chain._count(block, block.count(b"\n"))
        except FileNotFoundError:
            pass
        return chain

    def state(self) -> dict[str, Any]:
        """For summary.json and checkpoints."""
        return asdict(self)

    def line(self, record: dict[str, Any]) -> str:
        """Encode the record that comes next, without a line break."""
        text = encode(record, self.link)
        self.add(text.encode(), record.get("step"))
        return text

    @property
    def link(self) -> str:
        """The `chain` of the line that comes next."""
        return f"{self.run}{self.crc}"

    def add(self, raw: bytes, step: Any) -> None:
        """Count a line that is appended as it is. `raw`: its bytes without the line break."""
        self._count(raw + b"\n", 1)
        self.step = step if isinstance(step, int) and step >= 0 else self.step

    def _count(self, data: bytes, lines: int) -> None:
        self.crc = f"{zlib.crc32(data, int(self.crc, 16)):08x}"
        self.bytes += len(data)
        self.lines += lines


def begins_as(file: BinaryIO, chain: Chain) -> bool:
    """Whether the open file begins with the bytes that `chain` names. Leaves the position at their end."""
    file.seek(0)
    left, crc = chain.bytes, int(chain.run, 16)
    while left and (block := file.read(min(_BLOCK, left))):
        crc, left = zlib.crc32(block, crc), left - len(block)
    return not left and f"{crc:08x}" == chain.crc
