"""Curves of loss against tokens at annealed ends, and the test of the ratio of tokens at equal loss.

Curves. The curve of a variant is the mean over seeds at each budget. Between budgets it is interpolated by the nearest
three of them with c0 + (c1 + c2 x) e^(-a x), x = ln tokens. This is a power law with an offset, and its first-order
change with the exponent. So it is exact for power laws close to the exponent a, and the interpolated loss is a weighted
sum of losses at the budgets, in which all noise counts. a is the exponent that fits the mean of all curves best (least
squares); 0, a parabola in ln tokens, if that mean is not falling. With two budgets the loss is linear in ln tokens.
Straight lines between budgets of 0.25, 0.5 and 1 overstate tokens by up to 4 % for a = 0.7: in simulated studies of
small noise, most intervals then miss the true ratio.

Interval. For every ratio R there is one test: the mean over paired seeds of the worse one's final loss minus the better
one's loss at T / R, interpolated within the same seed, is 0. For R > 1 the variant is the better one, for R < 1 the
baseline. The interval contains every R that is not rejected (Fieller 1954: a ratio by inversion of a t-test). Therefore
no curve is extrapolated, the noise of the curve counts as well as that of the final losses, and a seed effect cancels
also where the curve is not straight. An end of the interval that leaves the measured range is open.

Spread. The variance of the tested difference is pooled over all variants. It is the sum of A, what all variants have in
common (a seed can have another effect at a smaller budget; S - 1 degrees of freedom), and D, what is left, with
(V - 1)(S - 1). The degrees of freedom of the sum are Satterthwaite's (1946). At R = 1, A is 0, and the variance is that
of `simultaneous.compare_paired`. Variants whose spread is not pooled there rest on their own seeds here, and their
intervals are never narrower than pooled ones. Tests are at Sidak's level for the number of variants: each variant is
compared by a curve of its own, so the correlation of the tests that Dunnett's level needs is not known. The interval
of a speed-up can therefore contain 1 where that of the loss just excludes 0.

Legend: V variants, S seeds, B budgets, N tested ratios.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Table = Mapping[int, Sequence[float]]
"""Seed -> loss at each budget, in the order of budgets."""

_GRID, _FINE = 161, 2001
_EXPONENTS = np.linspace(0.0, 3.0, 121)
_EQUAL = 1e-12
"""Relative difference of losses below which they are equal: rounding of sums."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Positions on a curve: x = ln(tokens / full tokens), at most 0. `knots` [B]: x of each budget, increasing."""

    knots: Any
    exponent: float

    @classmethod
    def of(cls, tokens: Sequence[int], curves: Sequence[Sequence[float]]) -> Axis:
        """Fit the exponent to the mean of curves [B]; 0 for fewer than three budgets and for a mean that rises."""
        knots = np.log(np.asarray(tokens, dtype=np.float64) / tokens[-1])
        if len(tokens) < 3 or not curves:
            return cls(knots=knots, exponent=0.0)
        mean = np.mean(np.asarray(curves), axis=0)
        if np.any(np.diff(mean) >= 0):
            return cls(knots=knots, exponent=0.0)
        return cls(knots=knots, exponent=_best_exponent(knots, mean))

    def weights(self, x: Any) -> Any:
        """x [N] within the knots -> weights [N, B] of the losses at the budgets in the interpolated loss."""
        x, count = np.asarray(x, dtype=np.float64), len(self.knots)
        if count < 3:
            return np.stack([np.interp(x, self.knots, row) for row in np.eye(count)], axis=1)
        segment = np.clip(np.searchsorted(self.knots, x, side="right") - 1, 0, count - 2)
        found = np.zeros((len(x), count))
        for first in range(count - 2):  # a segment uses the budget before it as well, the first segment the one after
            rows = np.maximum(segment - 1, 0) == first
            three = slice(first, first + 3)
            found[rows, three] = np.linalg.solve(self._basis(self.knots[three]).T, self._basis(x[rows]).T).T
        return found

    def _basis(self, x: Any) -> Any:
        """[N, 3]"""
        if not self.exponent:
            return np.stack([np.ones_like(x), x, x * x], axis=1)
        decay = np.exp(-self.exponent * x)
        return np.stack([np.ones_like(x), decay, x * decay], axis=1)

    def where(self, curve: Sequence[float], loss: float) -> float | None:
        """The last x at which a falling curve [B] has a loss; -inf if the loss is above the curve, None if below."""
        if loss > curve[0]:
            return -math.inf
        if loss < curve[-1]:
            return None
        x = np.linspace(self.knots[0], 0.0, _FINE)
        y = self.weights(x) @ np.asarray(curve)
        above = np.flatnonzero(y[:-1] >= loss)
        if not above.size or y[-1] >= loss:
            return 0.0 if y[-1] >= loss else float(x[0])
        i = above[-1]
        return float(x[i] + (x[i + 1] - x[i]) * (y[i] - loss) / (y[i] - y[i + 1]))


