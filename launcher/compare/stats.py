"""Small-sample statistics of a study: there are few seeds per variant, so all intervals use Student's t distribution.

There is one value per seed. Seed i uses the same data order and the same initial values of shared parameters in every
variant, so differences are taken within each seed. This removes the common variation (Student 1908, paired design).
With one seed there is no interval: the fields are None, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from headway.launcher.base.intervals import CONFIDENCE, t_critical


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over `n` seeds. `sd` (n-1 in the denominator), `low`, `high` and `p_value` are None if n < 2.

    `p_value`: two-sided, for the hypothesis that the true mean is zero (one for a ratio).
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    p_value: float | None
    confidence: float = CONFIDENCE

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """True if the interval exists and does not contain `value`."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def sd_factor(degrees_of_freedom: int, confidence: float = CONFIDENCE) -> float:
    """Upper end of the two-sided chi-square interval of the true sd, as a multiple of the observed sd."""
    from scipy import special

    return math.sqrt(degrees_of_freedom / special.chdtri(degrees_of_freedom, 0.5 + confidence / 2))


def _p_value(t: float, degrees_of_freedom: float) -> float:
    from scipy import special

    return float(2 * special.stdtr(degrees_of_freedom, -abs(t)))


def _t_estimate(n: int, mean: float, sd: float | None, standard_error: float, df: float, confidence: float) -> Estimate:
    half = t_critical(df, confidence) * standard_error
    if standard_error == 0:
        p_value = 1.0 if mean == 0 else 0.0
    else:
        p_value = _p_value(mean / standard_error, df)
    return Estimate(n=n, mean=mean, sd=sd, low=mean - half, high=mean + half, p_value=p_value, confidence=confidence)


def estimate(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Estimate:
    """Mean, sample standard deviation and t interval. Raises ValueError without values."""
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(n=1, mean=mean, sd=None, low=None, high=None, p_value=None, confidence=confidence)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return _t_estimate(n, mean, sd, sd / math.sqrt(n), n - 1, confidence)


def paired_difference(
    variant: Mapping[int, float], baseline: Mapping[int, float], *, confidence: float = CONFIDENCE
) -> Estimate | None:
    """Mean of (variant - baseline) over the common seeds, with its t interval. None without a common seed.

    Keys are seeds.
    """
    seeds = sorted(variant.keys() & baseline.keys())
    if not seeds:
        return None
    return estimate([variant[s] - baseline[s] for s in seeds], confidence=confidence)


def unpaired_difference(
    variant: Sequence[float], baseline: Sequence[float], *, confidence: float = CONFIDENCE
) -> Estimate | None:
    """Difference of means with Welch's interval (Welch 1947), for runs that did not see the same data.

    None if either side is empty. No interval if either side has one value. `n` is the smaller number of values.
    """
    if not variant or not baseline:
        return None
    a, b = estimate(variant), estimate(baseline)
    n, mean = min(a.n, b.n), a.mean - b.mean
    if a.sd is None or b.sd is None:
        return Estimate(n=n, mean=mean, sd=None, low=None, high=None, p_value=None, confidence=confidence)
    va, vb = a.sd**2 / a.n, b.sd**2 / b.n
    if va + vb == 0:
        return _t_estimate(n, mean, None, 0.0, a.n + b.n - 2, confidence)
    df = (va + vb) ** 2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1))
    return _t_estimate(n, mean, None, math.sqrt(va + vb), df, confidence)


def paired_ratio(
    variant: Mapping[int, float], baseline: Mapping[int, float], *, confidence: float = CONFIDENCE
) -> Estimate | None:
    """Geometric mean of variant / baseline over the common seeds. The interval is a t interval of the logarithms.

    `sd`: that of the logarithms (approximately the relative spread). None without a common seed.
    """
    logs = paired_difference(
        {s: math.log(v) for s, v in variant.items()},
        {s: math.log(v) for s, v in baseline.items()},
        confidence=confidence,
    )
    if logs is None:
        return None
    return Estimate(
        n=logs.n,
        mean=math.exp(logs.mean),
        sd=logs.sd,
        low=None if logs.low is None else math.exp(logs.low),
        high=None if logs.high is None else math.exp(logs.high),
        p_value=logs.p_value,
        confidence=confidence,
    )


def power_of_paired_test(n: int, sd: float, difference: float, *, confidence: float = CONFIDENCE) -> float:
    """Power of a two-sided paired t-test over `n` seeds for a true `difference`. `sd`: that of the paired differences.

    Uses the noncentral t distribution (Cohen 1988, ch. 2).
    """
    from scipy import special

    if n < 2:
        return 0.0
    critical, shift = t_critical(n - 1, confidence), abs(difference) / sd * math.sqrt(n)
    # The lower tail (significant with the wrong sign) is left out: it does not count as a detection.
    below = float(special.nctdtr(n - 1, shift, critical))
    # Far from the critical value the series underflows to nan; the power is then 1.
    return 1.0 if math.isnan(below) else 1.0 - below


def seeds_needed(
    sd: float, difference: float, *, power: float = 0.8, confidence: float = CONFIDENCE, limit: int = 10_000
) -> int | None:
    """Minimum number of seeds with which a paired t-test detects a true `difference` with probability `power`.

    `sd`: that of the paired differences. An estimate from two or three seeds is itself imprecise. None if `difference`
    is zero or more than `limit` seeds are needed.
    """
    if difference == 0:
        return None
    if sd == 0:
        return 2
    if power_of_paired_test(limit, sd, difference, confidence=confidence) < power:
        return None
    low, high = 1, limit
    while high - low > 1:
        middle = (low + high) // 2
        if power_of_paired_test(middle, sd, difference, confidence=confidence) >= power:
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Steady training speed in tokens/s: at the median step time, and at its quartiles (`low` <= median <= `high`)."""

    tokens_per_s: float
    low: float
    high: float
    steps: int


def steady_speed(step_s: Sequence[float], tokens_per_step: int) -> Speed | None:
    """Speed after warm-up: the first 10 % of the steps, at least two, are dropped. None if no steps are left."""
    dropped = max(2, math.ceil(0.1 * len(step_s)))
    kept = np.asarray(step_s[dropped:], dtype=np.float64)
    kept = kept[np.isfinite(kept) & (kept > 0)]
    if kept.size == 0:
        return None
    first, median, third = np.quantile(kept, [0.25, 0.5, 0.75])
    return Speed(
        tokens_per_s=tokens_per_step / float(median),
        low=tokens_per_step / float(third),
        high=tokens_per_step / float(first),
        steps=int(kept.size),
    )
