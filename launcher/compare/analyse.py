"""Compute the numbers of a report from a study folder: losses, differences, speeds and routers of each variant."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from headway.launcher.base.errors import SpecError
from headway.launcher.compare.cells import OUTCOMES, cell_state
from headway.launcher.compare.fairness import (
    Difference,
    Pairing,
    check_pairing,
    deviation,
    run_differences,
    spec_differences,
)
from headway.launcher.compare.simultaneous import Comparison, Simultaneous, compare_paired, compare_unpaired
from headway.launcher.compare.start import StartStrength, start_strengths
from headway.launcher.compare.stats import Estimate, Speed, estimate, paired_ratio, steady_speed
from headway.launcher.compare.trend import Trend, trend_of
from headway.launcher.compare.verdicts import Verdict, verdict
from headway.launcher.run.records import RunRecord, read_run
from headway.launcher.run.records_heads import Heads, Router, mean_routers
from headway.launcher.run.run_dir import flatten, read_mapping


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One cell. `loss`: the validation loss at the compared token count, for finished cells."""

    variant: str
    seed: int
    state: str
    detail: str
    record: RunRecord
    planned: dict[str, Any]
    loss: float | None
    speed: Speed | None

    @property
    def key(self) -> str:
        return f"{self.variant}/seed-{self.seed}"

    @property
    def done(self) -> bool:
        return self.state == "done"


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """One variant over its finished seeds. Fields are None without data to compute them from.

    `loss`, `difference` (to the baseline): in nats per token. `seconds_loss`, `seconds_difference`: the same at equal
    training seconds. Intervals of differences are simultaneous for all variants. `speed_ratio`: tokens/s relative to
    the baseline. `planned`: the entry of the variant in study.json. `routers`: means over seeds. `heads`: one value for
    each seed that recorded them.
    """

    name: str
    planned: dict[str, Any]
    losses: dict[int, float]
    loss: Estimate | None
    difference: Simultaneous | None
    speeds: dict[int, Speed]
    speed_ratio: Estimate | None
    seconds_loss: Estimate | None
    seconds_difference: Simultaneous | None
    routers: tuple[Router, ...]
    heads: dict[int, Heads]
    start: StartStrength

    @property
    def cost(self) -> dict[str, Any]:
        return self.planned["cost"]


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """All numbers of the report. `tokens`, `seconds`: token count and training time at which losses are compared.

    `trend`: None for unpaired studies.
    """

    out: Path
    record: dict[str, Any]
    cells: tuple[CellResult, ...]
    variants: tuple[VariantResult, ...]
    tokens: int | None
    tokens_are_final: bool
    seconds: float | None
    comparison: Comparison
    trend: Trend | None
    pairing: Pairing
    differences: tuple[Difference, ...]
    circumstances: tuple[str, ...]
    deviations: tuple[str, ...]
    leftovers: tuple[str, ...]

    @property
    def baseline(self) -> VariantResult:
        return next(v for v in self.variants if v.name == self.record["baseline"])

    @property
    def margin(self) -> float | None:
        """Margin of the study, in nats per token: smaller differences do not matter."""
        return self.record.get("margin_nats")

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
    outcomes = read_mapping(out / OUTCOMES)
    cells = [_read_cell(out, cell, outcomes) for cell in record["cells"]]
    tokens, final = _common_tokens([c.record for c in cells if c.done])
    cells = [_with_loss(c, tokens) for c in cells]
    done = {c.key: c for c in cells if c.done}
    seconds = _common_seconds([c.record for c in done.values()])
    hashes: dict[str, dict[int, dict[int, str]]] = {}
    for c in cells:
        hashes.setdefault(c.variant, {})[c.seed] = c.record.batch_hash
    pairing = check_pairing(hashes, record["baseline"])
    paired = pairing.status != "UNPAIRED"
    comparison = _compare(list(done.values()), record["baseline"], lambda c: c.loss, paired=paired)
    validations = _by_variant(list(done.values()), lambda c: c.record.validation if len(c.record.validation) else None)
    known = {c.key for c in cells}
    there = {f"{p.parent.name}/{p.name}" for p in (out / "cells").glob("*/seed-*")}
    return StudyResult(
        out=out,
        record=record,
        cells=tuple(cells),
        variants=tuple(_variants(record, list(done.values()), seconds, comparison, paired=paired)),
        tokens=tokens,
        tokens_are_final=final,
        seconds=seconds,
        comparison=comparison,
        trend=trend_of(validations, record["baseline"]) if paired else None,
        pairing=pairing,
        differences=tuple(_differences(record, cells)),
        circumstances=tuple(run_differences({key: c.record for key, c in done.items()})),
        deviations=tuple(_deviations(cells)),
        leftovers=tuple(sorted(there - known)),
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


def _read_cell(out: Path, cell: dict[str, Any], outcomes: dict[str, Any]) -> CellResult:
    run_dir = out / cell["run_dir"]
    record = read_run(run_dir)
    state = cell_state(run_dir, outcomes.get(f"{cell['variant']}/seed-{cell['seed']}"))
    tokens_per_step = record.run.get("tokens_per_step")
    return CellResult(
        variant=cell["variant"],
        seed=cell["seed"],
        state=state.state,
        detail=state.detail,
        record=record,
        planned=cell["spec"],
        loss=None,
        speed=steady_speed(record.step_s.tolist(), tokens_per_step) if tokens_per_step else None,
    )


def _common_tokens(done: list[RunRecord]) -> tuple[int | None, bool]:
    """(largest token count at which all finished runs were validated, whether it is the end of all these runs)."""
    if not done:
        return None, False
    validated = [{int(t) for t in r.validation.tokens if math.isfinite(t)} for r in done]
    common = set.intersection(*validated)
    if not common:
        return None, False
    tokens = max(common)
    return tokens, all(tokens == max(own) and tokens == r.tokens for own, r in zip(validated, done, strict=True))


def _common_seconds(done: list[RunRecord]) -> float | None:
    """Training seconds of the fastest finished run at its last validation. All finished runs reached this time."""
    ends = [float(r.validation.train_s[-1]) for r in done if len(r.validation)]
    return min(ends) if ends and math.isfinite(min(ends)) else None


def _with_loss(cell: CellResult, tokens: int | None) -> CellResult:
    if not cell.done:
        return cell
    loss = None if tokens is None else cell.record.validation.loss_at_tokens(tokens)
    state, detail = cell.state, cell.detail
    if loss is None or not math.isfinite(loss):
        state, detail, loss = "failed", f"trained to its end, but its validation loss is {loss}", None
    return replace(cell, loss=loss, state=state, detail=detail)


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


def _variants(
    record: dict[str, Any], done: list[CellResult], seconds: float | None, comparison: Comparison, *, paired: bool
) -> list[VariantResult]:
    def at_seconds(cell: CellResult) -> float | None:
        return None if seconds is None else cell.record.validation.loss_at_seconds(seconds)

    base = record["baseline"]
    all_losses, all_timed = _by_variant(done, lambda c: c.loss), _by_variant(done, at_seconds)
    all_speeds, all_heads = _by_variant(done, lambda c: c.speed), _by_variant(done, lambda c: c.record.heads)
    timed_comparison = _compare(done, base, at_seconds, paired=paired)
    names = [planned["name"] for planned in record["variants"]]
    starts = start_strengths(
        {name: [c.record.start for c in done if c.variant == name and c.record.start] for name in names}, base
    )
    tokens_per_s = {v: {s: x.tokens_per_s for s, x in by_seed.items()} for v, by_seed in all_speeds.items()}
    results = []
    for planned in record["variants"]:
        name = planned["name"]
        losses, timed = all_losses.get(name, {}), all_timed.get(name, {})
        ratio = None if name == base else paired_ratio(tokens_per_s.get(name, {}), tokens_per_s.get(base, {}))
        results.append(
            VariantResult(
                name=name,
                planned=planned,
                losses=losses,
                loss=estimate(list(losses.values())) if losses else None,
                difference=comparison.differences.get(name),
                speeds=all_speeds.get(name, {}),
                speed_ratio=ratio,
                seconds_loss=estimate(list(timed.values())) if timed else None,
                seconds_difference=timed_comparison.differences.get(name),
                routers=mean_routers(c.record.routers for c in done if c.variant == name),
                heads=all_heads.get(name, {}),
                start=starts[name],
            )
        )
    return results


def _differences(record: dict[str, Any], cells: list[CellResult]) -> list[Difference]:
    """Spec differences of the first seed. Seeds change only the two seed keys, which are equal within a seed."""
    seed = record["seeds"][0]
    specs = {c.variant: c.record.spec or c.planned for c in cells if c.seed == seed}
    keys = {v["name"]: set(v["keys"]) for v in record["variants"]}
    written = {v["name"]: set(v.get("written", flatten(specs.get(v["name"], {})))) for v in record["variants"]}
    base, free = record["baseline"], record["match"]["free"] if record["match"] else None
    return [
        d
        for name, spec in specs.items()
        if name != base
        for d in spec_differences(
            name,
            spec,
            specs[base],
            declared=keys[name] | keys[base],
            written=written[name] | written[base],
            free=free,
        )
    ]


def _deviations(cells: list[CellResult]) -> list[str]:
    return [
        f"{c.key}: {key}: planned {planned!r}, trained {trained!r}"
        for c in cells
        for key, planned, trained in deviation(c.planned, c.record.spec)
    ]
