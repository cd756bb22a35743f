"""Head diversity on a probe batch: the same tokens at every validation, on every rank, whatever the layout."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from headway.data.config import DataConfig
from headway.data.loader import MicroBatch, validation_batches
from headway.model.diversity import measured
from headway.parallel.engine import Engine
from headway.parallel.layout import Layout

PROBE_TOKENS = 512
PROBE_SEQ_LEN = 256
"""Longest piece of a sequence in the probe: with full sequences it would hold one document alone."""


def probe_batch(data: DataConfig, *, parts: int = 1) -> MicroBatch:
    """`PROBE_TOKENS` at most, from the beginnings of sequences spread over the validation split.

    `parts`: into how many equal ones the layout cuts a sequence; it divides `data.seq_len`.
    """
    length = max(parts, min(data.seq_len, PROBE_SEQ_LEN) // parts * parts)
    count = max(1, PROBE_TOKENS // length)
    batch = validation_batches(data, tokens=count * data.seq_len, micro_batch=count, dp_rank=0, dp_size=1)[0]
    segments = None if batch.segments is None else batch.segments[:, :length].contiguous()
    tokens, labels = (t[:, :length].contiguous() for t in (batch.tokens, batch.labels))
    return MicroBatch(tokens=tokens, labels=labels, segments=segments)


class HeadProbe:
    """Measures each layer's head pool; after it has found that the mechanism has none, it does nothing."""

    def __init__(self, engine: Engine, layout: Layout, batch: MicroBatch) -> None:
        self._engine, self._layout, self._batch, self._empty = engine, layout, batch, False

    def measure(self) -> dict[str, Any]:
        """{"layer_00": `headway.model.diversity.HeadDiversity` as a dict}; every rank calls it.

        Ranks that share a layer measure its groups in equal parts, of which every figure is a mean.
        """
        if self._empty:
            return {}
        with measured(self._engine.attention_layers) as found:
            self._engine.evaluate([self._batch])
        mine = {f"layer_{i:02d}": asdict(diversity) for i, diversity in found.items()}
        parts: dict[str, list[dict[str, Any]]] = {}
        for layers in self._layout.gather_json(mine if self._layout.data_index == 0 else {}):
            for name, values in layers.items():
                parts.setdefault(name, []).append(values)
        self._empty = not parts
        return {name: _mean(parts[name]) for name in sorted(parts)}


def _mean(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Of figures, which are floats; what the members are and how many is the same in all parts."""
    first = parts[0]
    return {k: sum(p[k] for p in parts) / len(parts) if isinstance(v, float) else v for k, v in first.items()}
