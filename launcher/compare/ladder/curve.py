"""The joint scaling law L_v(x) = E + A_v e^(-a x), x = ln N, where all variants share the irreducible loss E and a.

Fit. Given a, the law is linear in E and A_v, which generalised least squares solves. scipy finds a on the profile:
neither a nor E is fixed beforehand. The covariance of the means has the noise of runs, the effects of seeds (common to
all variants of a size: a seed is a block), and lack of fit: deviations of each variant at each size, and deviations of
a whole size of the same variance. The second kind cannot be estimated from three sizes, where three shared numbers pass
through three mean losses; it is assumed to be as large as the first.

Intervals. A value belongs to the interval of a number (a, E, a loss at a size) if the best law with that value has a
weighted sum of squares that exceeds the least one by at most the square of Student's t: a profile likelihood with a t
quantile, whose degrees of freedom are Satterthwaite's of the linearised estimate. For each a, the values that are
allowed form one closed interval; the result spans those of all a. It is exact for numbers that are linear in the
parameters and follows the curved ridge of E and a, where the delta method and refitted draws do not.

Predictions of a new size add its lack of fit, with the upper limit of its variance at 90 % (Q-profile, Viechtbauer
2007): the estimate itself is 0 in half of all ladders whose lack of fit is small. Predictions of what seeds measure add
the estimate and the noise of these seeds, and are never narrower than those of the expected loss. Intervals of
differences and speed-ups are simultaneous for all variants (Dunnett).

Legend: M means, V variants, G exponents on the grid, P = V + 1 linear parameters (E, then A_v).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np

from headway.launcher.base.intervals import CONFIDENCE
from headway.launcher.base.text import short_number
from headway.launcher.compare.ladder.noise import LackOfFit, Means, critical, freedom, lack_of_fit
from headway.launcher.compare.ladder.slope import Line
from headway.launcher.compare.ladder.table import Refusal
from headway.launcher.compare.simultaneous import Simultaneous

LOWEST, HIGHEST = 0.02, 2.0
"""Exponents that are tried. The lowest is a straight line in ln N for any ladder; the highest halves the reducible loss
when N grows by 1.4."""
EXPONENTS = np.geomspace(LOWEST, HIGHEST, 161)

LEAST_SIZES, LEAST_RANGE = 3, 4.0
"""A curve of three shared numbers needs three sizes, and a range of sizes over which it bends."""
FARTHEST = 2.0
"""An extrapolation is at most this many times as long in ln N as the range of the ladder."""
BAD_FIT, BAD_SHARE = 0.01, 0.1
"""A fit is refused if the test of lack of fit rejects it at the first level and the standard deviation of the lack of
fit is more than the second share of the fall of the loss over the ladder."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number with its interval. An infinite end: the losses set no bound."""

    value: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high

    def hull(self, other: Range) -> Range:
        """The same number with the ends of both intervals that are farthest from each other."""
        return Range(value=self.value, low=min(self.low, other.low), high=max(self.high, other.high))

    def exp(self) -> Range:
        return Range(value=_exp(self.value), low=_exp(self.low), high=_exp(self.high))


