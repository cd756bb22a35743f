"""Differences of several variants to one baseline, with simultaneous confidence intervals.

Paired runs. The loss of variant v with seed s is modelled as mu_v + seed_s + e_vs. The errors e_vs are independent and
have a common variance. A seed sets the data order and the initial values of all variants, so it is a block. The spread
is estimated from the residuals of all variants together, with (V - 1)(S - 1) degrees of freedom if every variant has
every seed. With missing runs, a difference is the mean over the seeds that the variant shares with the baseline, and
its standard error is that of this mean. The intervals are those of Dunnett (1955): the critical value is the quantile
of the largest |t| over all comparisons with the same baseline. The probability that any interval misses its true
difference is therefore at most 1 - confidence.

A variant or baseline whose residuals are too large for the common variance is removed from the pool. Its intervals are
computed from its own differences, at the Sidak level for the number of comparisons, and are never narrower than the
pooled intervals. The test is an F test of the residuals of that variant against those of the others, at 1 % over all
variants, repeated without the variants that are removed. Several large spreads hide each other: each is small beside
the others. So, as in the many-outlier test of Rosner (1983), up to a third of the variants are set aside even where the
first of them pass, if a later one does not.

Runs that did not see the same data are compared with Welch's (1947) intervals at the Sidak level.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from headway.launcher.base.intervals import CONFIDENCE, t_critical
from headway.launcher.compare.stats import estimate, unpaired_difference

_NODES = 96
"""Number of points of each of the two integrals. Doubling it changes the quantile by less than 1e-4."""
_ODD = 0.01
"""Probability of removing any variant from the pool if all spreads are equal. At 0.05 the largest residuals are removed
too often and the pooled spread is too small: the simulated family-wise error was up to 0.073 instead of 0.05."""
_HIDDEN = 1 / 3
"""Part of the variants that may be removed behind others that pass the test. With a half, the simulated family-wise
error of 6 and 8 equal variants with 2 seeds rises by 0.008, with a third by 0.003 to 0.005, to 0.058 at most."""


@dataclass(frozen=True, kw_only=True)
class Simultaneous:
    """Difference of one variant to the baseline. With one seed, `low`, `high` and the p values are None.

    `low`, `high`: simultaneous interval for all variants. `standard_error`, `degrees_of_freedom`: of the mean
    difference. `p_value`: two-sided, for this variant alone. `p_holm`: adjusted for all comparisons with Holm's
    procedure. `pooled`: whether the spread of all variants was used. `equivalence`: the interval of two one-sided tests
    at 1 - confidence, simultaneous for all comparisons.
    """

    n: int
    mean: float
    standard_error: float | None = None
    degrees_of_freedom: float | None = None
    low: float | None = None
    high: float | None = None
    equivalence: tuple[float, float] | None = None
    p_value: float | None = None
    p_holm: float | None = None
    pooled: bool = False
    confidence: float = CONFIDENCE

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """True if the interval exists and does not contain `value`."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All variants of a study against its baseline.

    `spread`: the pooled standard deviation of one run given its variant and seed, in the unit of the losses; None if
    nothing could be pooled. `degrees_of_freedom`: those of `spread`. `own_spread`: variants that are not pooled,
    possibly including the baseline.
    """

    differences: dict[str, Simultaneous]
    spread: float | None
    degrees_of_freedom: int
    own_spread: tuple[str, ...]
    paired: bool


@functools.cache
def dunnett_critical(
    comparisons: int, degrees_of_freedom: float, *, correlation: float = 0.5, confidence: float = CONFIDENCE
) -> float:
    """Two-sided critical value of Dunnett's test: the `confidence` quantile of max |t_i| over `comparisons` variates.

    The t_i share one variance estimate and have the given pairwise correlation, which is 1/2 for groups of equal size.
    """
    from scipy import optimize

    if comparisons == 1:
        return t_critical(degrees_of_freedom, confidence)
    low = t_critical(degrees_of_freedom, confidence)
    high = t_critical(degrees_of_freedom, sidak(comparisons, confidence)) * 1.001
    found = optimize.brentq(
        lambda c: _all_within(c, comparisons, degrees_of_freedom, correlation) - confidence, low, high, xtol=1e-6
    )
    return cast(float, found)


def dunnett_p(t: float, comparisons: int, degrees_of_freedom: float, *, correlation: float = 0.5) -> float:
    """Two-sided p of Dunnett's test: the probability that the largest |t_i| exceeds |t| if nothing differs.

    It is below 1 - confidence where |t| is above `dunnett_critical`.
    """
    from scipy import special

    if comparisons == 1:
        return float(2 * special.stdtr(degrees_of_freedom, -abs(t)))
    return min(1.0, max(0.0, 1 - _all_within(abs(t), comparisons, degrees_of_freedom, correlation)))


def sidak(comparisons: int, confidence: float = CONFIDENCE) -> float:
    """Confidence level of each interval, for a joint confidence of at least `confidence` (Sidak correction)."""
    return confidence ** (1 / comparisons)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's (1979) step-down adjustment: rejecting at adjusted p <= alpha has a family-wise error of at most alpha."""
    adjusted, so_far = dict[str, float](), 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = so_far
    return adjusted


