"""Choose the best value of a tuned key for each variant from the losses of its trials.

The rule is the same for all variants, and all are tried with the same values:

1. Each variant is trained with every value of the grid. Its curve is the mean loss over the seeds of the trials.
2. While the lowest point of any curve lies on an edge of the grid, and fewer than `extend` values were added, the grid
   grows by one value beyond that edge for all variants.
3. The chosen value is the minimum of the parabola in log(value) through the lowest point and its neighbours.

A trial that diverged counts as an infinite loss: its value is never chosen, but shows that the grid reaches far enough.
A function `legal` rounds all values: to integers for an integer key, to whole micro-batches for a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from headway.launcher.study.sizes import TuneConfig

Curve = Mapping[float, float]
"""Value -> mean loss over the seeds of the trials, nats per token; infinite where a trial diverged."""

Legal = Callable[[float], float]
"""The legal value of a key nearest to a number."""

DIGITS = 3
"""Significant digits of a chosen value. One percent of a learning rate is far below what trials can tell apart."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The value of one variant at one size. `how`: the rule that gave it.

    `edge`: the optimum may lie outside the grid, also that of the size that a value is carried from.
    """

    value: float
    how: str
    edge: bool = False

    def record(self) -> dict[str, Any]:
        return {"chosen": self.value, "how": self.how, "edge": self.edge}


def significant(value: float) -> float:
    """`value` rounded to `DIGITS` significant digits, so that names and command lines stay short."""
    return float(f"{value:.{DIGITS}g}")


def multiples(unit: int) -> Legal:
    """Rounding to multiples of `unit`, at least one."""
    return lambda value: max(1, round(value / unit)) * unit


def together(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """The mean curve of all variants, for each of them; infinite where any diverged."""
    values = next(iter(curves.values()))
    mean = {value: _mean([curve[value] for curve in curves.values()]) for value in values}
    return dict.fromkeys(curves, mean)


def next_values(
    config: TuneConfig, values: Sequence[float], curves: Mapping[str, Curve], legal: Legal = significant
) -> list[float]:
    """Values to add to the grid `values`; empty if the lowest point of every curve is inside, or none may be added."""
    values = sorted(values)
    left = config.extend - (len(values) - len(config.grid))
    edges = {best_of(curve) for curve in curves.values()}
    found = []
    if values[0] in edges:
        found.append(legal(values[0] / config.factor))
    if values[-1] in edges:
        found.append(legal(values[-1] * config.factor))
    return [value for value in found if value not in values][: max(0, left)]


def best_of(curve: Curve) -> float:
    """The value with the lowest loss; the smallest one of equals. Raises ValueError if no trial has a finite loss."""
    finite = {value: loss for value, loss in curve.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError("no trial has a finite loss")
    return min(sorted(finite), key=lambda value: finite[value])


def choose(curve: Curve, legal: Legal = significant) -> Choice:
    """The chosen value of a variant. Raises ValueError if no trial has a finite loss."""
    values, best = sorted(curve), best_of(curve)
    i = values.index(best)
    if i in (0, len(values) - 1):
        side = "lowest" if i == 0 else "highest"
        return Choice(value=best, how=f"the {side} value tried; the optimum may lie beyond it", edge=True)
    around = values[i - 1 : i + 2]
    losses = [curve[value] for value in around]
    if not all(math.isfinite(loss) for loss in losses):
        return Choice(value=best, how="the best value tried; the next one diverged")
    lowest = parabola_minimum([math.log(value) for value in around], losses)
    return Choice(value=legal(math.exp(lowest)), how="parabola through the best three")


def parabola_minimum(x: Sequence[float], y: Sequence[float]) -> float:
    """Position of the minimum of the parabola through three points, of which the middle one is lowest."""
    (x0, x1, x2), (y0, y1, y2) = x, y
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if right - left <= 0:  # three equal losses
        return x1
    # the derivative at the middle of both intervals is the slope of their chords, and it is linear in between
    middle = (x0 + x1) / 2
    lowest = middle - left * ((x2 - x0) / 2) / (right - left)
    return min(max(lowest, x0), x2)


def carried(
    rule: Literal["same", "fit", "width"],
    chosen: Mapping[str, Mapping[str, float]],
    *,
    params: Mapping[str, float],
    widths: Mapping[str, float],
    size: str,
    legal: Legal = significant,
    edges: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Choice]:
    """Values at a size without trials. `chosen`: size -> variant -> value, of the sizes with trials.

    `edges`: size -> variants whose best value there lies on an edge of the grid; what is carried from it says so.
    `params`, `widths`: parameters and model.width of the baseline at every size. A variant that has no trial at any
    size gets no value.
    """
    order = sorted(chosen, key=lambda name: params[name])
    variants = sorted({variant for by_variant in chosen.values() for variant in by_variant})
    if rule == "fit":
        return _fitted(chosen, params, size, variants, legal, edges or {})
    found = {}
    for variant in variants:
        last = [name for name in order if variant in chosen[name]][-1]
        value = chosen[last][variant]
        if rule == "width":
            value, how = (
                value * widths[last] / widths[size],
                f"that of {last} x width {widths[last]:g}/{widths[size]:g}",
            )
        else:
            how = f"that of {last}"
        found[variant] = _carry(legal(value), how, edge=variant in (edges or {}).get(last, ()))
    return found


def _carry(value: float, how: str, *, edge: bool) -> Choice:
    beyond = "; the optimum there may lie beyond the values tried" if edge else ""
    return Choice(value=value, how=how + beyond, edge=edge)


def _fitted(
    chosen: Mapping[str, Mapping[str, float]],
    params: Mapping[str, float],
    size: str,
    variants: Sequence[str],
    legal: Legal,
    edges: Mapping[str, Collection[str]],
) -> dict[str, Choice]:
    """Least squares of log(value) on log(parameters): a level for each variant, one slope for all."""
    points = {
        v: [(math.log(params[name]), math.log(by[v])) for name, by in chosen.items() if v in by] for v in variants
    }
    centre = {v: (_mean([x for x, _ in at]), _mean([y for _, y in at])) for v, at in points.items()}
    across = sum((x - centre[v][0]) ** 2 for v, at in points.items() for x, _ in at)
    along = sum((x - centre[v][0]) * (y - centre[v][1]) for v, at in points.items() for x, y in at)
    slope = along / across if across else 0.0
    how = f"fit over {', '.join(sorted(chosen, key=lambda name: params[name]))}: exponent {slope:.2f} in parameters"
    target = math.log(params[size])
    return {
        v: _carry(legal(math.exp(y + slope * (target - x))), how, edge=any(v in at for at in edges.values()))
        for v, (x, y) in centre.items()
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
