"""Plan the cells of a study: match every variant to the baseline, and resolve the spec of every variant and seed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base.errors import SpecError, printable
from headway.launcher.compare.cell_record import record_file
from headway.launcher.match.bounds import count_bounds
from headway.launcher.match.matching import (
    MatchConfig,
    Matched,
    check_baseline,
    check_free,
    match_variant,
    quantity_of,
    spec_cost,
    value_at,
)
from headway.launcher.match.measured import Measurements, spread_note
from headway.launcher.run.run_dir import flatten
from headway.launcher.study.budgets import Budget, cell_key, plan_budgets
from headway.launcher.study.config import FULL, SET_BY_STUDY, Study
from headway.launcher.study.resolver import START, Facts, Resolver

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec
    from headway.model.cost import Cost

KEEP = "checkpoint.keep_at_tokens"


@dataclass(frozen=True, kw_only=True)
class VariantPlan:
    """A variant with its size. `matched`: None for the baseline, and for all variants of a study without matching.

    `free_value`: the value of `match.free`, solved or as written; None in a study without matching. `budgets`: those
    below 1. `uptraining`: for a variant with `from` or `compute`, what the report needs of it.
    """

    name: str
    keys: dict[str, Any]
    spec: Spec
    cost: Cost
    matched: Matched | None
    free_value: Any
    notes: tuple[str, ...]
    budgets: tuple[Budget, ...]
    uptraining: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the study. `overrides`: arguments of `headway train` that change the base spec into `spec`.

    `after`: key of the cell that must be complete before this one starts: the teacher whose weights it converts.
    `parent`: folder of the full run that the cell continues after `branch_step`; None for a cell that is trained from
    its start. `whole`: the same cell trained from its start, if `parent` is not None. `record`, `parent_record`: the
    files of their records, which exist once a cell is finished; None in a study without records.
    """

    variant: str
    seed: int
    run_dir: Path
    overrides: tuple[str, ...]
    spec: Spec
    vocab_size: int
    data_fingerprint: str | None
    budget: float = FULL
    after: str | None = None
    parent: Path | None = None
    branch_step: int = 0
    whole: Cell | None = None
    record: Path | None = None
    parent_record: Path | None = None

    def resolved(self) -> dict[str, Any]:
        """The spec as JSON, as the run folder will contain it, with the vocabulary size of the data."""
        tree = self.spec.model_dump(mode="json")
        tree["model"]["vocab_size"] = self.vocab_size
        return tree

    @property
    def key(self) -> str:
        return cell_key(self.variant, self.seed, self.budget)


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """A planned study. `cells` are seed-major: an interrupted study has all variants of its finished seeds.

    Within a seed and variant, the full run comes first.
    """

    study: Study
    arguments: tuple[str, ...]
    variants: tuple[VariantPlan, ...]
    cells: tuple[Cell, ...]
    bounds: dict[str, Any] | None = None


def study_bounds(study: Study) -> dict[str, Any] | None:
    """What FLOPs allow at the larger model of `bounds`; None without it. Raises SpecError as `count_bounds`."""
    config = study.config
    if config.bounds is None:
        return None
    path = study.path.parent / config.bounds.spec
    try:
        return count_bounds(config.bounds, path, study.variants, baseline=config.baseline_name, match=config.match)
    except SpecError as e:
        raise SpecError(f"{study.place('bounds')}: {e}") from e


def plan_study(
    study: Study,
    arguments: Sequence[str] = (),
    *,
    measurements: Measurements | None = None,
    facts: Facts | None = None,
) -> StudyPlan:
    """Resolve and match every cell. `facts`: of data that was verified already, and filled with what is read.

    `arguments` (`a.b=c`) change the base of all cells; keys of a variant override them. Times come from `measurements`
    (default: those in the folder of the study). Missing times are measured. Raises SpecError for an invalid spec or a
    size that cannot be matched, and DataError if the data does not exist.
    """
    check_arguments(study, arguments)
    resolver = Resolver(study, arguments, facts)
    measurements = Measurements.of(study.out) if measurements is None else measurements
    names = [study.config.baseline_name, *(n for n in study.config.variants if n != study.config.baseline_name)]
    plans: dict[str, VariantPlan] = {}
    for name in names:  # the baseline comes first: its cost is the target for the others
        plans[name] = _plan_variant(study, resolver, name, plans.get(names[0]), measurements)
        _refuse_other_text(study, name, plans[name].spec, plans[names[0]].spec)
    variants = tuple(plans[name] for name in study.config.variants)
    cells = tuple(c for seed in study.config.seeds for v in variants for c in _cells(study, resolver, v, seed))
    return StudyPlan(
        study=study, arguments=tuple(arguments), variants=variants, cells=cells, bounds=study_bounds(study)
    )