@dataclass(frozen=True, kw_only=True)
class Law:
    """A fitted law of `names` (indices of variants) with the center of x taken off: L_v = E + A_v e^(-a (x - center)).

    `x` [M]: ln of parameters or FLOPs of each mean. `exponent`, `linear` [P]: the fit. Over the grid of exponents,
    which has the fitted one: `excess` [G], the weighted sum of squares minus the least, `solution` [G, P] and
    `covariance` [G, P, P]. `weight` [M, M]: inverse covariance of the means with lack of fit.
    """

    means: Means
    names: tuple[int, ...]
    x: Any
    center: float
    exponent: float
    linear: Any
    lack: LackOfFit
    grid: Any
    excess: Any
    solution: Any
    covariance: Any
    weight: Any
    confidence: float

    # ------------------------------------------------------------ numbers with intervals

    @property
    def a(self) -> Range:
        """The exponent. An end that the grid cuts off is 0 or infinite."""
        inside = self.grid[self.excess <= self._critical(np.zeros(len(self.x)), through=1.0) ** 2]
        low, high = float(inside.min()), float(inside.max())
        return Range(
            value=self.exponent,
            low=0.0 if low <= self.grid[0] else low,
            high=math.inf if high >= self.grid[-1] else high,
        )

    @property
    def e(self) -> Range:
        """The irreducible loss. Its lower end is -inf where a straight line in ln N is possible."""
        row = np.zeros_like(self.solution)
        row[:, 0] = 1.0
        found = self._linear(row)
        return found if self.a.low > 0 else Range(value=found.value, low=-math.inf, high=found.high)

    def coefficient(self, variant: int) -> Range:
        """The reducible loss A_v of a variant at the center."""
        return self._linear(self._rows(variant, self.center) - np.eye(self.solution.shape[1])[0])

    def loss(self, variant: int, x: float, *, seeds: int | None = None, new: bool = True) -> Range:
        """The loss of a variant at x. `new`: of a new size, whose lack of fit counts. `seeds`: as the mean of so many
        seeds measures it; None: the expected loss.
        """
        self._within(x)
        rows, share = self._rows(variant, x), 1.0 / seeds if seeds else 0.0
        expected = self._linear(rows, fit=2.0 * new)
        return expected.hull(self._linear(rows, run=share, seed=share, fit=2.0 * new)) if seeds else expected

    def difference(
        self, variant: int, base: int, x: float, *, at_base: float | None = None, seeds: int | None = None
    ) -> Range:
        """Loss of a variant at x minus that of the baseline (at `at_base`, default x), paired; as `loss`.

        Simultaneous for all `covered` variants.
        """
        self._within(x)
        rows = self._rows(variant, x) - self._rows(base, x if at_base is None else at_base)
        expected = self._linear(rows, fit=2.0, joint=True)
        return expected.hull(self._linear(rows, run=2.0 / seeds, fit=2.0, joint=True)) if seeds else expected

    def speed_up(self, variant: int, base: int) -> Range:
        """How many times more N the baseline needs for the loss of the variant, by the law: (A_base / A_v)^(1/a).

        N is what x counts. The shared exponent makes it the same at all losses. Simultaneous for all
        `covered` variants.
        """
        columns = [1 + self.names.index(v) for v in (base, variant)]
        ours, theirs = (self.solution[:, c] for c in columns)
        if self.linear[columns].min() <= 0:
            return Range(value=math.nan, low=0.0, high=math.inf)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = np.where((ours > 0) & (theirs > 0), np.log(ours / theirs), np.inf) / self.grid
            rows = np.zeros_like(self.solution)
            rows[:, columns[0]], rows[:, columns[1]] = 1 / ours / self.grid, -1 / theirs / self.grid
        return self._span(value, rows, self._best, joint=True).exp()

    def change_of_ratio(self, variant: int, base: int, size_x: Any, line: Line, tau: float) -> Range:
        """How the difference in units of the baseline's reducible loss changes per unit of ln N, simultaneous.

        0 if the effective speed-up stays the same. `size_x` [I]: ln N of the sizes. `line`: that of the difference,
        whose critical value is used. `tau`: its lack of fit.
        """
        means, rows = self.means, []
        for i in range(len(means.sizes)):
            pair = means.at(variant, i), means.at(base, i)
            if pair[0] is not None and pair[1] is not None:
                rows.append((pair[0], pair[1], float(size_x[i])))
        ours, theirs, x = (np.array(column) for column in zip(*rows, strict=True))
        contrast = np.eye(len(means.mean))[ours] - np.eye(len(means.mean))[theirs]
        variance = np.einsum("im,mn,in->i", contrast, means.covariance, contrast) + 2 * tau**2
        own = self.solution[:, 1 + self.names.index(base)]
        reducible = own[:, None] * np.exp(-self.grid[:, None] * (self.x[theirs] - self.center))  # [G, I]
        weight = reducible**2 / variance
        middle = (weight * x).sum(1, keepdims=True) / weight.sum(1, keepdims=True)
        slope = weight * (x - middle)
        slope /= (slope * (x - middle)).sum(1, keepdims=True)
        values = (slope / reducible) @ (contrast @ means.mean)
        half = np.sqrt(np.maximum(line.critical**2 - self.excess, 0.0) * ((slope / reducible) ** 2 @ variance))
        inside = line.critical**2 >= self.excess
        return Range(
            value=float(values[self._best]),
            low=float((values - half)[inside].min()),
            high=float((values + half)[inside].max()),
        )

    def speed_up_at(self, variant: int, base: int, size: int, difference: Simultaneous) -> Range | None:
        """How many times more N the baseline needs for the loss that the variant has at a measured size, simultaneous.

        The paired difference there is read from the baseline's curve, without lack of fit: it is a fact of this size.
        `difference`: as the size alone gives it, so that no other size tells the noise there. The ends are 0 and
        infinite if it has no interval (one seed). None if one of both has no finished run there.
        """
        means = self.means
        pair = means.at(variant, size), means.at(base, size)
        if pair[0] is None or pair[1] is None:
            return None
        reducible = self.solution[:, 1 + self.names.index(base)] * np.exp(-self.grid * (self.x[pair[1]] - self.center))
        # at equal sizes of both; with other parameters than the baseline's, N itself differs
        shift = float(self.x[pair[1]] - self.x[pair[0]])

        def log_ratio(loss: Any) -> Any:
            with np.errstate(invalid="ignore", divide="ignore"):
                left = 1 + loss / reducible
                return np.where(left > 0, -np.log(np.maximum(left, 1e-300)), np.inf) / self.grid + shift

        value = float(log_ratio(difference.mean)[self._best])
        half, error = difference.half_width, difference.standard_error
        if half is None or error is None:
            return Range(value=value, low=-math.inf, high=math.inf).exp()
        factor = half / error if error else 0.0
        inside = factor**2 >= self.excess
        spread = np.sqrt(np.maximum(factor**2 - self.excess, 0.0)) * error
        ends = log_ratio(difference.mean + spread), log_ratio(difference.mean - spread)
        return Range(value=value, low=float(ends[0][inside].min()), high=float(ends[1][inside].max())).exp()

    def curve(self, variant: int, x: Any) -> Any:
        """Fitted losses at x [N]."""
        return self.linear[0] + self.reducible(variant, x)

    def reducible(self, variant: int, x: Any) -> Any:
        return self.linear[1 + self.names.index(variant)] * np.exp(-self.exponent * (np.asarray(x) - self.center))

    # ------------------------------------------------------------ how

    @cached_property
    def covered(self) -> frozenset[int]:
        """Variants with finished runs at `LEAST_SIZES` sizes.

        What the law says of any other variant away from its sizes is the shape of the others, and no measurement.
        """
        return frozenset(v for v in self.names if np.count_nonzero(self.means.variant == v) >= LEAST_SIZES)

    @cached_property
    def _best(self) -> int:
        return int(np.argmin(self.excess))

    @cached_property
    def fit_part(self) -> Any:
        """Covariance [M, M] of the means for tau = 1."""
        return _fit_part(self.means)

    @cached_property
    def _influence(self) -> Any:
        """[P + 1, M]: derivatives of (E, A_v, a) by the means, at the fit."""
        design = _design(self.means, self.names, self.x - self.center, self.grid[self._best : self._best + 1])[0]
        by_a = -(self.x - self.center) * (design[:, 1:] @ self.linear[1:])
        full = np.hstack([design, by_a[:, None]])
        return np.linalg.pinv(full.T @ self.weight @ full) @ full.T @ self.weight

    def _rows(self, variant: int, x: float) -> Any:
        """[G, P]: E and A_v in the loss of a variant at x."""
        found = np.zeros_like(self.solution)
        found[:, 0] = 1.0
        found[:, 1 + self.names.index(variant)] = np.exp(-self.grid * (x - self.center))
        return found

    def _linear(
        self, rows: Any, *, run: float = 0.0, seed: float = 0.0, fit: float = 0.0, joint: bool = False
    ) -> Range:
        values = np.einsum("gp,gp->g", rows, self.solution)
        return self._span(values, rows, self._best, run=run, seed=seed, fit=fit, joint=joint)

    def _span(
        self,
        values: Any,
        rows: Any,
        best: int,
        *,
        run: float = 0.0,
        seed: float = 0.0,
        fit: float = 0.0,
        joint: bool = False,
    ) -> Range:
        """Interval over all exponents. `rows` [G, P]: derivatives of `values` [G] by E and A_v.

        `run`, `seed`, `fit`: multiples of sigma^2, omega^2 and tau^2 that a new observation adds.
        """
        noise = self.means.noise
        deviation = fit * (self.lack.sd if run else self.lack.upper) ** 2
        added = run * noise.sigma**2 + seed * noise.omega**2 + deviation
        with np.errstate(invalid="ignore"):
            variance = np.einsum("gp,gpq,gq->g", rows, self.covariance, rows) + added
        near = slice(max(best - 1, 0), best + 2)
        by_a = float(np.gradient(values[near], self.grid[near])[1 if best else 0])
        influence = np.append(rows[best], by_a) @ self._influence
        factor = self._critical(influence, run=run, seed=seed, added=deviation, joint=joint)
        left = factor**2 - self.excess
        inside = left >= 0
        half = np.sqrt(np.maximum(left, 0.0) * variance)[inside]
        ends = values[inside] - half, values[inside] + half
        if not all(np.isfinite(end).all() for end in ends):
            return Range(value=float(values[best]), low=-math.inf, high=math.inf)
        return Range(value=float(values[best]), low=float(ends[0].min()), high=float(ends[1].max()))

    def _critical(
        self,
        influence: Any,
        *,
        through: float = 0.0,
        run: float = 0.0,
        seed: float = 0.0,
        added: float = 0.0,
        joint: bool = False,
    ) -> float:
        """Student's t for an estimate with these derivatives [M] by the means; `through`: plus so many times a's."""
        w, noise = influence + through * self._influence[-1], self.means.noise
        parts = [float(w @ part @ w) for part in (self.means.run_part, self.means.seed_part, self.fit_part)]
        # The lack of fit of a new size is an upper limit already: it counts with the noise of runs.
        of_run = parts[0] + run + added / noise.sigma**2
        df = freedom(noise, self.lack, of_run, parts[1] + seed, parts[2])
        return critical(len(self.covered) - 1 if joint else 1, float(df), confidence=self.confidence)

    def _within(self, x: float) -> None:
        low, high = float(self.x.min()), float(self.x.max())
        if x - high > FARTHEST * (high - low):
            named = short_number(float(f"{math.exp(x):.3g}"))
            reach = math.exp(FARTHEST * (high - low))
            raise Refusal(
                f"{named} is {math.exp(x - high):.0f} times the largest size, and the ladder spans "
                f"a factor of {math.exp(high - low):.1f}; a prediction may reach {reach:.0f} times: train a larger "
                "size, or name a smaller one"
            )


