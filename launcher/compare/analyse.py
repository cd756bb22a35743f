"""Compute the numbers of a report from a study folder: losses, differences, speeds and routers of each variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headway.launcher.base.errors import SpecError
from headway.launcher.base.loss_unit import PER_TOKEN, loss_unit
from headway.launcher.compare.batch_hashes import Hashes
from headway.launcher.compare.cell_results import FULL, CellResult, common_end, read_cells
from headway.launcher.compare.cells import cells_there, records_of
from headway.launcher.compare.effective import HOW_TO_MEASURE, Effective, EffectiveCosts, effective_costs
from headway.launcher.compare.fairness import (
    Difference,
    Pairing,
    check_pairing,
    deviation,
    run_differences,
    spec_differences,
    weights_differences,
)
from headway.launcher.compare.simultaneous import Comparison, Simultaneous, compare_paired, compare_unpaired
from headway.launcher.compare.start import Start, StartStrength, start_strengths
from headway.launcher.compare.stats import Estimate, Speed, estimate, paired_ratio
from headway.launcher.compare.timing import Speeds, speeds_of
from headway.launcher.compare.training_flops import per_token
from headway.launcher.compare.trend import Trend, trend_of
from headway.launcher.compare.verdicts import Verdict, verdict
from headway.launcher.run.records_heads import Heads, Router, mean_routers
from headway.launcher.run.run_dir import flatten, read_mapping


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """One variant over its finished seeds. Fields are None without data to compute them from.

    `loss`, `difference` (to the baseline): in the `unit` of the study. Intervals of differences are simultaneous for
    all variants. `effective`: how much less of a cost reaches the same loss. `speeds`: by seed, or by round of the
    timing part (`StudyResult.speeds`). `speed_ratio`: tokens/s relative to the baseline. `planned`: the entry of the
    variant in study.json. `routers`: means over seeds. `heads`: one value for each seed that recorded them.
    """

    name: str
    planned: dict[str, Any]
    losses: dict[int, float]
    loss: Estimate | None
    difference: Simultaneous | None
    speeds: dict[int, Speed]
    speed_ratio: Estimate | None
    effective: Effective | None
    routers: tuple[Router, ...]
    heads: dict[int, Heads]
    start: StartStrength

    @property
    def cost(self) -> dict[str, Any]:
        return self.planned["cost"]


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """All numbers of the report. `tokens`: the token count at which losses are compared.

    `own_ends`: whether losses are compared at the end of each cell, whose lengths differ; `tokens` is then the largest.
    `cells`: those of the full budget, which alone give every number except for `effective`. `short_cells`: those of
    smaller budgets. `short_pairing`: their pairing, by budget. `short_deviations`: their differences from the plan.
    `trend`: None for unpaired studies.
    """

    out: Path
    record: dict[str, Any]
    cells: tuple[CellResult, ...]
    variants: tuple[VariantResult, ...]
    tokens: int | None
    tokens_are_final: bool
    own_ends: bool
    comparison: Comparison
    trend: Trend | None
    pairing: Pairing
    differences: tuple[Difference, ...]
    circumstances: tuple[str, ...]
    deviations: tuple[str, ...]
    leftovers: tuple[str, ...]
    short_cells: tuple[CellResult, ...]
    short_pairing: dict[float, Pairing]
    short_deviations: tuple[str, ...]
    effective: EffectiveCosts
    speeds: Speeds

    @property
    def baseline(self) -> VariantResult:
        return next(v for v in self.variants if v.name == self.record["baseline"])

    @property
    def unit(self) -> str:
        """Unit of the losses: nats per token, or per target token where only targets are predicted."""
        return next((loss_unit(c.planned) for c in self.cells), PER_TOKEN)

    @property
    def when(self) -> str:
        """Where losses are compared, for a sentence."""
        return "at the end of each run" if self.own_ends else f"after {self.tokens or 0:,} training tokens"

    def tokens_of(self, variant: str) -> int | None:
        """The token count at which losses of a variant are compared."""
        if not self.own_ends:
            return self.tokens
        return next((c.record.tokens for c in self.cells if c.variant == variant and c.done), None)

    @property
    def confounds(self) -> int:
        """Number of differences between runs that the study did not name, which the section on fairness lists."""
        named = sum(d.kind == "CONFOUND" for d in self.differences)
        return named + len(self.circumstances) + len(self.deviations)

    @property
    def margin(self) -> float | None:
        """Margin of the study, in the `unit` of losses: smaller differences do not matter."""
        return self.record.get("margin_nats")

    @property
    def tuned(self) -> set[str]:
        """Keys whose values a search of the study chose for each variant."""
        return set(self.record.get("tuned", ()))

    def differences_at(self, budget: float) -> dict[str, Simultaneous]:
        """Variant -> difference to the baseline at the end of a budget, simultaneous for all variants of it."""
        done = [c for c in (*self.cells, *self.short_cells) if c.done and c.budget == budget]
        pairing = self.short_pairing.get(budget, self.pairing)
        paired = pairing.status != "UNPAIRED"
        return _compare(done, self.record["baseline"], lambda c: c.loss, paired=paired).differences

    def verdict(self, variant: VariantResult) -> Verdict:
        """Verdict on a variant against the baseline; undecided if no difference was computed."""
        return "undecided" if variant.difference is None else verdict(variant.difference, self.margin)

    @property
    def others(self) -> list[VariantResult]:
        return [v for v in self.variants if v.name != self.record["baseline"]]

    def card(self, key: str) -> Any:
        """A value of run.json that is the same for all runs; None if no run has it."""
        return next((c.record.run[key] for c in self.cells if c.record.run.get(key) is not None), None)


def analyse(out: Path) -> StudyResult:
    """Read a study folder and compute all results. Raises SpecError if it does not contain a study."""
    record = read_mapping(out / "study.json")
    if record.get("format") != 1:
        raise SpecError(f"{out}: has no readable study.json; run the study, or name the folder it was run in")
    base = record["baseline"]
    records = records_of(out, record)
    own_ends = record.get("compare_at") == "ends"
    every = read_cells(out, record["cells"], records, own_ends=own_ends)
    cells = [c for c in every if c.budget == FULL]
    short = [c for c in every if c.budget != FULL]
    end = common_end(cells, FULL, own_ends=own_ends)
    done = {c.key: c for c in cells if c.done}
    pairing = check_pairing(_hashes(cells), base)
    paired = pairing.status != "UNPAIRED"
    comparison = _compare(list(done.values()), base, lambda c: c.loss, paired=paired)
    validations = _by_variant(list(done.values()), lambda c: c.record.validation if len(c.record.validation) else None)
    short_pairing = {
        b: check_pairing(_hashes([c for c in short if c.budget == b]), base) for b in sorted({c.budget for c in short})
    }
    all_paired = paired and all(p.status != "UNPAIRED" for p in short_pairing.values())
    speeds = speeds_of(out, record, cells, records)
    effective = _effective(record, every, comparison, speeds, paired=all_paired)
    there = cells_there(out, records)
    return StudyResult(
        out=out,
        record=record,
        cells=tuple(cells),
        variants=tuple(_variants(record, list(done.values()), comparison, effective, speeds)),
        tokens=end.tokens,
        tokens_are_final=end.final,
        own_ends=own_ends,
        comparison=comparison,
        trend=trend_of(validations, base) if paired and not own_ends else None,
        pairing=pairing,
        differences=tuple(_differences(record, cells)),
        circumstances=(
            *run_differences({key: c.record for key, c in done.items()}, lengths=not own_ends),
            *weights_differences(_begins(list(done.values()))),
        ),
        deviations=tuple(_deviations(cells)),
        leftovers=tuple(sorted(there - {c.key for c in every})),
        short_cells=tuple(short),
        short_pairing=short_pairing,
        short_deviations=tuple(_deviations(short)),
        effective=effective,
        speeds=speeds,
    )


def seed_mean(curves: list[tuple[Any, Any]], points: int = 200) -> tuple[Any, Any] | None:
    """Mean of several curves (x, y) on a common grid over the range of x that all curves cover; None without curves."""
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return None
    if all(np.array_equal(x, curves[0][0]) for x, _ in curves):
        return curves[0][0], np.mean([y for _, y in curves], axis=0)
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if low >= high:
        return None
    grid = np.linspace(low, high, points)
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)


def _by_variant(done: list[CellResult], value: Callable[[CellResult], Any]) -> dict[str, dict[int, Any]]:
    """Variant -> seed -> value, without values that are None."""
    found: dict[str, dict[int, Any]] = {}
    for c in done:
        if (v := value(c)) is not None:
            found.setdefault(c.variant, {})[c.seed] = v
    return found


def _compare(
    done: list[CellResult], baseline: str, loss: Callable[[CellResult], float | None], *, paired: bool
) -> Comparison:
    losses = _by_variant(done, loss)
    if paired:
        return compare_paired(losses, baseline)
    return compare_unpaired({v: list(by_seed.values()) for v, by_seed in losses.items()}, baseline)


def _hashes(cells: list[CellResult]) -> dict[str, dict[int, Hashes]]:
    """Variant -> seed -> hashes of the global batches, without damaged cells."""
    found: dict[str, dict[int, Hashes]] = {}
    for c in (c for c in cells if not c.damaged):
        found.setdefault(c.variant, {})[c.seed] = c.steps.hashes
    return found


def _effective(
    record: dict[str, Any], cells: list[CellResult], comparison: Comparison, speeds: Speeds, *, paired: bool
) -> EffectiveCosts:
    budgets = sorted({c.budget for c in cells})
    if len(budgets) < 2:
        return EffectiveCosts(tokens={}, why=f"the study has one budget; {HOW_TO_MEASURE}")
    ends = {b: common_end(cells, b) for b in budgets}
    lost = [b for b, end in ends.items() if end.tokens is None]
    if lost:
        shown = ", ".join(f"{b:g}" for b in lost)
        return EffectiveCosts(tokens={}, why=f"no cell of budget {shown} has finished; run the study again")
    uneven = [b for b, end in ends.items() if not end.final]
    if uneven:
        shown = ", ".join(f"{b:g}" for b in uneven)
        return EffectiveCosts(tokens={}, why=f"the cells of budget {shown} did not all end at one token count")
    losses: dict[str, dict[float, dict[int, float]]] = {planned["name"]: {} for planned in record["variants"]}
    for c in cells:
        if c.done and c.loss is not None:
            losses[c.variant].setdefault(c.budget, {})[c.seed] = c.loss
    return effective_costs(
        losses,
        {b: end.tokens for b, end in ends.items() if end.tokens is not None},
        record["baseline"],
        flops={p["name"]: per_token(p["cost"], ends[budgets[-1]].tokens) for p in record["variants"]},
        speeds=speeds.tokens_per_s,
        own_spread=comparison.own_spread,
        paired=paired,
    )


def _variants(
    record: dict[str, Any], done: list[CellResult], comparison: Comparison, effective: EffectiveCosts, speeds: Speeds
) -> list[VariantResult]:
    base = record["baseline"]
    all_losses = _by_variant(done, lambda c: c.loss)
    all_heads, tokens_per_s = _by_variant(done, lambda c: c.record.heads), speeds.tokens_per_s
    names = [planned["name"] for planned in record["variants"]]
    trained = _converted(record)  # the strength of trained attention at the start is no confound
    starts = start_strengths({name: [] if name in trained else _starts(done, name) for name in names}, base)
    results = []
    for planned in record["variants"]:
        name = planned["name"]
        losses = all_losses.get(name, {})
        ratio = None if name == base else paired_ratio(tokens_per_s.get(name, {}), tokens_per_s.get(base, {}))
        results.append(
            VariantResult(
                name=name,
                planned=planned,
                losses=losses,
                loss=estimate(list(losses.values())) if losses else None,
                difference=comparison.differences.get(name),
                speeds=speeds.by_variant.get(name, {}),
                speed_ratio=ratio,
                effective=effective.by_variant.get(name),
                routers=mean_routers(c.record.routers for c in done if c.variant == name),
                heads=all_heads.get(name, {}),
                start=starts[name],
            )
        )
    return results


def _begins(done: list[CellResult]) -> Iterator[tuple[str, str, str]]:
    """(key, planned place, hash) of the initial weights of cells that began from some."""
    for c in done:
        planned, trained = (spec.get("init") or {} for spec in (c.planned, c.record.spec))
        if planned.get("weights") and trained.get("sha256"):
            yield c.key, str(planned["weights"]), str(trained["sha256"])


GIVEN_START = {"init", "model.branch_start"}
"""Keys that belong to `from` of a variant: with given weights, how strongly random ones would start has no effect."""


def _converted(record: dict[str, Any]) -> set[str]:
    """Variants that start from converted weights."""
    return {v["name"] for v in record["variants"] if (v.get("uptraining") or {}).get("kind") == "from"}


def _starts(done: list[CellResult], name: str) -> list[Start]:
    return [c.record.start for c in done if c.variant == name and c.record.start]


def _differences(record: dict[str, Any], cells: list[CellResult]) -> list[Difference]:
    """Spec differences within the first seed that a variant shares with the baseline. Other seeds have the same."""
    by_seed = {(c.variant, c.seed): c.record.spec or c.planned for c in cells}
    names, base = [v["name"] for v in record["variants"]], record["baseline"]
    pairs = {
        name: next(
            ((by_seed[name, s], by_seed[base, s]) for s in record["seeds"] if {(name, s), (base, s)} <= by_seed.keys()),
            None,
        )
        for name in names
    }
    specs = {name: pair[0] for name, pair in pairs.items() if pair is not None}
    keys = {v["name"]: set(v["keys"]) for v in record["variants"]}
    written = {v["name"]: set(v.get("written", flatten(specs.get(v["name"], {})))) for v in record["variants"]}
    free = record["match"]["free"] if record["match"] else None
    converted = _converted(record)
    return [
        d
        for name, pair in pairs.items()
        if name != base and pair is not None
        for d in spec_differences(
            name,
            *pair,
            declared=keys[name] | keys[base] | (GIVEN_START if name in converted else set()),
            written=written[name] | written[base],
            free=free,
            named="the runs differ in it" if record.get("comparison") else "named in the study",
        )
    ]


def _deviations(cells: list[CellResult]) -> list[str]:
    return [
        f"{c.key}: {key}: planned {planned!r}, trained {trained!r}"
        for c in cells
        for key, planned, trained in deviation(c.planned, c.record.spec)
    ]
