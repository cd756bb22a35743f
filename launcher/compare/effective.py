"""How many times less of a cost a variant needs than the baseline for the same loss.

The speed-up in tokens, R, compares the better of the two by mean loss at the full budget with the worse: the better one
needs T / R tokens for the loss that the worse one reaches with T. R > 1 if the variant is the better one; otherwise the
ratio is inverted. Only losses at annealed ends are compared: cells of several budgets, each with a learning rate that
has decayed at its end. `headway.launcher.compare.equal_loss` interpolates the curves and gives the interval of R.

By FLOPs, R is multiplied with the ratio of the FLOPs per token, which is known exactly. By seconds, it is multiplied
with the ratio of the measured tokens per second. Both intervals are combined by the squares of their halves (MOVER, Zou
and Donner 2008): losses and speeds are assumed to be independent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from headway.launcher.base.intervals import CONFIDENCE
from headway.launcher.compare.equal_loss import Axis, Pool, RatioTest, Table, falls
from headway.launcher.compare.simultaneous import Simultaneous, compare_paired, sidak

Losses = Mapping[str, Mapping[float, Mapping[int, float]]]
"""Variant -> budget -> seed -> loss at the annealed end, nats per token."""

HOW_TO_MEASURE = "`budgets: [0.25, 0.5, 1]` in the study would measure it"


@dataclass(frozen=True, kw_only=True)
class SpeedUp:
    """Baseline's cost over the variant's cost at equal loss: above 1, the variant needs less.

    `lowest`, `highest`: ends of what the budgets can measure. `value`: 0 if it lies below `lowest`, infinite if above
    `highest`. `low`, `high`: the interval, simultaneous for all variants, with the same meaning of 0 and infinity; None
    with one seed.
    """

    n: int
    value: float
    low: float | None
    high: float | None
    lowest: float
    highest: float

    def times(self, factor: float) -> SpeedUp:
        """The same with every number multiplied by an exactly known factor."""
        low, high = (None if x is None else x * factor for x in (self.low, self.high))
        return SpeedUp(
            n=self.n,
            value=self.value * factor,
            low=low,
            high=high,
            lowest=self.lowest * factor,
            highest=self.highest * factor,
        )

    def excludes(self, value: float) -> bool:
        """True if the interval exists and does not contain `value`."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high

    def __str__(self) -> str:
        """Such as `1.42x [1.20, 1.71]`, `> 4.0x [3.10, > 4.0]` or `1.42x (no interval)`."""
        if self.low is None or self.high is None:
            return f"{self._number(self.value)}x (no interval)"
        return f"{self._number(self.value)}x [{self._number(self.low)}, {self._number(self.high)}]"

    def _number(self, value: float) -> str:
        if value == 0:
            return f"< {self.lowest:.2g}"
        if math.isinf(value):
            return f"> {self.highest:.2g}"
        narrow = self.low is not None and self.high is not None and self.high - self.low < 0.1
        return f"{value:.3f}" if narrow else ratio_text(value)


def ratio_text(value: float) -> str:
    """A ratio with two digits, or with three near 1, so that rounding does not hide on which side of 1 it lies."""
    return f"{value:.3f}" if value != 1 and f"{value:.2f}" == "1.00" else f"{value:.2f}"


@dataclass(frozen=True, kw_only=True)
class Effective:
    """One variant against the baseline. The speed-ups are None, and `why` says why, if they are not measured.

    `curve_of`: the better one, whose curve gives the estimate. `earlier`, the reverse: (share
    of the full budget, speed-up in tokens) at the losses that the better one reached with each smaller budget, read
    from the curve of the other one; None outside of that curve. These are estimates without interval.
    """

    tokens: SpeedUp | None = None
    flops: SpeedUp | None = None
    seconds: SpeedUp | None = None
    why: str = ""
    curve_of: str = ""
    earlier: tuple[tuple[float, float | None], ...] = ()


@dataclass(frozen=True, kw_only=True)
class EffectiveCosts:
    """All variants. `tokens`: budget -> tokens at its end, increasing. `exponent`: a of the interpolation.

    `curves`: variant -> mean loss at each budget over the seeds that have all budgets. `why`: why nothing is measured.
    """

    tokens: dict[float, int]
    exponent: float = 0.0
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    by_variant: dict[str, Effective] = field(default_factory=dict)
    why: str = ""


