"""What the drill and the training it compares with agree on, without importing torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

WIDTH, LAYERS, HEADS, FFN, VOCABULARY, SEQUENCE = 64, 2, 4, 96, 64, 32
RECORDS, COMPLETE = "losses.jsonl", "complete"


@dataclass(frozen=True, kw_only=True)
class Options:
    """`die`: where a rank ends itself by SIGKILL, as "rank/n-th save/file/moment"; see `_dying`."""

    steps: int
    save_every: int
    timeout_s: float
    seed: int
    die: str | None = None

    def words(self) -> str:
        return json.dumps(asdict(self))


def damaged(body: bytes, length: int, bit: int) -> bytes:
    """The first `length` bytes, with one bit flipped unless it is -1."""
    changed = bytearray(body[:length])
    if bit >= 0:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
