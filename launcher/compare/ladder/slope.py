"""Whether a variant's difference to the baseline changes with size: its slope over ln N.

Model. Within a size, the difference of two variants is that of their means, so the common effects of seeds and of the
size cancel. The difference d_v(N) is a straight line in ln N plus a deviation of each size (lack of fit), whose
variance is added to that of seeds. Sizes are weighted by the inverse of both. The line assumes no law and no
irreducible loss, and its slope is the simplest number that tells "falls off" from "does not".

Test. Slopes of all variants are compared with 0 at once (Dunnett). With at least four degrees of freedom of lack of
fit, the variance is multiplied by the mean square of the residuals of all lines in units of their variance, and has
their degrees of freedom (Hartung and Knapp 2001): it is right whether lack of fit is small or larger than the noise.
With fewer, this would widen intervals by half, and the degrees of freedom are Satterthwaite's: the interval is right if
lack of fit is at most about a third of the noise of a run. docs/ladders.md has the coverage of several methods.

Legend: M means, I sizes, V variants, K = V - 1 slopes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from headway.launcher.base.intervals import CONFIDENCE
from headway.launcher.compare.ladder.noise import LackOfFit, Means, adjusted_p, critical, freedom, lack_of_fit
from headway.launcher.compare.ladder.table import Refusal

Direction = Literal["grows", "shrinks", "undecided"]
LEAST_SIZES = 3
DOUBLING = math.log(2)
"""Of parameters, in ln N."""
OWN_SPREAD = 4
"""Least degrees of freedom of lack of fit with which the residuals of the lines alone give their spread."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """The difference of one variant (its loss minus the baseline's) as a line: middle + slope (ln N - center).

    `low`, `high`: interval of the slope, simultaneous for all variants, in nats per unit of ln N. `covariance` [2, 2]:
    of (middle, slope), with lack of fit. `critical`: the factor of standard errors in simultaneous intervals.
    `p_value`: of this variant alone; `p_adjusted`: for all variants at once, by the same test as the interval.
    """

    center: float
    middle: float
    slope: float
    standard_error: float
    degrees_of_freedom: float
    low: float
    high: float
    p_value: float
    p_adjusted: float
    covariance: Any
    critical: float

    @property
    def verdict(self) -> Direction:
        """Of the advantage, the baseline's loss minus the variant's: a rising difference is a shrinking advantage."""
        if self.low > 0:
            return "shrinks"
        return "grows" if self.high < 0 else "undecided"

    def at(self, x: Any, extra: float = 0.0) -> tuple[Any, Any]:
        """(difference, half width) at ln N = x. `extra`: a variance to add, such as that of a new size."""
        row = np.stack([np.ones_like(np.asarray(x, float)), np.asarray(x, float) - self.center], axis=-1)
        variance = np.einsum("...i,ij,...j", row, self.covariance, row) + extra
        return row @ np.array([self.middle, self.slope]), self.critical * np.sqrt(variance)


@dataclass(frozen=True, kw_only=True)
class Lines:
    """All variants. `lack`: lack of fit around the lines. `refused`: variant -> why it has no line."""

    by_variant: dict[str, Line]
    lack: LackOfFit
    refused: dict[str, str]


def lines_of(means: Means, x: Any, baseline: str, *, confidence: float = CONFIDENCE) -> Lines:
    """Fit the lines. `x` [I]: ln of the parameters of the baseline at each size. Raises Refusal with too few sizes."""
    base = means.variants.index(baseline)
    with_base = [i for i in range(len(means.sizes)) if means.at(base, i) is not None]
    if len(with_base) < LEAST_SIZES:
        raise Refusal(
            f"{baseline} has finished runs at {len(with_base)} size{'s' * (len(with_base) != 1)}; a trend with lack of "
            f"fit needs {LEAST_SIZES}: train another size"
        )
    count = {v: sum(means.at(v, i) is not None for i in with_base) for v in range(len(means.variants)) if v != base}
    names = [v for v, n in count.items() if n >= LEAST_SIZES]
    refused = {
        means.variants[v]: f"it has finished runs at {n} of the sizes of {baseline}; a trend needs {LEAST_SIZES}"
        for v, n in count.items()
        if v not in names
    }
    if not names:
        raise Refusal(f"no variant has finished runs at {LEAST_SIZES} sizes of {baseline}: train another size")
    used = means.keep(np.isin(means.variant, [base, *names]) & np.isin(means.size, with_base))
    center = float(np.mean(np.asarray(x)[with_base]))
    design = _design(used, np.asarray(x) - center, base, names, with_base)
    rows, lack, scale = _least_squares(used, design)
    rows = rows[len(with_base) :]
    found = rows @ used.mean
    unit = np.eye(len(used.mean))
    parts = [np.einsum("km,mn,kn->k", rows, part, rows) for part in (used.run_part, used.seed_part, unit)]
    own = lack.df >= OWN_SPREAD
    df = np.full(len(rows), lack.df) if own else freedom(used.noise, lack, *parts)
    covariance = rows @ (used.covariance + lack.sd**2 * unit) @ rows.T * (scale if own else 1.0)
    k = len(names)
    error = np.sqrt(np.diag(covariance))[k:]
    correlation = _least_correlation(covariance[k:, k:])
    by_variant = {}
    for j, v in enumerate(names):
        nu, slope, se = float(df[k + j]), float(found[k + j]), float(error[j])
        factor = critical(k, nu, correlation=correlation, confidence=confidence)
        by_variant[means.variants[v]] = Line(
            center=center,
            middle=float(found[j]),
            slope=slope,
            standard_error=se,
            degrees_of_freedom=nu,
            low=slope - factor * se,
            high=slope + factor * se,
            p_value=_p_value(slope, se, nu),
            p_adjusted=adjusted_p(slope / se, k, nu, correlation=correlation),
            covariance=covariance[np.ix_([j, k + j], [j, k + j])],
            critical=factor,
        )
    return Lines(by_variant=by_variant, lack=lack, refused=refused)


def _design(means: Means, x: Any, base: int, names: list[int], sizes: list[int]) -> Any:
    """[M, I + 2K]: an effect of each size, then the middle and the slope of each difference."""
    k, design = len(names), np.zeros((len(means.mean), len(sizes) + 2 * len(names)))
    for row, (v, i) in enumerate(zip(means.variant, means.size, strict=True)):
        design[row, sizes.index(i)] = 1.0
        if v != base:
            j = len(sizes) + names.index(v)
            design[row, j], design[row, j + k] = 1.0, x[i]
    return design


def _least_squares(means: Means, design: Any) -> tuple[Any, LackOfFit, float]:
    """Generalised least squares: (weights [P, M] of the means in the estimates, lack of fit, mean square of residuals).

    The mean square is in units of the variance of the means with lack of fit.
    """
    unit, y = np.eye(len(means.mean)), means.mean

    def solve(tau2: float) -> tuple[Any, Any]:
        weight = np.linalg.inv(means.covariance + tau2 * unit)
        return np.linalg.solve(design.T @ weight @ design, design.T @ weight), weight

    def residual(tau2: float) -> float:
        rows, weight = solve(tau2)
        left = y - design @ (rows @ y)
        return float(left @ weight @ left)

    lack = lack_of_fit(residual, len(y) - int(np.linalg.matrix_rank(design)), means.noise)
    return solve(lack.sd**2)[0], lack, residual(lack.sd**2) / max(lack.df, 1)


def _least_correlation(covariance: Any) -> float:
    error = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(error, error)
    off = correlation[~np.eye(len(correlation), dtype=bool)]
    # the smallest one is conservative; rounding keeps the critical values cached
    return round(min(max(float(off.min()) if off.size else 0.5, 0.0), 0.99), 2)


def _p_value(value: float, error: float, df: float) -> float:
    from scipy import special

    return float(2 * special.stdtr(df, -abs(value) / error))