def reach(params: Iterable[float]) -> float:
    """The largest size, in parameters, that a ladder of these sizes predicts."""
    found = sorted(params)
    return found[-1] * (found[-1] / found[0]) ** FARTHEST


def law_of(means: Means, x: Any, *, confidence: float = CONFIDENCE) -> Law:
    """Fit the law. `x` [M]: ln of the parameters or of the training FLOPs of each mean.

    Raises Refusal, with the reason and what to do, if sizes are too few or too close, or if the law does not fit.
    """
    from scipy import optimize

    x, y = np.asarray(x, dtype=np.float64), means.mean
    _check_sizes(means, x)
    names = tuple(sorted(set(means.variant.tolist())))
    center, fit_part = float(x.mean()), _fit_part(means)
    design = _design(means, names, x - center, EXPONENTS)

    def solve(tau2: float, matrices: Any) -> tuple[Any, Any, Any, Any]:
        """(weight, covariance [G, P, P], solution [G, P], sum of squares [G])"""
        weight = np.linalg.inv(means.covariance + tau2 * fit_part)
        weighted = np.swapaxes(matrices, 1, 2) @ weight
        covariance = np.linalg.inv(weighted @ matrices)
        solution = (covariance @ (weighted @ y)[..., None])[..., 0]
        left = y - (matrices @ solution[..., None])[..., 0]
        return weight, covariance, solution, np.einsum("gm,mn,gn->g", left, weight, left)

    def residual(tau2: float) -> float:
        return float(solve(tau2, design)[3].min())

    lack = lack_of_fit(residual, len(y) - len(names) - 2, means.noise)
    best = int(np.argmin(solve(lack.sd**2, design)[3]))
    found = optimize.minimize_scalar(
        lambda a: float(solve(lack.sd**2, _design(means, names, x - center, np.array([a])))[3][0]),
        bounds=(float(EXPONENTS[max(best - 1, 0)]), float(EXPONENTS[min(best + 1, len(EXPONENTS) - 1)])),
        method="bounded",
        options={"xatol": 1e-5},
    )
    at_edge = best in (0, len(EXPONENTS) - 1)
    grid = EXPONENTS if at_edge else np.unique(np.append(EXPONENTS, cast(Any, found).x))
    weight, covariance, solution, squares = solve(lack.sd**2, _design(means, names, x - center, grid))
    best = int(np.argmin(squares))
    law = Law(
        means=means,
        names=names,
        x=x,
        center=center,
        exponent=float(grid[best]),
        linear=solution[best],
        lack=lack,
        grid=grid,
        excess=squares - squares.min(),
        solution=solution,
        covariance=covariance,
        weight=weight,
        confidence=confidence,
    )
    _check_fit(law)
    return law


