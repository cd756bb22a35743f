"""Learning rate as a function of tokens."""

from __future__ import annotations

import math

from headway.parallel.config import OptimizerConfig, ScheduleConfig


def learning_rate(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, *, tokens_before: int, tokens_after: int, total_tokens: int
) -> float:
    """Learning rate of the step from `tokens_before` to `tokens_after` of `total_tokens`.

    Warm-up is linear in tokens and reaches the peak at `warmup_tokens`. The decay (linear for wsd, half a cosine for
    cosine) ends at `min_lr_ratio` x peak at `total_tokens`. The rate is a pure function of tokens, so a resumed run
    needs no scheduler state.
    """
    floor = schedule.min_lr_ratio
    if tokens_after < schedule.warmup_tokens:
        return optimizer.lr * tokens_after / schedule.warmup_tokens
    if schedule.type == "cosine":
        start = schedule.warmup_tokens
        progress = (tokens_before - start) / max(1, total_tokens - start)
        scale = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    else:
        decay_tokens = schedule.decay_fraction * total_tokens
        left = (total_tokens - tokens_before) / decay_tokens if decay_tokens else 1.0
        scale = min(1.0, max(0.0, left))
    return optimizer.lr * (floor + (1 - floor) * scale)