def variant_spec(study: Study, arguments: Sequence[str], variant: str) -> Spec:
    """The spec of a variant before its size is solved and its seed is set. Does not read the data."""
    return Resolver(study, arguments).load(variant)[0]


def check_arguments(study: Study, arguments: Sequence[str]) -> None:
    """Raise SpecError for an argument that sets a key of the study, and if the base spec is not a file."""
    for argument in arguments:
        key = argument.partition("=")[0]
        if key in SET_BY_STUDY:
            raise SpecError(f"argument '{argument}': the study sets {key}; {SET_BY_STUDY[key]}")
        if key.partition(".")[0] in type(study.config).model_fields.keys() - {"base"}:  # `base` has its own message
            raise SpecError(
                f"argument '{argument}': {key} belongs to the study; write it in {study.path}. Arguments change the "
                "base spec of all variants, such as train.tokens=1e6"
            )
    if not study.base.is_file():
        raise SpecError(
            f"{study.place('base')}: base: no such file: {printable(study.config.base)} (looked for "
            f"{printable(str(study.base.absolute()), 300)}); the name is relative to the file it stands in"
        )


def study_record(plan: StudyPlan) -> dict[str, Any]:
    """Content of `study.json`: the design of the study, so that a report does not need the YAML file."""
    config = plan.study.config
    return {
        "format": 1,
        "study": config.study,
        "path": str(plan.study.path),
        "base": str(plan.study.base),
        "arguments": list(plan.arguments),
        "baseline": config.baseline_name,
        "seeds": list(config.seeds),
        "budgets": list(config.budgets),
        "match": None if config.match is None else config.match.model_dump(),
        "branch_start": config.branch_start,
        "margin_nats": config.margin_nats,
        "asks": list(config.asks),
        **({"tuned": list(plan.study.tuned)} if plan.study.tuned else {}),
        **({} if plan.bounds is None else {"bounds": plan.bounds}),
        **({"compare_at": "ends"} if any(v.uptraining for v in plan.variants) else {}),
        **_records(plan.study),
        "variants": [_variant_record(v) for v in plan.variants],
        "cells": [
            {
                "variant": cell.variant,
                "seed": cell.seed,
                "budget": cell.budget,
                "run_dir": f"cells/{cell.key}",
                "overrides": list(cell.overrides),
                "spec": cell.resolved(),
            }
            for cell in plan.cells
        ],
    }


def _records(study: Study) -> dict[str, Any]:
    """The folder of records, relative to the folder of the study, so that both can be moved together."""
    return {} if study.records is None else {"records": os.path.relpath(study.records, study.out)}


def _variant_record(v: VariantPlan) -> dict[str, Any]:
    return {
        "name": v.name,
        "keys": v.keys,
        **({} if v.uptraining is None else {"uptraining": v.uptraining}),
        "written": sorted(flatten(v.spec.model_dump(mode="json", exclude_unset=True))),
        "matched": v.matched and asdict(v.matched),
        "free_value": v.free_value,
        "notes": list(v.notes),
        "cost": {
            "num_params": v.cost.num_params,
            "params_by_part": dict(v.cost.params_by_part),
            "flops_per_token_useful": v.cost.flops_per_token.useful,
            "flops_per_token_executed": v.cost.flops_per_token.executed,
            "kv_bytes_per_token": v.cost.kv_bytes_per_token,
            **({"flops_per_token_stages": [[at, f.useful] for at, f in v.cost.stages]} if v.cost.stages else {}),
        },
    }


