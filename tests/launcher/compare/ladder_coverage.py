"""How often intervals of ladders hold, for the method of the report and for those that were tried before it.

`PYTHONPATH=tests/shared python tests/launcher/compare/ladder_coverage.py` writes docs/results/ladder-coverage.json.
Every share is that of simulated ladders in which an interval holds; simultaneous intervals hold if all of them do.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ladder_losses import Ladder

from headway.launcher.compare.ladder.curve import Range, law_of
from headway.launcher.compare.ladder.noise import means_of
from headway.launcher.compare.ladder.slope import lines_of
from headway.launcher.compare.simultaneous import dunnett_critical, sidak
from headway.launcher.run.machine import git_commit, machine, versions

ROOT = Path(__file__).resolve().parents[3]
FIVE = (0.0, 0.02, -0.02, 0.05, -0.05)
DESIGNS = [((6, 4, 2, 1), FIVE), ((4, 2, 2), FIVE[:3]), ((2, 2, 2), FIVE[:3])]
LACKS = [(0.0, 0.0), (0.005, 0.0), (0.0, 0.005), (0.01, 0.0), (0.015, 0.0)]
DRAWS = 400
COMMAND = "PYTHONPATH=tests/shared python tests/launcher/compare/ladder_coverage.py"

Found = tuple[bool, float]
"""(whether all intervals hold, half width of the first)"""


class Losses(NamedTuple):
    """Complete losses [V, S] of each size, and their mean [V, I]."""

    tables: list[Any]
    mean: Any

    @classmethod
    def of(cls, ladder: Ladder, sizes: list[Any]) -> Losses:
        tables = [np.array([list(size.losses[v].values()) for v in ladder.names]) for size in sizes]
        return cls(tables, np.stack([t.mean(1) for t in tables], axis=1))

    def resampled(self, rng: Any) -> Any:
        """Means [B, V, I] over seeds drawn with replacement within sizes, the same for all variants."""
        means = []
        for t in self.tables:
            chosen = rng.integers(0, t.shape[1], (DRAWS, t.shape[1]))
            means.append(np.moveaxis(t[:, chosen].mean(-1), 0, 1))
        return np.stack(means, axis=-1)


# ---------------------------------------------------------------- slopes of differences


def slopes(ladder: Ladder, rng: Any) -> Iterator[tuple[str, Found]]:
    """All methods on one ladder whose true slopes are 0."""
    count, x = len(ladder.gain) - 1, np.log(ladder.params)
    sizes = ladder.run(rng, difference=np.zeros((len(ladder.gain), len(x))))
    losses, seeds = Losses.of(ladder, sizes), np.array(ladder.seeds, float)
    centred = x - np.average(x, weights=seeds)
    row = seeds * centred / (seeds @ centred**2)
    slope = (losses.mean[1:] - losses.mean[:1]) @ row
    drawn = losses.resampled(rng)
    low, high = np.quantile(
        (drawn[:, 1:] - drawn[:, :1]) @ row, [0.5 - sidak(count) / 2, 0.5 + sidak(count) / 2], axis=0
    )
    yield "seeds resampled within sizes", (bool((low <= 0).all() and (high >= 0).all()), float(high[0] - low[0]) / 2)
    squares = sum(float((_residuals(t) ** 2).sum()) for t in losses.tables)
    df = count * int(sum(seeds - 1))
    yield "t, noise of seeds alone", _symmetric(slope, dunnett_critical(count, df), squares / df, seeds @ centred**2)
    own = losses.mean - losses.mean.mean(0)
    left = own - np.average(own, axis=1, weights=seeds)[:, None] - (own @ row)[:, None] * centred
    df = count * (len(x) - 2)
    square = float((left**2 @ seeds).sum()) / df
    yield "t, residuals of the lines alone", _symmetric(slope, dunnett_critical(count, df), square, seeds @ centred**2)
    lines = list(lines_of(means_of(sizes, ladder.names), x, "v0").by_variant.values())
    half = lines[0].critical * lines[0].standard_error
    yield "the report's", (all(line.low <= 0 <= line.high for line in lines), half)


def _residuals(t: Any) -> Any:
    return t - t.mean(0) - t.mean(1, keepdims=True) + t.mean()


def _symmetric(slope: Any, critical: float, square: float, spread: float) -> Found:
    half = critical * math.sqrt(2 * square / spread)
    return bool((np.abs(slope) <= half).all()), half


# ---------------------------------------------------------------- the joint law


def predictions(ladder: Ladder, rng: Any) -> Iterator[tuple[str, Found]]:
    sizes = ladder.run(rng)
    means = means_of(sizes, ladder.names)
    law = law_of(means, np.log(ladder.params)[means.size])
    others = range(1, len(ladder.gain))

    def held(ranges: list[Range], true: Any) -> Found:
        return all(r.low <= t <= r.high for r, t in zip(ranges, true, strict=True)), (
            ranges[0].high - ranges[0].low
        ) / 2

    yield "exponent a", held([law.a], [ladder.exponent])
    yield "irreducible loss E", held([law.e], [ladder.irreducible])
    true = [(1 + ladder.gain[v]) ** (-1 / ladder.exponent) for v in others]
    yield "effective speed-ups by the law", held([law.speed_up(v, 0) for v in others], true)
    for factor in (4, 20):
        params = ladder.params[-1] * factor
        expected = (ladder.law([params]) + ladder.deviations(rng, 1))[:, 0]
        noise = rng.normal(0, ladder.sigma, len(expected))
        measured = expected + rng.normal(0, ladder.omega) + noise
        x = math.log(params)
        yield f"expected loss at {factor} times", held([law.loss(1, x)], expected[1:2])
        yield f"loss of one seed at {factor} times", held([law.loss(1, x, seeds=1)], measured[1:2])
        if factor == 4:
            yield (
                f"loss at {factor} times, seeds resampled",
                _resampled_law(ladder, Losses.of(ladder, sizes), x, rng, expected[1]),
            )
        for what, seeds, values in (("expected differences", None, expected), ("differences of one seed", 1, measured)):
            ranges = [law.difference(v, 0, x, seeds=seeds) for v in others]
            yield f"{what} at {factor} times", held(ranges, values[1:] - values[0])


def _resampled_law(ladder: Ladder, losses: Losses, x: float, rng: Any, true: float) -> Found:
    """Percentiles of the refitted law (least squares over the same exponents) at resampled seeds."""
    from headway.launcher.compare.ladder.curve import EXPONENTS

    count, center = len(ladder.gain), float(np.log(ladder.params).mean())
    z = np.log(ladder.params) - center
    design = np.zeros((len(EXPONENTS), count, len(z), count + 1))
    design[..., 0] = 1.0
    for v in range(count):
        design[:, v, :, v + 1] = np.exp(-EXPONENTS[:, None] * z)
    weight = np.sqrt(np.tile(np.array(ladder.seeds, float), count))
    matrix = design.reshape(len(EXPONENTS), -1, count + 1) * weight[:, None]
    drawn = losses.resampled(rng).reshape(DRAWS, -1) * weight
    solution = np.linalg.pinv(matrix) @ drawn.T  # [G, P, B]
    best = ((drawn.T - matrix @ solution) ** 2).sum(1).argmin(0)
    found = solution[best, :, np.arange(DRAWS)]
    low, high = np.quantile(found[:, 0] + found[:, 2] * np.exp(-EXPONENTS[best] * (x - center)), [0.025, 0.975])
    return bool(low <= true <= high), float(high - low) / 2


# ---------------------------------------------------------------- the file


def simulate(one: Callable[[Ladder, Any], Iterator[tuple[str, Found]]], repeats: int, **noise: Any) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    found: dict[str, list[Found]] = {}
    for _ in range(repeats):
        for name, result in one(Ladder(**noise), rng):
            found.setdefault(name, []).append(result)
    return {
        name: {
            "holds": round(float(np.mean([ok for ok, _ in results])), 4),
            "median_half_width": _finite(float(np.median([half for _, half in results]))),
        }
        for name, results in found.items()
    }


def _finite(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=1000)
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "ladder-coverage.json")
    given = options.parse_args()
    rows = []
    for seeds, gain in DESIGNS:
        for tau, common in LACKS:
            keys = {"seeds": seeds, "gain": gain, "tau": tau, "tau_common": common}
            row = {"seeds": seeds, "variants": len(gain), "lack_of_fit": tau, "lack_of_fit_common": common}
            row["slopes"] = simulate(slopes, given.repeats, **keys)
            row["law"] = simulate(predictions, given.repeats, **keys)
            rows.append(row)
            print(json.dumps(row), flush=True)
    record = {
        "command": f"{COMMAND} --repeats {given.repeats}",
        "commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "repeats": given.repeats,
        "standard_error_at_0.95": round(math.sqrt(0.95 * 0.05 / given.repeats), 4),
        "noise": {"seed": 0.02, "run": 0.015},
        "designs": rows,
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
