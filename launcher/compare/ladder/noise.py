"""Mean losses of a ladder and their variances.

Model. The loss of variant v at size i with seed s is m_vi + u_is + e_vis. The effect u of a seed is common to all
variants of its size (same data order, same initial values of shared parameters); seeds of different sizes have nothing
in common. e is the noise of one run. m_vi is a curve over sizes plus a deviation g_vi, the lack of fit. The variances
of u (omega^2), e (sigma^2) and g (tau^2) are the same at all sizes.

Estimates. sigma^2 is the mean square of the residuals of variant + seed within sizes, pooled over sizes: two seeds at
one size say little about the noise there, and one seed says nothing. omega^2 is the moment estimator from the sum of
squares of seeds after variants (Henderson 1953, method 3). Means are those of generalised least squares: plain means if
all cells of a size are there; with missing cells, a difference uses the common seeds and what the others say about
them. tau^2 depends on the curve, and is the moment estimator of Paule and Mandel (1982), known from meta-analysis.

Degrees of freedom. The variance of an estimate is a sum of multiples of sigma^2, omega^2 and tau^2. Its degrees of
freedom are those of Satterthwaite (1946), of the residual mean square, the mean square of seeds, and lack of fit. If no
lack of fit is seen, its degrees of freedom count with those of the residuals.

Legend: M means (one for each variant and size), N runs, U seeds of all sizes, K estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np

from headway.launcher.base.intervals import CONFIDENCE
from headway.launcher.compare.ladder.table import Refusal, Size
from headway.launcher.compare.simultaneous import dunnett_critical, dunnett_p

UPPER = 0.9
"""Confidence of the upper limit of the lack of fit. With the estimate alone, predicted differences hold too seldom
where lack of fit is small beside the noise of a run; docs/ladders.md has the coverage."""
_ROUNDING = 1e-8
"""Least standard deviation of a run, nats: losses that agree to the last digit would have no spread at all."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Variances within sizes. `sigma`: sd of a run given its variant and seed; `omega`: sd of the effect of a seed.

    `sigma_df`, `seed_df`: degrees of freedom of the residuals, and of seeds. `seed_ss`, `seed_trace`: the sum of
    squares of seeds after variants, whose mean is seed_df sigma^2 + seed_trace omega^2.
    """

    sigma: float
    sigma_df: int
    omega: float
    seed_df: int
    seed_ss: float
    seed_trace: float


@dataclass(frozen=True, kw_only=True)
class Means:
    """Mean losses [M] of a ladder: `variant` [M] and `size` [M] are indices into `variants` and `sizes`.

    `runs` [M, N] and `seeds` [M, U]: weights of the noise of each run and of the effect of each seed in a mean.
    """

    variants: tuple[str, ...]
    sizes: tuple[Size, ...]
    variant: Any
    size: Any
    mean: Any
    runs: Any
    seeds: Any
    noise: Noise

    @cached_property
    def run_part(self) -> Any:
        """Covariance [M, M] of the means for sigma = 1."""
        return self.runs @ self.runs.T

    @cached_property
    def seed_part(self) -> Any:
        """Covariance [M, M] of the means for omega = 1."""
        return self.seeds @ self.seeds.T

    @cached_property
    def covariance(self) -> Any:
        """Covariance [M, M] of the means, without lack of fit."""
        return self.noise.sigma**2 * self.run_part + self.noise.omega**2 * self.seed_part

    @cached_property
    def same_size(self) -> Any:
        """[M, M]: 1 where two means are of one size."""
        return (self.size[:, None] == self.size[None, :]).astype(float)

    def keep(self, rows: Any) -> Means:
        """Only the means in `rows` (indices or a mask)."""
        return Means(
            variants=self.variants,
            sizes=self.sizes,
            variant=self.variant[rows],
            size=self.size[rows],
            mean=self.mean[rows],
            runs=self.runs[rows],
            seeds=self.seeds[rows],
            noise=self.noise,
        )

    def at(self, variant: int, size: int) -> int | None:
        """Row of a variant and size."""
        found = np.flatnonzero((self.variant == variant) & (self.size == size))
        return int(found[0]) if found.size else None


def means_of(sizes: Sequence[Size], variants: Sequence[str]) -> Means:
    """Means, and variances pooled over sizes. Raises Refusal if no size has two variants with two common seeds."""
    tables = [_table(size, variants) for size in sizes]
    noise = _noise(tables)
    ratio = (noise.omega / noise.sigma) ** 2
    variant, size, mean, runs, seeds = [], [], [], [], []
    for i, t in enumerate(tables):
        x, z = t.design()
        inverse = np.linalg.inv(np.eye(len(t.loss)) + ratio * z @ z.T)
        weights = np.linalg.solve(x.T @ inverse @ x, x.T @ inverse)
        variant += t.names
        size += [i] * len(t.names)
        mean.append(weights @ t.loss)
        runs.append(weights)
        seeds.append(weights @ z)
    return Means(
        variants=tuple(variants),
        sizes=tuple(sizes),
        variant=np.array(variant, dtype=int),
        size=np.array(size, dtype=int),
        mean=np.concatenate(mean),
        runs=_blocks(runs),
        seeds=_blocks(seeds),
        noise=noise,
    )


@dataclass(frozen=True)
class _Table:
    """Runs of one size. `names`: indices of its variants. `v`, `s`: rows of `names` and of seeds, for each run."""

    names: list[int]
    v: Any
    s: Any
    loss: Any

    def design(self) -> tuple[Any, Any]:
        """([N, V] of variants, [N, S] of seeds)."""
        return np.eye(len(self.names))[self.v], np.eye(int(self.s.max()) + 1)[self.s]


def _table(size: Size, variants: Sequence[str]) -> _Table:
    names = [i for i, v in enumerate(variants) if size.losses.get(v)]
    if not names:
        raise Refusal(f"size {size.name} has no finished run")
    order = sorted({s for i in names for s in size.losses[variants[i]]})
    runs = [(k, order.index(s), y) for k, i in enumerate(names) for s, y in sorted(size.losses[variants[i]].items())]
    v, s, loss = zip(*runs, strict=True)
    return _Table(names, np.array(v), np.array(s), np.array(loss, dtype=float))


def _noise(tables: Sequence[_Table]) -> Noise:
    residual_ss = seed_ss = trace = 0.0
    residual_df = seed_df = 0
    for t in tables:
        x, z = t.design()
        both = np.hstack([x, z])
        rank = int(np.linalg.matrix_rank(both))
        without = _residual(x, t.loss)
        full = float(np.sum(_residual(both, t.loss) ** 2))
        residual_ss += full
        residual_df += len(t.loss) - rank
        seed_ss += float(without @ without) - full
        seed_df += rank - len(t.names)
        trace += float(np.sum(_residual(x, z) ** 2))
    if residual_df < 1:
        raise Refusal(
            "no size has two variants with two common seeds, so the noise of a run is unknown; add a second seed to a "
            "size"
        )
    sigma2 = max(residual_ss / residual_df, _ROUNDING**2)
    omega2 = max(0.0, (seed_ss - seed_df * sigma2) / trace) if trace else 0.0
    return Noise(
        sigma=math.sqrt(sigma2),
        sigma_df=residual_df,
        omega=math.sqrt(omega2),
        seed_df=seed_df,
        seed_ss=max(seed_ss, 0.0),
        seed_trace=trace,
    )


def _residual(x: Any, y: Any) -> Any:
    return y - x @ np.linalg.lstsq(x, y, rcond=None)[0]


def _blocks(parts: Sequence[Any]) -> Any:
    from scipy.linalg import block_diag

    return block_diag(*parts)


# ---------------------------------------------------------------- lack of fit, and variances of estimates


@dataclass(frozen=True, kw_only=True)
class LackOfFit:
    """Deviations of size means from a curve beyond the noise of seeds. `sd`: tau, of one variant at one size.

    `upper`: its upper limit at 90 %, for predictions of new sizes. `df`: degrees of freedom of the residuals.
    `p_value`: of the F test of tau = 0 against the noise within sizes; None without degrees of freedom.
    """

    sd: float
    upper: float
    df: int
    p_value: float | None


def lack_of_fit(residual: Callable[[float], float], df: int, noise: Noise) -> LackOfFit:
    """`residual`: tau^2 -> weighted sum of squares of the residuals of the curve, with tau^2 in their covariance."""
    from scipy import optimize, special

    if df < 1:
        return LackOfFit(sd=0.0, upper=0.0, df=0, p_value=None)

    def tau(squares: float) -> float:
        """The standard deviation at which the residuals have this sum of squares; 0 if they have less without it."""
        if residual(0.0) <= squares:
            return 0.0
        high = max(noise.sigma**2, 1e-12)
        while residual(high) > squares:
            high *= 16
        return math.sqrt(cast(float, optimize.brentq(lambda tau2: residual(tau2) - squares, 0.0, high, xtol=1e-12)))

    return LackOfFit(
        sd=tau(df),
        upper=tau(float(special.chdtri(df, UPPER))),
        df=df,
        p_value=float(special.fdtrc(df, noise.sigma_df, residual(0.0) / df)),
    )


def freedom(noise: Noise, lack: LackOfFit, run: Any, seed: Any, fit: Any) -> Any:
    """Degrees of freedom [K] of variances run sigma^2 + seed omega^2 + fit tau^2."""
    from_fit = fit * lack.sd**2
    per_seed = noise.seed_df / noise.seed_trace if noise.seed_trace else 0.0
    # omega^2 is a difference of two mean squares: that of seeds, and that of residuals
    mean_square = noise.sigma**2 + noise.omega**2 / per_seed if per_seed else 0.0
    from_seeds = seed * per_seed * mean_square if noise.omega else 0.0 * seed
    from_runs = (run - (seed * per_seed if noise.omega else 0.0)) * noise.sigma**2
    spread = from_runs**2 / (noise.sigma_df + lack.df) + from_seeds**2 / max(noise.seed_df, 1)
    spread = spread + from_fit**2 / max(lack.df, 1)
    total = from_runs + from_seeds + from_fit
    return np.where(spread > 0, total**2 / np.where(spread > 0, spread, 1.0), noise.sigma_df)


def critical(comparisons: int, df: float, *, correlation: float = 0.5, confidence: float = CONFIDENCE) -> float:
    """Dunnett's critical value; Student's for one comparison. `df` is rounded down to two digits: values are cached."""
    return dunnett_critical(max(1, comparisons), _two_digits(df), correlation=correlation, confidence=confidence)


def adjusted_p(t: float, comparisons: int, df: float, *, correlation: float = 0.5) -> float:
    """p of an estimate of `t` standard errors for all comparisons at once: below 5 % where the interval excludes 0."""
    return dunnett_p(t, max(1, comparisons), _two_digits(df), correlation=correlation)


def _two_digits(df: float) -> float:
    step = 10.0 ** (math.floor(math.log10(df)) - 1)
    return math.floor(df / step) * step