def _plan_variant(
    study: Study, resolver: Resolver, name: str, baseline: VariantPlan | None, measurements: Measurements
) -> VariantPlan:
    spec, notes = resolver.load(name)
    match, matched = study.config.match, None
    if match is not None:
        check_free(spec, match, f"{study.place('match.free')}: match.free")
    if match is not None and baseline is None:
        check_baseline(spec, match, f"{study.place('match.tensor_parallel')}: match.tensor_parallel")
    if match is not None and baseline is not None:
        matched = _match(resolver, name, spec, baseline.spec, match, measurements)
        spec, notes = resolver.load(name, _solved(matched))
        uncertain = spread_note(matched, match)
        notes = notes if uncertain is None else [*notes, uncertain]
    solved = [_solved(matched)] if matched else []
    budgets = plan_budgets(study, name, spec, lambda keys, why: resolver.load(name, *solved, (dict(keys), why))[0])
    return VariantPlan(
        name=name,
        keys=resolver.keys(name),
        spec=spec,
        cost=resolver.cost(spec),
        matched=matched,
        free_value=value_at(spec, match.free) if match is not None else None,
        notes=tuple(notes),
        budgets=tuple(budgets),
        uptraining=resolver.uptraining.record(name, spec),
    )


def _refuse_other_text(study: Study, name: str, spec: Spec, baseline: Spec) -> None:
    """Raise SpecError for a variant whose validation loss is not that of the tokens of the baseline."""
    own, other = spec.train.validation_tokens, baseline.train.validation_tokens
    if own != other:
        raise SpecError(
            f"{study.place(f'variants.{name}')}: variant {name} has train.validation_tokens: {own}, and the baseline "
            f"{study.config.baseline_name} {other}: their losses would be of different text; set it in the base spec"
        )


def _match(
    resolver: Resolver, name: str, spec: Spec, baseline: Spec, match: MatchConfig, measurements: Measurements
) -> Matched:
    if match.quantity == "wall_clock":
        return measurements.match(name, resolver.sized(spec), resolver.sized(baseline), match)
    target = quantity_of(spec_cost(baseline, resolver.vocab_size(baseline), match.seq_len), match.quantity)
    return match_variant(name, spec, match, target=target, vocab_size=resolver.vocab_size(spec))


def _solved(matched: Matched) -> tuple[dict[str, Any], str]:
    return {matched.free: matched.value}, "match"


def _cells(study: Study, resolver: Resolver, variant: VariantPlan, seed: int) -> Iterator[Cell]:
    """The full run of a variant and seed, and then the runs of its smaller budgets."""
    spec = variant.spec
    points = {b.branch_step * spec.tokens_per_step for b in variant.budgets if b.branch_step}
    keep = {KEEP: sorted(points.union(spec.checkpoint.keep_at_tokens))} if points else {}
    full = _cell(study, resolver, variant, seed, FULL, keep)
    yield full
    for budget in variant.budgets:
        length = {"train.tokens": budget.tokens}
        cell = _cell(study, resolver, variant, seed, budget.fraction, length)
        if budget.branch_step:
            start = {"init.weights": None, "init.sha256": None} if spec.init.weights is not None else {}
            start |= {"init.run": f"{full.run_dir}@{budget.branch_step}"}
            branch = _cell(study, resolver, variant, seed, budget.fraction, length | start)
            cell = replace(
                branch,
                parent=full.run_dir,
                parent_record=full.record,
                branch_step=budget.branch_step,
                whole=cell,
            )
        yield cell


def _cell(
    study: Study, resolver: Resolver, variant: VariantPlan, seed: int, budget: float, more: Mapping[str, Any]
) -> Cell:
    """A cell trained from its start, unless `more` (keys that the budget sets) says otherwise."""
    key = cell_key(variant.name, seed, budget)
    run_dir = study.out / "cells" / key
    own = {
        "name": f"{study.config.study}.{key.replace('/', '.')}",
        "run_dir": str(run_dir),
        "seed": seed,
        "data.seed": seed,
        **variant.spec.tracking.grouped(study.config.study),
        **resolver.uptraining.of_seed(variant.name, seed),
        **more,
    }
    solved = [_solved(variant.matched)] if variant.matched else []
    spec, _ = resolver.load(variant.name, *solved, (own, f"seed {seed} of the study"))
    start = {} if START in variant.keys else resolver.start(variant.name)
    keys = {**start, **variant.keys, **(solved[0][0] if solved else {}), **own}
    return Cell(
        variant=variant.name,
        seed=seed,
        budget=budget,
        after=resolver.uptraining.after(variant.name, seed),
        run_dir=run_dir,
        overrides=resolver.overrides(spec, keys),
        spec=spec,
        vocab_size=resolver.vocab_size(spec),
        data_fingerprint=resolver.data_facts(spec.data)[1],
        record=study.records and record_file(study.records, key),
    )
