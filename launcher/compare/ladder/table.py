"""The losses of a ladder of sizes as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of a ladder. `losses`: variant -> seed -> validation loss, nats per token.

    `params`, `flops`: variant -> parameters, and useful training FLOPs of one run.
    """

    name: str
    losses: Mapping[str, Mapping[int, float]]
    params: Mapping[str, float]
    flops: Mapping[str, float]


class Refusal(ValueError):
    """Why a number is not computed, and what to do. It is shown in place of the number."""
