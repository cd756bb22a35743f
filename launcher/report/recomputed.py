"""What reports say of layers whose backward pass executes more than twice the FLOPs of their forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def recomputation(value: Any) -> str:
    """A sentence, after a space, if a spec in `value` (records of studies) has such layers; else the empty string."""
    if not _has_delta(value):
        return ""
    return (
        " Layers of `gated_delta` compute their states again in the backward pass: in training, their core executes up "
        "to five times its forward FLOPs, not three times, which no number here counts."
    )


def _has_delta(value: Any, key: str = "") -> bool:
    if isinstance(value, Mapping):
        return any(_has_delta(item, str(name)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return any(_has_delta(item, key) for item in value)
    return value == "gated_delta" and key.rpartition(".")[2] == "type"
