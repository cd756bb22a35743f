"""`headway study plan`: the number of seeds that a study needs, from the spread of its finished cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.compare.analyse import analyse
from headway.launcher.compare.simultaneous import dunnett_critical
from headway.launcher.compare.verdicts import (
    MOST_SEEDS,
    cautious_spread,
    chance_of_difference,
    chance_of_equivalence,
)
from headway.launcher.study.config import load_study
from headway.launcher.study.keeping import restore_design

SHOWN = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, MOST_SEEDS)


@dataclass(frozen=True, kw_only=True)
class SeedsRow:
    """Expected result with `seeds` per variant. `half_width`: of the simultaneous interval, in nats per token.

    The other fields are probabilities (0..1): to show a true difference equal to the margin, and to show equivalence
    within the margin if the true difference is 0.
    """

    seeds: int
    half_width: float
    difference: float
    equivalence: float


@dataclass(frozen=True, kw_only=True)
class SeedsPlan:
    """`needed`: minimum number of seeds that reaches the power for both. `cautious`: the same at the upper end of the
    95 % interval of the spread. None if more than `MOST_SEEDS` are needed.
    """

    comparisons: int
    spread: float
    degrees_of_freedom: int
    power: float
    margin: float
    rows: tuple[SeedsRow, ...]
    needed: int | None
    cautious: int | None


def plan_seeds(path: Path, overrides: Sequence[str] = (), *, power: float, margin: float | None, as_json: bool) -> int:
    """Print the plan of a study whose folder contains a pilot. Returns 0.

    `margin`: in nats per token; default: `margin_nats` of the study, else 0.01. Raises SpecError if the folder does not
    contain two finished seeds of two variants, and for a power or margin out of range.
    """
    study = load_study(path)
    margin = margin if margin is not None else study.config.margin_nats or 0.01
    if not 0 < power < 1:
        raise SpecError(f"--power: {power} is no chance; use a number above 0 and below 1, such as 0.8")
    if not 0 < margin < float("inf"):
        raise SpecError(f"--margin: {margin} is no difference in loss; use nats per token above 0, such as 0.01")
    restore_design(study)
    folders = {name: study.out / "sizes" / name for name in study.config.sizes} or {"": study.out}
    again = f"headway study run {path}"
    found = {name: pilot_plan(out, power=power, margin=margin, again=again) for name, out in folders.items()}
    if as_json:
        console.emit(asdict(found[""]) if "" in found else {name: asdict(plan) for name, plan in found.items()})
    else:
        for name, plan in found.items():
            console.result("\n".join([*([f"size {name}"] if name else []), *_lines(plan)]))
    return 0


def pilot_plan(out: Path, *, power: float, margin: float, again: str) -> SeedsPlan:
    """The plan from the finished cells in the folder of a study. `again`: the command that trains more cells."""
    if not (out / "study.json").exists():
        raise SpecError(f"{out}: no study was started here, so there is no spread to plan from; train a pilot: {again}")
    comparison = analyse(out).comparison
    if comparison.spread is None or not comparison.spread:
        raise SpecError(
            f"{out}: the spread between runs needs at least two finished seeds of the baseline and of another variant; "
            f"add a seed to the study and train it: {again}"
        )
    count, spread = len(comparison.differences), comparison.spread
    high = cautious_spread(comparison)
    assert high is not None
    needed = _needed(count, spread, power, margin)
    shown = {n for n in SHOWN if n <= 2 * (needed or MOST_SEEDS)}
    seeds: list[int] = sorted(shown)[:12]
    if needed is not None and needed not in seeds:
        seeds = sorted([*seeds, needed])
    return SeedsPlan(
        comparisons=count,
        spread=spread,
        degrees_of_freedom=comparison.degrees_of_freedom,
        power=power,
        margin=margin,
        rows=tuple(_row(n, count, spread, margin) for n in seeds),
        needed=needed,
        cautious=_needed(count, high, power, margin),
    )


def _row(n: int, count: int, spread: float, margin: float) -> SeedsRow:
    return SeedsRow(
        seeds=n,
        half_width=dunnett_critical(count, count * (n - 1)) * spread * (2 / n) ** 0.5,
        difference=chance_of_difference(n, count, spread, margin),
        equivalence=chance_of_equivalence(n, count, spread, 0.0, margin),
    )


def _needed(count: int, spread: float, power: float, margin: float) -> int | None:
    """Binary search for the minimum number of seeds: the power never decreases with more seeds."""

    def enough(n: int) -> bool:
        row = _row(n, count, spread, margin)
        return row.difference >= power and row.equivalence >= power

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _lines(plan: SeedsPlan) -> list[str]:
    head = (
        f"spread of a run {plan.spread:.4f} nats per token ({plan.degrees_of_freedom} degrees of freedom), "
        f"{plan.comparisons} comparisons with the baseline"
    )
    title = f"{'seeds':>6}  {'interval +-':>11}  {'shows ' + format(plan.margin, 'g'):>14}  {'shows equivalence':>17}"
    rows = [
        f"{r.seeds:>6}  {r.half_width:>11.4f}  {r.difference:>14.0%}  {r.equivalence:>17.0%}"
        + ("  <- needed" if r.seeds == plan.needed else "")
        for r in plan.rows
    ]
    needed = f"more than {MOST_SEEDS:,}" if plan.needed is None else str(plan.needed)
    cautious = f"more than {MOST_SEEDS:,}" if plan.cautious is None else str(plan.cautious)
    return [
        head,
        title,
        *rows,
        f"needed for power {plan.power:g} at a margin of {plan.margin:g} nats per token: {needed} seeds; {cautious} if "
        "the true spread is at the upper end of its 95 % interval",
    ]
