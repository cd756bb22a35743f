"""Learning rate schedules: a typed section of the spec each, and the rate as a function of tokens.

A rate is a pure function of tokens, so a resumed run needs no scheduler state. All schedules begin with the same linear
warm-up.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable
from typing import Annotated, Literal

from pydantic import Field

from headway.parallel.config import OptimizerConfig, StrictModel


class _Schedule(StrictModel):
    """Base of the schedules. Tokens are counted from the start of the run."""

    warmup_tokens: int = Field(default=0, ge=0, description="tokens of the linear warm-up, at whose end the rate is lr")

    @abstractmethod
    def factor(self, tokens: int, total: int) -> float:
        """Learning rate divided by its peak for the step that begins at `tokens` of `total`, after the warm-up."""

    def curve(self, total: int) -> Hashable:
        """What determines `factor`: schedules with equal curves have equal factors at all tokens."""
        return (*self.model_dump().values(), total)

    def why_not(self, total: int) -> str | None:
        """Why the schedule does not fit into a run of `total` tokens, with what to do; None if it does."""
        if self.warmup_tokens <= total:
            return None
        return (
            f"warmup_tokens: the warm-up of {self.warmup_tokens:,} tokens does not end within the {total:,} tokens of "
            "the run, so the learning rate never reaches optimizer.lr; use fewer schedule.warmup_tokens, or more "
            "train.tokens"
        )


class _WithFloor(_Schedule):
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="final learning rate divided by the peak")

    def _above_floor(self, scale: float) -> float:
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * min(1.0, max(0.0, scale))


class WsdSchedule(_WithFloor):
    """Warm-up, constant rate, linear decay (warmup-stable-decay: Hu et al., 2024, arXiv 2404.06395)."""

    type: Literal["wsd"] = "wsd"
    decay_fraction: float = Field(default=0.2, ge=0, le=1, description="last fraction of the tokens, with decay")

    def factor(self, tokens: int, total: int) -> float:
        decay_tokens = self.decay_fraction * total
        return self._above_floor((total - tokens) / decay_tokens if decay_tokens else 1.0)

    def why_not(self, total: int) -> str | None:
        if (reason := super().why_not(total)) is not None:
            return reason
        stable = total - self.decay_fraction * total
        if self.warmup_tokens <= stable + 1:  # one token for the rounding of a fraction such as 0.9
            return None
        return (
            f"decay_fraction: the decay begins at token {int(stable):,}, before the warm-up ends at token "
            f"{self.warmup_tokens:,}, so the learning rate would jump; use schedule.decay_fraction of at most "
            f"{math.floor((1 - self.warmup_tokens / total) * 1000) / 1000:g}, or fewer schedule.warmup_tokens"
        )


class CosineSchedule(_WithFloor):
    """Warm-up, then half a cosine to the end of the run (Loshchilov and Hutter, 2017, arXiv 1608.03983)."""

    type: Literal["cosine"] = "cosine"

    def factor(self, tokens: int, total: int) -> float:
        return self._above_floor(0.5 * (1 + math.cos(math.pi * _progress(tokens, self.warmup_tokens, total))))


class LinearSchedule(_WithFloor):
    """Warm-up, then linear decay to the end of the run."""

    type: Literal["linear"] = "linear"

    def factor(self, tokens: int, total: int) -> float:
        return self._above_floor(1 - _progress(tokens, self.warmup_tokens, total))


class InverseSqrtSchedule(_Schedule):
    """Warm-up, then the inverse square root of the tokens (Vaswani et al., 2017, arXiv 1706.03762).

    The rate at t tokens is lr sqrt(warmup_tokens / t). It does not depend on the length of the run.
    """

    type: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup_tokens: int = Field(ge=1, description="tokens of the linear warm-up, and the scale of the decay after it")

    def factor(self, tokens: int, total: int) -> float:
        return math.sqrt(self.warmup_tokens / max(tokens, self.warmup_tokens))

    def curve(self, total: int) -> Hashable:
        return tuple(self.model_dump().values())


AnySchedule = Annotated[
    WsdSchedule | CosineSchedule | LinearSchedule | InverseSqrtSchedule, Field(discriminator="type")
]


def learning_rate(
    optimizer: OptimizerConfig, schedule: AnySchedule, *, tokens_before: int, tokens_after: int, total_tokens: int
) -> float:
    """Learning rate of the step from `tokens_before` to `tokens_after` of `total_tokens`.

    Warm-up is linear in the tokens after the step and reaches the peak at `warmup_tokens`. The rate after it is
    computed at the tokens before the step.
    """
    if tokens_after < schedule.warmup_tokens:
        return optimizer.lr * tokens_after / schedule.warmup_tokens
    return optimizer.lr * schedule.factor(tokens_before, total_tokens)


def _progress(tokens: int, start: int, total: int) -> float:
    """Fraction of the tokens between `start` and `total` that are trained, within 0 to 1."""
    return min(1.0, max(0.0, (tokens - start) / max(1, total - start)))