def effective_costs(
    losses: Losses,
    tokens: Mapping[float, int],
    baseline: str,
    *,
    flops: Mapping[str, float],
    speeds: Mapping[str, Mapping[int, float]],
    own_spread: Collection[str] = (),
    paired: bool = True,
    confidence: float = CONFIDENCE,
) -> EffectiveCosts:
    """Speed-ups of all variants. `tokens`: tokens at the end of each budget; the largest is the full budget.

    `flops`: training or forward FLOPs per token. `speeds`: variant -> seed -> tokens per second. `own_spread`: variants
    whose spread is not pooled. Without `paired`, no spread is pooled.
    """
    ends = {budget: tokens[budget] for budget in sorted(tokens, key=lambda b: tokens[b])}
    tables = {v: _complete(by_budget, list(ends)) for v, by_budget in losses.items()}
    curves = {v: tuple(np.mean(list(rows.values()), axis=0).tolist()) for v, rows in tables.items() if rows}
    axis = Axis.of(list(ends.values()), list(curves.values()))
    pooled = [v for v in tables if tables[v] and v not in own_spread]
    test = RatioTest(
        axis=axis,
        pool=Pool.of([tables[v] for v in pooled]) if paired and baseline in pooled else None,
        level=sidak(max(1, len(losses) - 1), confidence),
    )
    log_speeds = {v: {s: math.log(x) for s, x in by_seed.items()} for v, by_seed in speeds.items()}
    speed = compare_paired(log_speeds, baseline, confidence=confidence).differences
    found = {}
    for name in losses:
        if name == baseline:
            continue
        one = _one(name, tables[name], baseline, tables.get(baseline, {}), test, own=name in own_spread)
        if one.tokens is not None:
            seconds = None if name not in speed else _with_speed(one.tokens, speed[name])
            one = replace(one, flops=one.tokens.times(flops[baseline] / flops[name]), seconds=seconds)
        found[name] = one
    return EffectiveCosts(tokens=ends, exponent=axis.exponent, curves=curves, by_variant=found)


def _complete(by_budget: Mapping[float, Mapping[int, float]], budgets: Sequence[float]) -> Table:
    """Seed -> loss at each budget, of the seeds that have them all."""
    seeds = set.intersection(*(set(by_budget.get(b, {})) for b in budgets)) if budgets else set[int]()
    return {s: [by_budget[b][s] for b in budgets] for s in sorted(seeds)}


# ---------------------------------------------------------------- one variant


def _one(name: str, variant: Table, baseline: str, base: Table, test: RatioTest, *, own: bool) -> Effective:
    seeds = sorted(variant.keys() & base.keys())
    if not seeds:
        return Effective(why="no seed has finished all budgets of both")
    ours, theirs = (np.array([table[s] for s in seeds]) for table in (variant, base))
    mean, other = ours.mean(0), theirs.mean(0)
    ahead = mean[-1] <= other[-1]
    better, worse = (mean, other) if ahead else (other, mean)
    curve_of = name if ahead else baseline
    if not falls(better):
        shown = ", ".join(f"{loss:.4f}" for loss in better)
        return Effective(why=f"the loss of {curve_of} does not fall from budget to budget ({shown})", curve_of=curve_of)
    axis, sign = test.axis, 1 if ahead else -1
    x = axis.where(better, float(worse[-1]))
    assert x is not None, "the worse loss is not below the better one's last"
    estimate = -sign * x
    low = high = None
    if len(seeds) > 1:
        low, high = (math.exp(end) for end in test.interval(ours, theirs, estimate, own=own))
    most = math.exp(-float(axis.knots[0]))
    ratio = SpeedUp(n=len(seeds), value=math.exp(estimate), low=low, high=high, lowest=1 / most, highest=most)
    return Effective(tokens=ratio, curve_of=curve_of, earlier=_earlier(axis, better, worse, sign))


def _earlier(axis: Axis, better: Any, worse: Any, sign: int) -> tuple[tuple[float, float | None], ...]:
    if not falls(worse):
        return ()
    found = []
    for x, loss in zip(axis.knots[:-1], better[:-1], strict=True):
        at = axis.where(worse, float(loss))
        if at is None or math.isinf(at):
            found.append((math.exp(float(x)), None))
        else:
            found.append((math.exp(float(x)), math.exp(sign * (at - float(x)))))
    return tuple(found)


def _with_speed(tokens: SpeedUp, speed: Simultaneous) -> SpeedUp:
    """Multiply with the ratio of tokens per second. `speed`: of its logarithm."""
    found = tokens.times(math.exp(speed.mean))
    if tokens.low is None or tokens.high is None or speed.half_width is None:
        return replace(found, low=None, high=None)
    ends = []
    for end, sign in ((tokens.low, -1), (tokens.high, 1)):
        if end == 0 or math.isinf(end) or not 0 < tokens.value < math.inf:
            # An open end stays open. The distance of an end to an estimate that is open is not known.
            ends.append(end * math.exp(speed.mean + sign * speed.half_width))
            continue
        half = math.hypot(math.log(end / tokens.value), speed.half_width)
        ends.append(found.value * math.exp(sign * half))
    return replace(found, low=ends[0], high=ends[1])
