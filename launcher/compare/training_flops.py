"""FLOPs of training, from the costs that a study records of its variants. Schedules such as `k_schedule` count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

TRAINING = 3.0
"""Training FLOPs / forward FLOPs."""


def training_flops(cost: Mapping[str, Any], tokens: ArrayLike) -> NDArray[np.float64]:
    """Useful FLOPs of the training up to each of `tokens` training tokens, in their shape.

    `cost`: of a variant. `flops_per_token_stages` [[from tokens, useful forward FLOPs per token], ...] is there only if
    they change in training.
    """
    trained = np.asarray(tokens, dtype=np.float64)
    stages = cost.get("flops_per_token_stages") or [[0, cost["flops_per_token_useful"]]]
    ends = [*(begin for begin, _ in stages[1:]), np.inf]
    parts = [
        (np.minimum(trained, end) - begin).clip(min=0) * flops for (begin, flops), end in zip(stages, ends, strict=True)
    ]
    return TRAINING * np.sum(parts, axis=0)


def per_token(cost: Mapping[str, Any], tokens: int | None) -> float:
    """Useful forward FLOPs per token, as the mean over the first `tokens` training tokens; None: at the end."""
    if not tokens:
        return float(cost["flops_per_token_useful"])
    return float(training_flops(cost, tokens)) / TRAINING / tokens