def compare_paired(
    losses: Mapping[str, Mapping[int, float]], baseline: str, *, confidence: float = CONFIDENCE
) -> Comparison:
    """Compare variants that ran with the same seeds. `losses`: variant -> seed -> loss.

    Seeds that the baseline lacks are ignored. The result omits variants without a common seed.
    """
    base = losses.get(baseline, {})
    common = {v: sorted(by_seed.keys() & base.keys()) for v, by_seed in losses.items()}
    names = [v for v, seeds in common.items() if v != baseline and seeds]
    if not names:
        return Comparison(differences={}, spread=None, degrees_of_freedom=0, own_spread=(), paired=True)
    table = {v: {s: losses[v][s] for s in common[v]} for v in (baseline, *names)}
    odd = _odd_spreads(table)
    pool = {v: by_seed for v, by_seed in table.items() if v not in odd}
    spread, df, covariance = _pooled(pool, baseline) if baseline in pool else (None, 0, {})
    correlation = _least_correlation(covariance)
    differences = {}
    for name in names:
        values = [table[name][s] - base[s] for s in common[name]]
        own = _own(values, len(names), confidence)
        if spread is None or df < 1 or name not in covariance:
            differences[name] = own
            continue
        error = spread * math.sqrt(covariance[name][name])
        pooled = _simultaneous(
            len(values), math.fsum(values) / len(values), error, df, len(names), correlation, confidence, pooled=True
        )
        differences[name] = pooled
    if spread is not None and baseline in pool:
        differences |= {n: _wider(differences[n], spread, df, len(names), confidence) for n in names if n in odd}
    return Comparison(
        differences=_with_holm(differences),
        spread=spread if df else None,
        degrees_of_freedom=df,
        own_spread=tuple(odd),
        paired=True,
    )


def compare_unpaired(
    losses: Mapping[str, Sequence[float]], baseline: str, *, confidence: float = CONFIDENCE
) -> Comparison:
    """Compare variants whose runs did not see the same data, with Welch's intervals. `losses`: variant -> values."""
    names = [v for v, values in losses.items() if v != baseline and values]
    level = sidak(max(1, len(names)), confidence)
    differences = {}
    for name in names:
        wide = unpaired_difference(losses[name], losses.get(baseline, ()), confidence=level)
        if wide is None:
            continue
        narrow = unpaired_difference(losses[name], losses[baseline], confidence=2 * level - 1)
        assert narrow is not None
        differences[name] = Simultaneous(
            n=wide.n,
            mean=wide.mean,
            low=wide.low,
            high=wide.high,
            equivalence=None if narrow.low is None or narrow.high is None else (narrow.low, narrow.high),
            p_value=wide.p_value,
            confidence=confidence,
        )
    return Comparison(
        differences=_with_holm(differences), spread=None, degrees_of_freedom=0, own_spread=(), paired=False
    )


