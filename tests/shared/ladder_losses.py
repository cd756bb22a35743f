"""Made-up losses of a ladder of sizes that follow a scaling law, with the noise of seeds and lack of fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headway.launcher.compare.ladder.table import Size

PARAMS = (0.5e6, 1.2e6, 2.6e6, 5.3e6)


@dataclass(kw_only=True)
class Ladder:
    """L_v(N) = E + A_v N^-a. `gain`: A_v / A_0 - 1 of each variant, the first being the baseline (v0).

    `omega`: sd of the effect of a seed on all variants of a size, `sigma` of one run, `tau` of one variant at one size,
    `tau_common` of one size.
    """

    seeds: Sequence[int]
    gain: Sequence[float]
    irreducible: float = 2.0
    exponent: float = 0.3
    top: float = 1.5
    omega: float = 0.02
    sigma: float = 0.015
    tau: float = 0.0
    tau_common: float = 0.0
    params: Any = field(init=False)
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.params = np.array(PARAMS[: len(self.seeds)])
        self.names = [f"v{v}" for v in range(len(self.gain))]

    def law(self, params: Any) -> Any:
        """[V, N]"""
        scale = self.top * (np.asarray(params, float) / PARAMS[0]) ** -self.exponent
        return self.irreducible + (1 + np.array(self.gain))[:, None] * scale

    def deviations(self, rng: Any, count: int) -> Any:
        """Lack of fit [V, count] of as many sizes."""
        own = rng.normal(0, self.tau, (len(self.gain), count)) if self.tau else np.zeros((len(self.gain), count))
        return own + (rng.normal(0, self.tau_common, count) if self.tau_common else 0.0)

    def run(self, rng: Any, *, difference: Any = None) -> list[Size]:
        """`difference` [V, I]: replaces the law by one loss for each size, plus these differences to the baseline."""
        mean = self.law(self.params) if difference is None else self.law(self.params)[:1] + difference
        mean = mean + self.deviations(rng, len(self.seeds))
        sizes = []
        for i, count in enumerate(self.seeds):
            noise = rng.normal(0, self.omega, count) + rng.normal(0, self.sigma, (len(self.gain), count))
            losses = {v: {s: float(mean[k, i] + noise[k, s]) for s in range(count)} for k, v in enumerate(self.names)}
            params = dict.fromkeys(self.names, float(self.params[i]))
            flops = {v: 6.0 * 10.0 * n * n for v, n in params.items()}
            sizes.append(Size(name=f"s{i}", losses=losses, params=params, flops=flops))
        return sizes
