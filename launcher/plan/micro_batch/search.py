"""Choose a micro-batch: try sizes in increasing order, and select the smallest whose speed is close to the best.

This module runs no model and knows no device: `Trials` returns the memory and speed of a size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

NEAR = 0.02
"""Speeds within this share of the best count as equal. The smallest such micro-batch needs the least memory."""

GROWTH = 1.5
"""Each size is at least this many times the previous one, because closer sizes differ by less than the noise."""

PATIENCE = 2
"""The search ends after this many sizes in a row that are not faster. A single one may be noise."""

WARM_UP = 2
ROUNDS = 5
"""Passes of a size: `WARM_UP` passes that are not timed, then at least `ROUNDS` timed ones."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Timed passes of one size."""

    seconds: Sequence[float]  # of each timed forward and backward pass
    memory_bytes: float  # peak memory of a rank that trains with this size


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Tokens per second of one rank: median and quartiles over the timed passes."""

    median: float
    q1: float
    q3: float
    passes: int

    @property
    def noise(self) -> float:
        """Half the interquartile range."""
        return (self.q3 - self.q1) / 2


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Result for one size. `why_not`: the reason why it does not fit; None if it fits."""

    micro_batch: int
    memory_bytes: float | None  # of a rank; None if memory ran out before it was known
    rate: Rate | None = None
    why_not: str | None = None

    @property
    def fits(self) -> bool:
        return self.why_not is None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Result of a search. `micro_batch` is None if even the smallest size does not fit. `why`: reason, as text."""

    micro_batch: int | None
    trials: tuple[Trial, ...]
    why: str


class Trials(Protocol):
    """Source of memory and speed for a search."""

    def planned_bytes(self, micro_batch: int) -> float | None:
        """Memory of a rank by the plan, if the plan alone decides whether a size is tried; else None."""
        ...

    def run(self, micro_batch: int) -> Timed | str:
        """Time passes of this size. Returns a text if memory ran out."""
        ...


def ladder(sizes: Sequence[int]) -> list[int]:
    """The sizes to try, from increasing `sizes`: each at least `GROWTH` times the previous one."""
    steps: list[int] = []
    for size in sizes:
        if not steps or size >= GROWTH * steps[-1]:
            steps.append(size)
    return steps


def search(
    sizes: Sequence[int],
    trials: Trials,
    *,
    tokens_per_sequence: int,
    limit_bytes: float,
    seconds_left: Callable[[], float],
    say: Callable[[Trial], None],
) -> Choice:
    """Try `ladder(sizes)` until one does not fit, `PATIENCE` in a row are not faster, or time is up; then choose.

    `limit_bytes`: memory available to a rank. `seconds_left`: remaining time. The first size is always tried.
    """
    done: list[Trial] = []
    idle, end = 0, "larger ones do not divide the batch of a rank"
    for size in ladder(sizes):
        if done and _expected_seconds(done[-1], size, tokens_per_sequence) > seconds_left():
            end = f"{size} and more were not tried, because the time was up"
            break
        best = max((trial.rate.median for trial in done if trial.rate), default=0.0)
        trial = _try(size, trials, tokens_per_sequence, limit_bytes)
        done.append(trial)
        say(trial)
        if not trial.fits or trial.rate is None:
            end = f"{size} does not fit"
            break
        idle = 0 if trial.rate.median - trial.rate.noise > (1 + NEAR) * best else idle + 1
        if idle == PATIENCE:
            end = "larger ones are not faster"
            break
    return _chosen(done, end)


def _try(size: int, trials: Trials, tokens_per_sequence: int, limit_bytes: float) -> Trial:
    planned = trials.planned_bytes(size)
    if planned is not None and planned > limit_bytes:
        return Trial(micro_batch=size, memory_bytes=planned, why_not="the plan needs more memory than there is")
    timed = trials.run(size)
    if isinstance(timed, str):
        return Trial(micro_batch=size, memory_bytes=planned, why_not=timed)
    rates = [size * tokens_per_sequence / seconds for seconds in timed.seconds]
    q1, median, q3 = statistics.quantiles(rates, n=4, method="inclusive")
    too_much = "with optimizer states and gradients it needs more memory than there is"
    return Trial(
        micro_batch=size,
        memory_bytes=timed.memory_bytes,
        rate=Rate(median=median, q1=q1, q3=q3, passes=len(rates)),
        why_not=too_much if timed.memory_bytes > limit_bytes else None,
    )


def _expected_seconds(last: Trial, size: int, tokens_per_sequence: int) -> float:
    """Expected seconds of a size's passes, at the speed per token of the previous size."""
    assert last.rate is not None, "a search ends at the first size without one"
    return (WARM_UP + ROUNDS) * size * tokens_per_sequence / last.rate.median


def _chosen(done: Sequence[Trial], end: str) -> Choice:
    fast = {trial.micro_batch: trial.rate.median for trial in done if trial.fits and trial.rate is not None}
    if not fast:
        return Choice(micro_batch=None, trials=tuple(done), why=f"{end}, which is the smallest")
    best = max(fast, key=lambda size: fast[size])
    chosen = min(size for size, rate in fast.items() if rate >= (1 - NEAR) * fast[best])
    why = "the fastest" if chosen == best else f"within {NEAR:.0%} of the fastest ({best}) with less memory"
    return Choice(micro_batch=chosen, trials=tuple(done), why=f"{why}; {end}")