# ---------------------------------------------------------------- one variant


def _simultaneous(
    n: int, mean: float, error: float, df: float, k: int, correlation: float, confidence: float, *, pooled: bool
) -> Simultaneous:
    from scipy import special

    half = dunnett_critical(k, df, correlation=correlation, confidence=confidence) * error
    one_sided = dunnett_critical(k, df, correlation=correlation, confidence=2 * confidence - 1) * error
    p = float(2 * special.stdtr(df, -abs(mean) / error)) if error else float(mean == 0)
    return Simultaneous(
        n=n,
        mean=mean,
        standard_error=error,
        degrees_of_freedom=df,
        low=mean - half,
        high=mean + half,
        equivalence=(mean - one_sided, mean + one_sided),
        p_value=p,
        pooled=pooled,
        confidence=confidence,
    )


def _own(values: Sequence[float], comparisons: int, confidence: float) -> Simultaneous:
    """The result from the differences of the variant alone, at the Sidak level."""
    level = sidak(comparisons, confidence)
    found, narrow = estimate(values, confidence=level), estimate(values, confidence=2 * level - 1)
    return Simultaneous(
        n=found.n,
        mean=found.mean,
        standard_error=None if found.sd is None else found.sd / math.sqrt(found.n),
        degrees_of_freedom=None if found.sd is None else found.n - 1,
        low=found.low,
        high=found.high,
        equivalence=None if narrow.low is None or narrow.high is None else (narrow.low, narrow.high),
        p_value=found.p_value,
        confidence=confidence,
    )


def _wider(own: Simultaneous, spread: float, df: int, comparisons: int, confidence: float) -> Simultaneous:
    """The wider of `own` and the pooled interval."""
    pooled = _simultaneous(
        own.n, own.mean, spread * math.sqrt(2 / own.n), df, comparisons, 0.5, confidence, pooled=False
    )
    return pooled if own.half_width is not None and (pooled.half_width or 0) > own.half_width else own


def _with_holm(differences: Mapping[str, Simultaneous]) -> dict[str, Simultaneous]:
    adjusted = holm({name: d.p_value for name, d in differences.items() if d.p_value is not None})
    return {name: replace(d, p_holm=adjusted.get(name)) for name, d in differences.items()}


# ---------------------------------------------------------------- the model of all variants


def _pooled(
    table: Mapping[str, Mapping[int, float]], baseline: str
) -> tuple[float | None, int, dict[str, dict[str, float]]]:
    """(residual sd, its degrees of freedom, covariance of the differences in units of the residual variance).

    Estimates variant and seed effects by least squares, or by means if every variant has every seed. The covariance is
    that of means over the seeds of each variant, which the baseline has all of. Least squares would estimate a
    difference with missing runs from those of other variants too, with a smaller error that those means do not have.
    """
    names = [baseline, *(v for v in table if v != baseline)]
    seeds = sorted({s for by_seed in table.values() for s in by_seed})
    if all(len(by_seed) == len(seeds) for by_seed in table.values()):
        df = (len(names) - 1) * (len(seeds) - 1)
        if not df:
            return None, 0, {}
        residual = _residuals(np.array([[table[v][s] for s in seeds] for v in names]))
        each = {a: {b: (2.0 if a == b else 1.0) / len(seeds) for b in names[1:]} for a in names[1:]}
        return math.sqrt(float((residual**2).sum()) / df), df, each
    rows = [(names.index(v), seeds.index(s), table[v][s]) for v in names for s in table[v]]
    design = np.zeros((len(rows), len(names) + len(seeds) - 1))
    for row, (v, s, _) in enumerate(rows):
        design[row, v] = 1.0
        if s:
            design[row, len(names) + s - 1] = 1.0
    y = np.array([value for *_, value in rows])
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    df = len(rows) - int(rank)
    if df < 1:
        return None, 0, {}
    residual = y - design @ solution
    shared = {a: {b: len(table[a].keys() & table[b].keys()) for b in names[1:]} for a in names[1:]}
    found = {
        a: {b: (2.0 if a == b else 1.0) * n / (len(table[a]) * len(table[b])) for b, n in by.items()}
        for a, by in shared.items()
    }
    return math.sqrt(float(residual @ residual) / df), df, found


