"""A number that an evaluation gives, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headway.launcher.base.intervals import CONFIDENCE, t_critical

_RESAMPLES, _AT_ONCE, _BOOTSTRAP_SEED = 2000, 20, 1


@dataclass(frozen=True, kw_only=True)
class Measure:
    """`name`: of what and which, such as `books/loss`. `n`: documents, questions or sequences that it is a mean over.

    `low`, `high`: 95 % interval over them, for other ones of the same kind; None with fewer than two. `chance`: the
    value of guessing; None where there is none. `digest`: hash of what the model was asked, the same for all
    models with one tokenizer; values with different ones must not be compared.
    """

    name: str
    value: float
    unit: str
    better: Literal["lower", "higher"]
    n: int
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    digest: str = ""

    def row(self) -> dict[str, Any]:
        return asdict(self)

    def scaled(self, name: str, factor: float, unit: str) -> Measure:
        """The same measure in another unit."""
        low, high = (None if end is None else end * factor for end in (self.low, self.high))
        return replace(self, name=name, value=self.value * factor, unit=unit, low=low, high=high)


def ratio(name: str, above: Sequence[float], below: Sequence[float], *, unit: str) -> Measure:
    """sum(above) / sum(below), lower is better. One pair for each document.

    The interval treats documents as independent draws (ratio estimator, Cochran 1977, ch. 6): long documents have more
    weight, and tokens of one document may depend on each other.
    """
    x, y = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    n, total = len(x), float(y.sum())
    value = float(x.sum()) / total
    low = high = None
    if n > 1:
        error = math.sqrt(n / (n - 1) * float(((x - value * y) ** 2).sum())) / total
        half = t_critical(n - 1) * error
        low, high = value - half, value + half
    return Measure(name=name, value=value, unit=unit, better="lower", n=n, low=low, high=high)


def bootstrapped(name: str, values: NDArray[np.float64], *, unit: str) -> Measure:
    """The mean of the values [n], higher is better, with a percentile bootstrap interval over them (Efron, 1979)."""
    n, numbers = len(values), np.random.default_rng(_BOOTSTRAP_SEED)
    low = high = None
    if n > 1:
        means = [values[numbers.integers(0, n, (_AT_ONCE, n))].mean(1) for _ in range(_RESAMPLES // _AT_ONCE)]
        low, high = (float(np.quantile(means, 0.5 + sign * CONFIDENCE / 2)) for sign in (-1, 1))
    return Measure(name=name, value=float(values.mean()), unit=unit, better="higher", n=n, low=low, high=high)


def share(name: str, hits: Sequence[bool], *, chance: float | None) -> Measure:
    """The share of hits, higher is better, with Wilson's (1927) interval."""
    n, count = len(hits), sum(hits)
    z = _normal_critical()
    middle = (count + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(count * (n - count) / n + z**2 / 4)
    return Measure(
        name=name,
        value=count / n,
        unit="share",
        better="higher",
        n=n,
        low=max(0.0, middle - half),
        high=min(1.0, middle + half),
        chance=chance,
    )


def _normal_critical() -> float:
    from scipy import special

    return float(special.ndtri(0.5 + CONFIDENCE / 2))