def _best_exponent(knots: Any, mean: Any) -> float:
    """The exponent of the power law with an offset that leaves the least squares. knots, mean: [B]"""
    laws = np.where(_EXPONENTS[:, None] > 0, np.exp(-_EXPONENTS[:, None] * knots), -knots)
    laws, mean = laws - laws.mean(1, keepdims=True), mean - mean.mean()
    explained = (laws @ mean) ** 2 / (laws * laws).sum(1)
    return float(_EXPONENTS[np.argmax(explained)])


def falls(curve: Sequence[float]) -> bool:
    """Whether a loss falls from each budget to the next."""
    return all(later < earlier for earlier, later in itertools.pairwise(curve))


# ---------------------------------------------------------------- the test of one ratio


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Losses [V, S, B] of the variants that share one spread, of the seeds that all of them have."""

    losses: Any

    @classmethod
    def of(cls, tables: Sequence[Table]) -> Pool | None:
        """None with fewer than two variants or seeds."""
        seeds = sorted(set.intersection(*(set(t) for t in tables))) if tables else []
        if len(tables) < 2 or len(seeds) < 2:
            return None
        return cls(losses=np.array([[t[s] for s in seeds] for t in tables]))

    def variance(self, weights: Any) -> tuple[Any, Any]:
        """(variance of one seed's tested difference, its degrees of freedom), [N] each. weights [N, B].

        p: final losses, q: interpolated losses. The difference of variant i and curve j is the sum of the mean of p - q
        over variants, which has the variance A, and of the residual of p_i minus that of q_j, with the variance D.
        """
        count, seeds, _ = self.losses.shape
        p = self.losses[:, :, -1:]  # [V, S, 1]
        q = self.losses @ weights.T  # [V, S, N]
        df = (count - 1) * (seeds - 1)
        common = (p.mean(0) - q.mean(0)).var(axis=0, ddof=1)
        p, q = _residuals(p), _residuals(q)
        pp, qq, pq = (x.sum((0, 1)) / df for x in (p * p, q * q, p * q))
        rest = (pp + qq) * (1 - 1 / count) + 2 * pq / count
        total = common + rest
        with np.errstate(invalid="ignore", divide="ignore"):
            freedom = total**2 / (common**2 / (seeds - 1) + rest**2 / df)
        return total, np.where(np.isfinite(freedom), freedom, df)


def _residuals(y: Any) -> Any:
    """Residuals of a table [V, S, N] after removal of variant and seed effects."""
    return y - y.mean(0) - y.mean(1, keepdims=True) + y.mean((0, 1))


@dataclass(frozen=True, kw_only=True)
class RatioTest:
    """Tests of ratios of tokens at equal loss. `level`: the confidence of each test."""

    axis: Axis
    pool: Pool | None
    level: float

    def margin(self, variant: Any, base: Any, log_ratios: Any, *, own: bool) -> Any:
        """Critical minus observed |difference| for each ln R [N]: below 0, R is rejected. variant, base: [S, B]."""
        log_ratios = np.asarray(log_ratios, dtype=np.float64)
        weights = self.axis.weights(np.clip(-np.abs(log_ratios), self.axis.knots[0], 0.0))
        faster = base[:, -1:] - variant @ weights.T  # [S, N]
        slower = variant[:, -1:] - base @ weights.T
        difference = np.where(log_ratios >= 0, faster, slower)
        seen = np.abs(difference.mean(0))
        seen = np.where(seen <= _EQUAL * np.abs(base).mean(), 0.0, seen)
        alone = self._half(difference.var(axis=0, ddof=1), len(base) - 1, len(base))
        if self.pool is None:
            return alone - seen
        variance, df = self.pool.variance(weights)
        half = self._half(variance, df, len(base))
        return (np.maximum(half, alone) if own else half) - seen

    def _half(self, variance: Any, df: Any, n: int) -> Any:
        from scipy import special

        return special.stdtrit(df, 0.5 + self.level / 2) * np.sqrt(variance / n)

    def interval(self, variant: Any, base: Any, estimate: float, *, own: bool) -> tuple[float, float]:
        """Ends of the interval of ln R; infinite where it leaves the measured range. `estimate`: may be infinite."""
        most = -float(self.axis.knots[0])
        inside = [estimate] if math.isfinite(estimate) else []
        grid = np.unique([*np.linspace(-most, most, _GRID), *inside])

        def margin(points: Any) -> Any:
            return self.margin(variant, base, points, own=own)

        kept = np.flatnonzero((margin(grid) >= 0) | np.isin(grid, inside))
        if not kept.size:  # only an estimate beyond the range is rejected everywhere within it
            return (most, math.inf) if estimate > 0 else (-math.inf, -most)
        low = -math.inf if kept[0] == 0 else _crossing(margin, float(grid[kept[0]]), float(grid[kept[0] - 1]))
        last = len(grid) - 1
        high = math.inf if kept[-1] == last else _crossing(margin, float(grid[kept[-1]]), float(grid[kept[-1] + 1]))
        return low, high


def _crossing(margin: Any, kept: float, rejected: float) -> float:
    """Where the margin becomes negative between two points."""
    for _ in range(2):
        points = np.linspace(kept, rejected, 33)
        out = int(np.argmax(margin(points)[1:] < 0)) + 1
        kept, rejected = float(points[out - 1]), float(points[out])
    return rejected