def _fit_part(means: Means) -> Any:
    return np.eye(len(means.mean)) + means.same_size


def _design(means: Means, names: tuple[int, ...], x: Any, a: Any) -> Any:
    """[G, M, P]; x with the center taken off."""
    column = np.array([1 + names.index(v) for v in means.variant])
    design = np.zeros((len(a), len(x), len(names) + 1))
    design[:, :, 0] = 1.0
    design[:, np.arange(len(x)), column] = np.exp(-np.asarray(a)[:, None] * x)
    return design


def _check_sizes(means: Means, x: Any) -> None:
    sizes = sorted(set(means.size.tolist()))
    if len(sizes) < LEAST_SIZES:
        raise Refusal(
            f"{len(sizes)} size{'s have' if len(sizes) != 1 else ' has'} finished runs; the law has three numbers that "
            f"all variants share, and needs {LEAST_SIZES} sizes: train another size"
        )
    span = math.exp(float(x.max() - x.min()))
    if span < LEAST_RANGE:
        raise Refusal(
            f"the sizes span a factor of {span:.2f}; over less than {LEAST_RANGE:g} the curve is too straight to tell "
            "its exponent from its irreducible loss: add a smaller or a larger size"
        )


def _check_fit(law: Law) -> None:
    coefficients = law.linear[1:]
    if coefficients.min() <= 0:
        name = law.means.variants[law.names[int(np.argmin(coefficients))]]
        raise Refusal(
            f"the loss of {name} does not fall with size, so there is no scaling law to fit: check the learning rates "
            "and the tokens of the larger sizes"
        )
    if law.exponent >= law.grid[-1]:
        raise Refusal(
            "the loss stops falling after the smallest size, so the exponent has no estimate: check the learning rates "
            "and the tokens of the larger sizes"
        )
    ends = law.x.min(), law.x.max()
    fall = float(np.ptp(np.exp(-law.exponent * (np.array(ends) - law.center)))) * float(coefficients.mean())
    if law.lack.p_value is not None and law.lack.p_value < BAD_FIT and law.lack.sd > BAD_SHARE * fall:
        raise Refusal(
            f"the law does not fit: means lie {law.lack.sd:.4f} nats beside it (standard deviation beyond the noise of "
            f"seeds, p = {law.lack.p_value:.1g}), more than {BAD_SHARE:.0%} of the fall of {fall:.4f} over the ladder; "
            "look for a size whose runs differ in more than size, such as its learning rate"
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
