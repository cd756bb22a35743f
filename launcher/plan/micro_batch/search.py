"""Which micro-batch to take: sizes are tried from the smallest up, and the smallest of the fast ones is chosen.

Nothing here runs a model or knows a device: what a size needs and how fast it is is asked of `Trials`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

NEAR = 0.02
"""Speeds within this share of the best are the same: the smallest micro-batch of them needs the least memory."""

GROWTH = 1.5
"""The next size tried is at least so many times as large: neighbours differ by less than noise."""

PATIENCE = 2
"""Sizes in a row that bring nothing, after which larger ones are not tried: one alone may be noise."""

WARM_UP = 2
ROUNDS = 5
"""Passes of a size: at least this many are timed, after some that are not."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Passes of one size that ran to their end."""

    seconds: Sequence[float]  # of each timed forward and backward pass
    memory_bytes: float  # of a rank that trains with this size, at its fullest


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Tokens per second of one rank's passes: median and quartiles of the timed ones."""

    median: float
    q1: float
    q3: float
    passes: int

    @property
    def noise(self) -> float:
        """Half the distance of the quartiles."""
        return (self.q3 - self.q1) / 2


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was found of one size. `why_not`: why it does not fit; None where it does."""

    micro_batch: int
    memory_bytes: float | None  # of a rank; None where it died before that was known
    rate: Rate | None = None
    why_not: str | None = None

    @property
    def fits(self) -> bool:
        return self.why_not is None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`micro_batch` is None where not even the smallest size fits. `why`: in words, for the console and the record."""

    micro_batch: int | None
    trials: tuple[Trial, ...]
    why: str


class Trials(Protocol):
    """What a search asks."""

    def planned_bytes(self, micro_batch: int) -> float | None:
        """What a rank is computed to need, where that alone decides whether a size is tried; else None."""
        ...

    def run(self, micro_batch: int) -> Timed | str:
        """Time passes of this size; text where memory ran out."""
        ...


def ladder(sizes: Sequence[int]) -> list[int]:
    """Of increasing sizes those that are tried: each at least GROWTH times the one before."""
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
    """Try `ladder(sizes)` until one does not fit, two in a row are no faster, or time is up; then choose.

    `limit_bytes`: what a rank may have; `seconds_left`: of the time allowed; the first size is tried in any case.
    """
    done: list[Trial] = []
    idle, end = 0, "larger ones do not divide the batch of a rank"
    for size in ladder(sizes):
        if done and _expected_seconds(done[-1], size, tokens_per_sequence) > seconds_left():
            end = f"{size} and more were not tried: the time for it was up"
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
            end = "larger ones bring no more"
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
    """A size's passes, were it no faster per token than the one before."""
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
