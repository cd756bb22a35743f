"""Head diversity on a probe batch: the same tokens at every validation, on every rank, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from headway.data.config import DataConfig
from headway.data.loader import MicroBatch, validation_batches
from headway.model.base import Attention
from headway.model.diversity import measured
from headway.parallel.engine import Engine

PROBE_TOKENS = 512
PROBE_SEQ_LEN = 256
"""Longest piece of a sequence in the probe: with full sequences it would hold one document alone."""


def probe_batch(data: DataConfig) -> MicroBatch:
    """`PROBE_TOKENS` at most, from the beginnings of sequences spread over the validation split."""
    length = min(data.seq_len, PROBE_SEQ_LEN)
    count = PROBE_TOKENS // length
    batch = validation_batches(data, tokens=count * data.seq_len, micro_batch=count, dp_rank=0, dp_size=1)[0]
    segments = None if batch.segments is None else batch.segments[:, :length].contiguous()
    tokens, labels = (t[:, :length].contiguous() for t in (batch.tokens, batch.labels))
    return MicroBatch(tokens=tokens, labels=labels, segments=segments)


class HeadProbe:
    """Measures each layer's head pool; after it has found that the mechanism has none, it does nothing."""

    def __init__(self, engine: Engine, layers: Sequence[Attention], batch: MicroBatch) -> None:
        self._engine, self._layers, self._batch, self._empty = engine, layers, batch, False

    def measure(self) -> dict[str, Any]:
        """{"layer_00": `headway.model.diversity.HeadDiversity` as a dict}; every rank calls it."""
        if self._empty:
            return {}
        with measured(self._layers) as found:
            self._engine.evaluate([self._batch])
        self._empty = not found
        return {f"layer_{i:02d}": asdict(diversity) for i, diversity in sorted(found.items())}
