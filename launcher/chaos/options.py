"""Settings shared by the drill and the stock DeepSpeed training, without importing torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

WIDTH, LAYERS, HEADS, FFN, VOCABULARY, SEQUENCE = 64, 2, 4, 96, 64, 32
RECORDS, COMPLETE = "losses.jsonl", "complete"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a stock training. `die`: when a rank kills itself, as "rank/n-th file/kind/moment"; see `_dying`."""

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
