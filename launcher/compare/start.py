"""Start strength of the branches of each variant, compared with the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOLERANCE = 0.10
"""A larger relative deviation of the attention ratio from the baseline in any layer is a confound (docs/studies.md)."""

BRANCHES = ("attention", "mlp")

Start = Mapping[str, Mapping[str, float]]
"""Layer -> {"attention", "mlp"}: rms of the branch output / rms of its residual stream, before the first step."""


@dataclass(frozen=True, kw_only=True)
class StartStrength:
    """One variant over its seeds. `attention`, `mlp`: geometric means over layers and seeds; None if not recorded.

    `largest`: (layer, ratio to the baseline) of the layer with the largest difference in attention; None for the
    baseline and if either record is missing. The MLP is the same in every variant except for its width, which matching
    solves.
    """

    attention: float | None
    mlp: float | None
    largest: tuple[str, float] | None = None

    @property
    def confounded(self) -> bool:
        if self.largest is None:
            return False
        ratio = self.largest[1]
        return not 1 / (1 + TOLERANCE) <= ratio <= 1 + TOLERANCE


def start_strengths(starts: Mapping[str, Sequence[Start]], baseline: str) -> dict[str, StartStrength]:
    """Start strengths by variant. `starts`: variant -> one record for each of its runs."""
    means = {variant: _mean(found) for variant, found in starts.items()}
    base = means.get(baseline, {})
    return {
        variant: StartStrength(
            attention=_over_layers(layers, "attention"),
            mlp=_over_layers(layers, "mlp"),
            largest=None if variant == baseline else _largest(layers, base),
        )
        for variant, layers in means.items()
    }


def _mean(starts: Sequence[Start]) -> dict[str, dict[str, float]]:
    """Geometric means over runs; 0 if any value is 0."""
    layers = sorted({layer for start in starts for layer in start})
    return {
        layer: {branch: _geometric([start[layer][branch] for start in starts if layer in start]) for branch in BRANCHES}
        for layer in layers
    }


def _geometric(values: Sequence[float]) -> float:
    if not values or not all(math.isfinite(v) for v in values):
        return math.nan
    return 0.0 if min(values) <= 0 else math.exp(math.fsum(map(math.log, values)) / len(values))


def _over_layers(layers: Mapping[str, Mapping[str, float]], branch: str) -> float | None:
    value = _geometric([values[branch] for values in layers.values()])
    return None if math.isnan(value) else value


def _largest(
    layers: Mapping[str, Mapping[str, float]], base: Mapping[str, Mapping[str, float]]
) -> tuple[str, float] | None:
    found = [
        (layer, _ratio(layers[layer]["attention"], base[layer]["attention"]))
        for layer in sorted(layers.keys() & base.keys())
    ]
    found = [item for item in found if not math.isnan(item[1])]
    return max(found, key=lambda item: _distance(item[1]), default=None)


def _ratio(a: float, b: float) -> float:
    if a == b == 0:
        return 1.0
    return a / b if b else math.inf


def _distance(ratio: float) -> float:
    return math.inf if ratio <= 0 or math.isinf(ratio) else abs(math.log(ratio))
