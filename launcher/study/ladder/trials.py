"""Train the trials of the tuned keys of a study, and keep what was found in `tuning.json` of every size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import PREEMPTED, HeadwayError
from headway.launcher.compare.cell_record import record_file
from headway.launcher.compare.cells import OUTCOMES, cell_state
from headway.launcher.run.run_dir import read_mapping, write_json
from headway.launcher.study.branches import changes
from headway.launcher.study.config import Study
from headway.launcher.study.keeping import keep_file
from headway.launcher.study.ladder.choice import Choice, Curve, carried, choose, next_values, together
from headway.launcher.study.ladder.plan import BATCH, Ladder, Size
from headway.launcher.study.plan import Cell, StudyPlan, cell_key

TUNING = "tuning.json"
"""The file in the folder of a study or ladder that lists trials and chosen values."""

Train = Callable[[Sequence[Study]], int]
"""Train the unfinished cells of studies. Returns the exit status of `study run`."""

Values = dict[str, dict[str, dict[str, Any]]]
"""Size -> variant -> tuned keys and their values."""


class TrialsFailed(HeadwayError):
    """Trials ended without a loss, for another reason than divergence."""


def tune(ladder: Ladder, train: Train) -> tuple[int, Values]:
    """Train all trials and choose the values. Returns (exit status, values); the values are complete if it is 0.

    Raises TrialsFailed if a trial has no loss after the training, or no trial of a variant has a finite one.
    """
    values: Values = {size.name: {} for size in ladder.sizes}
    found: dict[str, dict[str, Any]] = {size.name: {} for size in ladder.sizes}
    for key in ladder.config.tune:
        choices, records, code = _tune_key(ladder, key, values, train)
        if code:
            return code, values
        for size in ladder.sizes:
            for variant, choice in choices[size.name].items():
                values[size.name].setdefault(variant, {})[key] = choice.value
            found[size.name][key] = records[size.name]
        _write(ladder, found)
    return 0, values


def trial_plans(ladder: Ladder) -> list[tuple[str, str, list[float], int]]:
    """(size, key, grid, trials of the grid over all variants and seeds) for the design that is printed."""
    return [
        (size.title, key, list(search.grid), len(search.grid) * len(_variants(ladder, size)) * len(search.seeds))
        for key, search in ladder.config.tune.items()
        for size in ladder.tuned_sizes(key)
    ]


def stored_values(ladder: Ladder) -> Values:
    """Values that an earlier call of `tune` chose and wrote. Empty for sizes without them."""
    found: Values = {}
    for size in ladder.sizes:
        kept = {} if size.records is None else read_mapping(size.records / TUNING)
        keys = (read_mapping(size.out / TUNING) or kept).get("keys", {})
        for key in ladder.config.tune:
            for variant, choice in keys.get(key, {}).get("variants", {}).items():
                found.setdefault(size.name, {}).setdefault(variant, {})[key] = choice["chosen"]
    return found


def _tune_key(
    ladder: Ladder, key: str, values: Values, train: Train
) -> tuple[dict[str, dict[str, Choice]], dict[str, Any], int]:
    search, sizes = ladder.config.tune[key], ladder.tuned_sizes(key)
    grids = {size.name: list(search.grid) for size in sizes}
    while True:
        code = train([ladder.trial(s, key, value, values[s.name]) for s in sizes for value in grids[s.name]])
        if code == PREEMPTED:
            return {}, {}, code
        curves = {s.name: _curves(ladder, s, key, grids[s.name], values[s.name]) for s in sizes}
        if key == BATCH:  # runs of different batches would read different data, and could not be compared by pairs
            curves = {name: together(by_variant) for name, by_variant in curves.items()}
        more = {
            s.name: next_values(search, grids[s.name], _checked(curves[s.name], s, key), ladder.legal(s, key))
            for s in sizes
        }
        if not any(more.values()):
            break
        for size in sizes:
            if more[size.name]:
                shown = ", ".join(f"{value:g}" for value in more[size.name])
                console.say(f"tune {key} at {size.title}: the best value lies on an edge of the grid; adding {shown}")
                grids[size.name] = sorted([*grids[size.name], *more[size.name]])
    choices = {s.name: {v: choose(curve, ladder.legal(s, key)) for v, curve in curves[s.name].items()} for s in sizes}
    chosen = {name: {v: c.value for v, c in by.items()} for name, by in choices.items()}
    edges = {name: {v for v, c in by.items() if c.edge} for name, by in choices.items()}
    for size in ladder.sizes:
        if size.name not in choices:
            every = carried(
                search.carry,
                chosen,
                params={s.name: s.params for s in ladder.sizes},
                widths={s.name: s.spec.model.width for s in ladder.sizes},
                size=size.name,
                legal=ladder.legal(size, key),
                edges=edges,
            )
            choices[size.name] = {v: every[v] for v in _variants(ladder, size) if v in every}
    records = {
        s.name: _record(ladder, s, key, grids.get(s.name, []), choices[s.name], values[s.name]) for s in ladder.sizes
    }
    for size in ladder.sizes:
        for variant, choice in choices[size.name].items():
            console.say(f"tune {key} at {size.title}: {variant} {choice.value:g} ({choice.how})")
    return choices, records, 0


def check_carried(ladder: Ladder, values: Values, train: Train) -> int:
    """Train the baseline with each carried value and its neighbours at the largest size without trials.

    Adds to tuning.json of that size whether the carried value is the best of the three. Nothing else changes, so this
    comes after the cells of the study. Returns an exit status.
    """
    failed, baseline = 0, ladder.config.baseline_name
    for key, search in ladder.config.tune.items():
        size = ladder.checked_size(key)
        if size is None:
            continue
        others = {v: {k: x for k, x in by.items() if k != key} for v, by in values[size.name].items()}
        middle = values[size.name][baseline][key]
        legal = ladder.legal(size, key)
        around = sorted({legal(middle / search.factor), middle, legal(middle * search.factor)})
        studies = [_only(ladder.trial(size, key, value, others), baseline) for value in around]
        code = train(studies)
        if code == PREEMPTED:
            return code
        failed |= code
        curve = {value: _loss(study, baseline, key) for value, study in zip(around, studies, strict=True)}
        best = min(curve, key=lambda value: curve[value])
        trials = _trials(studies, around, baseline, key)
        record = read_mapping(size.out / TUNING)
        record["keys"][key]["check"] = {"variant": baseline, "trials": trials, "holds": best == middle, "best": best}
        _keep(size, record)
        if best != middle:
            console.alert(
                f"tune {key}: at {size.title} the carried value {middle:g} of {baseline} is worse than {best:g} by "
                f"{curve[middle] - curve[best]:.2g} nats per token; the report says so. Trials at this size would mend "
                "it: name it in `sizes` of the search"
            )
    return failed


def _only(study: Study, variant: str) -> Study:
    """The study with one variant."""
    config = study.config.model_copy(update={"variants": {variant: study.config.variants[variant]}, "asks": []})
    return replace(study, config=config, variants={variant: study.variants[variant]})


def _variants(ladder: Ladder, size: Size) -> list[str]:
    named = ladder.config.sizes[size.name].variants if size.name else None
    return [v for v in ladder.config.variants if named is None or v in named]


def _curves(
    ladder: Ladder, size: Size, key: str, grid: Sequence[float], values: Mapping[str, dict[str, Any]]
) -> dict[str, Curve]:
    studies = {value: ladder.trial(size, key, value, values) for value in grid}
    return {v: {x: _loss(study, v, key) for x, study in studies.items()} for v in _variants(ladder, size)}


def _checked(curves: Mapping[str, Curve], size: Size, key: str) -> Mapping[str, Curve]:
    for variant, curve in curves.items():
        if not any(math.isfinite(loss) for loss in curve.values()):
            raise TrialsFailed(
                f"tune: {key}: every trial of {variant} at {size.title} diverged ("
                f"{', '.join(f'{v:g}' for v in curve)}); use a grid of smaller values"
            )
    return curves


def _loss(study: Study, variant: str, key: str) -> float:
    """Mean validation loss of a variant over the seeds of its trials; infinite if one diverged."""
    losses = [_trial_loss(study, variant, seed, key) for seed in study.config.seeds]
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf


def _trial_loss(study: Study, variant: str, seed: int, key: str) -> float:
    name = cell_key(variant, seed)
    outcome = read_mapping(study.out / OUTCOMES).get(name)
    record = None if study.records is None else record_file(study.records, name)
    state = cell_state(study.out / "cells" / name, outcome, record, key=name)
    if state.state == "done" and state.validation_loss is not None:
        return state.validation_loss
    if diverged(outcome):
        return math.inf
    raise TrialsFailed(
        f"tune: {key}: the trial {study.out / 'cells' / name} is {state.state}{': ' if state.detail else ''}"
        f"{state.detail}; the same command tries it again"
    )


def without_diverged(plan: StudyPlan) -> StudyPlan:
    """The plan of trials without those that diverged: they would diverge again.

    A trial that diverged with another spec or other data stays in the plan, and is refused as a finished one is.
    """
    outcomes = read_mapping(plan.study.out / OUTCOMES)
    return replace(plan, cells=tuple(c for c in plan.cells if not diverged(outcomes.get(c.key)) or _is_another(c)))


def _is_another(cell: Cell) -> bool:
    """Whether the run in the folder of a cell is gone, or is not the planned one."""
    return not cell.run_dir.is_dir() or bool(changes(cell))


def diverged(outcome: Mapping[str, Any] | None) -> bool:
    """Whether the guard of a run ended it (`guard.max_skipped` or `guard.spike`)."""
    lines = (outcome or {}).get("last_lines", [])
    return bool(outcome) and outcome.get("exit_code") == 70 and any("(guard." in str(line) for line in lines)


def _trials(studies: Sequence[Study], grid: Sequence[float], variant: str, key: str) -> list[dict[str, Any]]:
    found = []
    for value, study in zip(grid, studies, strict=True):
        for seed in study.config.seeds:
            loss = _trial_loss(study, variant, seed, key)
            finite = math.isfinite(loss)
            found.append({"value": value, "seed": seed, "loss": loss if finite else None, "done": finite})
    return found


def _record(
    ladder: Ladder,
    size: Size,
    key: str,
    grid: Sequence[float],
    choices: Mapping[str, Choice],
    values: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    search = ladder.config.tune[key]
    studies = [ladder.trial(size, key, value, values) for value in grid]
    return {
        "grid": list(grid),
        "extended": max(0, len(grid) - len(search.grid)),
        "budget": search.budget,
        "tokens_per_trial": ladder.trial_tokens(size, key),
        "variants": {v: {**choice.record(), "trials": _trials(studies, grid, v, key)} for v, choice in choices.items()},
    }


def _keep(size: Size, record: dict[str, Any]) -> None:
    write_json(size.out / TUNING, record)
    keep_file(size.out, size.records, TUNING)


def _write(ladder: Ladder, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write tuning.json of every size."""
    for size in ladder.sizes:
        size.out.mkdir(parents=True, exist_ok=True)
        _keep(size, {"format": 1, "keys": found[size.name]})
