"""Head diversity on a probe batch, which has the same tokens at every validation, on every rank and in every layout."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from headway.data.config import DataConfig
from headway.data.loader import MicroBatch, validation_batches
from headway.model.measure.diversity import measured
from headway.parallel.engine import Engine
from headway.parallel.layout import Layout

PROBE_TOKENS = 512
PROBE_SEQ_LEN = 256
"""Maximum sequence length in the probe. With full sequences the probe would contain a single document."""


def probe_batch(data: DataConfig, *, parts: int = 1) -> MicroBatch:
    """At most `PROBE_TOKENS` tokens from the beginnings of sequences that are spread over the validation split.

    `parts`: number of equal parts into which the layout splits a sequence; it divides `data.seq_len`.
    """
    length = max(parts, min(data.seq_len, PROBE_SEQ_LEN) // parts * parts)
    count = max(1, PROBE_TOKENS // length)
    batch = validation_batches(data, tokens=count * data.seq_len, micro_batch=count, dp_rank=0, dp_size=1)[0]
    segments = None if batch.segments is None else batch.segments[:, :length].contiguous()
    tokens, labels = (t[:, :length].contiguous() for t in (batch.tokens, batch.labels))
    return MicroBatch(tokens=tokens, labels=labels, segments=segments)


class HeadProbe:
    """Measure the head pool of each layer. Does nothing after the first call if the mechanism has no pool."""

    def __init__(self, engine: Engine, layout: Layout, batch: MicroBatch) -> None:
        self._engine, self._layout, self._batch, self._empty = engine, layout, batch, False

    def measure(self) -> dict[str, Any]:
        """Return {"layer_00": `headway.model.measure.diversity.HeadDiversity` as a dict}. All ranks must call it.

        Ranks that share a layer measure equal parts of its groups. Each figure is the mean over these parts.
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
    """Mean of the figures, which are floats. The kind and the number of members are the same in all parts."""
    first = parts[0]
    return {k: sum(p[k] for p in parts) / len(parts) if isinstance(v, float) else v for k, v in first.items()}
