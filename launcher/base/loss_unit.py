"""The unit of a loss, by the spec of its run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PER_TOKEN = "nats per token"
PER_TARGET = "nats per target token"
"""Where only a part of the tokens is predicted, a loss is the mean over that part."""


def loss_unit(spec: Mapping[str, Any]) -> str:
    """`PER_TARGET` where a run of this resolved spec predicts targets alone: targets of pairs, answers of a synthetic
    task, or the decoder's part of a sequence. `PER_TOKEN` elsewhere, and where the spec does not say.
    """
    data = spec.get("data")
    data = data if isinstance(data, Mapping) else {}
    source = data.get("source")
    source = source if isinstance(source, Mapping) else {}
    kind = source.get("type")
    targets = kind == "synthetic" or (kind == "pairs" and source.get("loss", "targets") == "targets")
    return PER_TARGET if targets or data.get("encoder_tokens") is not None else PER_TOKEN