def _least_correlation(covariance: Mapping[str, Mapping[str, float]]) -> float:
    """The smallest correlation of two differences. It makes the critical value conservative: never too small."""
    names = list(covariance)
    found = [covariance[a][b] / math.sqrt(covariance[a][a] * covariance[b][b]) for a in names for b in names if a < b]
    return min(max(min(found, default=0.5), 0.0), 0.99)


def _odd_spreads(table: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Variants whose residuals reject one common variance, at 1 % over all variants.

    Over the seeds that all variants share, the deviations of a variant from the mean of the others have the variance
    (1 + 1 / (V - 1)) sigma^2. They are independent of the residuals of the others among themselves. The ratio has an F
    distribution with S - 1 and (V - 2)(S - 1) degrees of freedom. The variant with the smallest p is set aside, and the
    others are tested again.
    """
    from scipy import special

    odd: list[str] = []
    rejected = 0
    while len(names := [v for v in table if v not in odd]) >= 3:
        seeds = sorted(set.intersection(*(set(table[v]) for v in names)))
        if len(seeds) < 2:
            break
        count = len(names)
        residual = _residuals(np.array([[table[v][s] for s in seeds] for v in names]))
        own = (residual**2).sum(axis=1) * count / (count - 1)
        rest = np.maximum((residual**2).sum() - own, 0.0)
        df, rest_df = len(seeds) - 1, (count - 2) * (len(seeds) - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = special.fdtrc(df, rest_df, (own / df) / (rest / rest_df))
        worst = int(np.nanargmin(np.where(own > 0, p, 1.0)))
        rejects = own[worst] > 0 and p[worst] * len(table) <= _ODD
        if not rejects and len(odd) + 1 >= max(1, int(len(table) * _HIDDEN)):
            break
        odd.append(names[worst])
        rejected = len(odd) if rejects else rejected
    return odd[:rejected]


def _residuals(y: Any) -> Any:
    """Residuals of a complete table [V, S] after removal of variant and seed effects."""
    return y - y.mean(axis=0) - y.mean(axis=1, keepdims=True) + y.mean()


# ---------------------------------------------------------------- the distribution of max |t|


@functools.cache
def _nodes(degrees_of_freedom: float) -> tuple[Any, Any, Any, Any]:
    """Points and weights of z and s: z is standard normal, s^2 is chi-square divided by its degrees of freedom."""
    from scipy import special

    x, w = np.polynomial.legendre.leggauss(_NODES)
    z, z_weights = 9 * x, 9 * w * np.exp(-((9 * x) ** 2) / 2) / math.sqrt(2 * math.pi)
    # sample s by its quantiles, on a scale that is dense at both ends
    angle = (x + 1) * math.pi / 4
    upper = np.cos(angle) ** 2
    s = np.sqrt(special.chdtri(degrees_of_freedom, upper) / degrees_of_freedom)
    return z, z_weights, s, w * math.pi / 4 * np.sin(2 * angle)


def _all_within(c: float, comparisons: int, degrees_of_freedom: float, correlation: float) -> float:
    """P(|t_i| <= c for all i); t_i = (sqrt(rho) Z0 + sqrt(1 - rho) Z_i) / s."""
    from scipy import special

    z, z_weights, s, s_weights = _nodes(degrees_of_freedom)
    shift, scale = math.sqrt(correlation) * z[:, None], math.sqrt(1 - correlation)
    inside = special.ndtr((c * s[None, :] - shift) / scale) - special.ndtr((-c * s[None, :] - shift) / scale)
    return float(z_weights @ inside**comparisons @ s_weights)
