"""From a study file to cells: every variant matched to the baseline, every seed, each with its resolved spec."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.data.config import MdsSource
from headway.launcher.errors import SpecError, printable
from headway.launcher.fields import root_shape
from headway.launcher.load import load_spec
from headway.launcher.match import Matched, check_free, match_variant, quantity_of, spec_cost, value_at
from headway.launcher.merge import format_value, override_layer
from headway.launcher.run_dir import flatten
from headway.launcher.study_config import SET_BY_STUDY, Study, StudyConfig
from headway.launcher.yamlio import Node

if TYPE_CHECKING:
    from headway.data.config import DataConfig
    from headway.launcher.spec import Spec
    from headway.model.cost import Cost


_OF_STUDY = frozenset(StudyConfig.model_fields) - {"base"}  # `base=` has a message of its own


@dataclass(frozen=True, kw_only=True)
class VariantPlan:
    """A variant with its size. `matched` is None for the baseline and where the study matches nothing.

    `free_value` is the value of `match.free`, solved or as written; None where the study matches nothing.
    """

    name: str
    keys: dict[str, Any]
    cost: Cost
    matched: Matched | None
    free_value: Any
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the study. `overrides` turn the base spec into `spec` on the command line of `headway train`."""

    variant: str
    seed: int
    run_dir: Path
    overrides: tuple[str, ...]
    spec: Spec
    vocab_size: int
    data_fingerprint: str | None

    def resolved(self) -> dict[str, Any]:
        """The spec as the run folder will hold it: JSON, with the vocabulary the data gives."""
        tree = self.spec.model_dump(mode="json")
        tree["model"]["vocab_size"] = self.vocab_size
        return tree

    @property
    def key(self) -> str:
        return cell_key(self.variant, self.seed)


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """`cells` is seed-major: a study that is cut short still has every variant of the seeds it finished."""

    study: Study
    arguments: tuple[str, ...]
    variants: tuple[VariantPlan, ...]
    cells: tuple[Cell, ...]


def cell_key(variant: str, seed: int) -> str:
    """Name of a cell, and its folder below `cells/`."""
    return f"{variant}/seed-{seed}"


def plan_study(study: Study, arguments: Sequence[str] = ()) -> StudyPlan:
    """Resolve and match every cell. `arguments` (`a.b=c`) change the base of all cells; a variant's keys win over them.

    Raises SpecError for an illegal spec or a size that cannot be matched, DataError where the data is not there.
    """
    for argument in arguments:
        key = argument.partition("=")[0]
        if key in SET_BY_STUDY:
            raise SpecError(f"argument '{argument}': the study sets {key}; {SET_BY_STUDY[key]}")
        if key.partition(".")[0] in _OF_STUDY:
            raise SpecError(
                f"argument '{argument}': {key} belongs to the study; write it in {study.path}. Arguments change the "
                "base spec of all variants, such as train.tokens=1e6"
            )
    if not study.base.is_file():
        raise SpecError(
            f"{study.place('base')}: base: no such file: {printable(study.config.base)} (looked for "
            f"{printable(str(study.base.absolute()), 300)}); the name is relative to the file it stands in"
        )
    resolver = _Resolver(study, arguments)
    names = [study.config.baseline_name, *(n for n in study.config.variants if n != study.config.baseline_name)]
    plans: dict[str, VariantPlan] = {}
    for name in names:  # the baseline first: its cost is the target of the others
        plans[name] = _plan_variant(study, resolver, name, plans.get(names[0]))
    variants = tuple(plans[name] for name in study.config.variants)
    cells = tuple(_cell(study, resolver, v, seed) for seed in study.config.seeds for v in variants)
    return StudyPlan(study=study, arguments=tuple(arguments), variants=variants, cells=cells)


def study_record(plan: StudyPlan) -> dict[str, Any]:
    """What `study.json` holds: all a report needs to know about the design, without reading YAML again."""
    config = plan.study.config
    return {
        "format": 1,
        "study": config.study,
        "path": str(plan.study.path),
        "base": str(plan.study.base),
        "arguments": list(plan.arguments),
        "baseline": config.baseline_name,
        "seeds": list(config.seeds),
        "match": None if config.match is None else config.match.model_dump(),
        "variants": [_variant_record(v) for v in plan.variants],
        "cells": [
            {
                "variant": cell.variant,
                "seed": cell.seed,
                "run_dir": f"cells/{cell.key}",
                "overrides": list(cell.overrides),
                "spec": cell.resolved(),
            }
            for cell in plan.cells
        ],
    }


def matching_rows(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The matching table of a `study_record`, header first; sizes in whole parameters, FLOPs per token, bytes."""
    free = record["match"]["free"] if record["match"] else None
    yield ("variant", free or "size", "params", "residual", "useful FLOPs/token", "executed", "KV bytes/token")
    for v in record["variants"]:
        if v["matched"]:
            residual = f"{v['matched']['residual']:+.3%}"
        else:
            residual = "baseline" if v["name"] == record["baseline"] else "not matched"
        cost = v["cost"]
        yield (
            v["name"],
            "as written" if v["free_value"] is None else str(v["free_value"]),
            f"{cost['num_params']:,}",
            residual,
            f"{cost['flops_per_token_useful']:,.0f}",
            f"{cost['flops_per_token_executed']:,.0f}",
            f"{cost['kv_bytes_per_token']:,}",
        )


def _variant_record(v: VariantPlan) -> dict[str, Any]:
    matched = v.matched and {
        "free": v.matched.free,
        "value": v.matched.value,
        "cost": v.matched.cost,
        "target": v.matched.target,
        "residual": v.matched.residual,
    }
    return {
        "name": v.name,
        "keys": v.keys,
        "matched": matched,
        "free_value": v.free_value,
        "notes": list(v.notes),
        "cost": {
            "num_params": v.cost.num_params,
            "params_by_part": dict(v.cost.params_by_part),
            "flops_per_token_useful": v.cost.flops_per_token.useful,
            "flops_per_token_executed": v.cost.flops_per_token.executed,
            "kv_bytes_per_token": v.cost.kv_bytes_per_token,
        },
    }


class _Resolver:
    """Resolves specs layer by layer: base file, arguments, variant, solved size, seed."""

    def __init__(self, study: Study, arguments: Sequence[str]) -> None:
        from headway.launcher.spec import Spec

        self.study, self.arguments = study, list(arguments)
        self.layer = override_layer(self.arguments, root_shape(Spec))
        self.facts: dict[str, tuple[int, str | None]] = {}

    def load(self, variant: str, *more: tuple[dict[str, Any], str]) -> tuple[Spec, list[str]]:
        layers: list[tuple[dict[str, Any] | Node, str]] = [
            (self.layer, "arguments"),
            (self.study.variants[variant], f"variant {variant}"),
            *more,
        ]
        loaded = load_spec(self.study.base, extra=layers)
        return loaded.spec, loaded.notes

    def overrides(self, spec: Spec, cell_keys: dict[str, Any]) -> tuple[str, ...]:
        """The same spec as arguments to the base file alone, where all arguments are one layer and none is dropped."""
        present = flatten(spec.model_dump(mode="json"))
        arguments = []
        for argument in self.arguments:
            key = argument.partition("=")[0]
            exists = key in present or any(known.startswith(f"{key}.") for known in present)
            if key not in cell_keys and exists:  # else the variant's mechanism has no such key, or sets its own value
                arguments.append(argument)
        return (*arguments, *(f"{key}={format_value(value)}" for key, value in cell_keys.items()))

    def data_facts(self, data: DataConfig) -> tuple[int, str | None]:
        """(vocabulary size, fingerprint) of a source; a synthetic one has no fingerprint."""
        source = data.source
        if not isinstance(source, MdsSource):
            return source.vocab_size, None
        key = f"{source.path}\0{source.remote}\0{data.seq_len}"
        if key not in self.facts:
            from headway.data.verify import verify

            info = verify(source, seq_len=data.seq_len)
            self.facts[key] = (info.vocab_size, info.fingerprint)
        return self.facts[key]

    def cost(self, spec: Spec) -> Cost:
        return spec_cost(spec, self.vocab_size(spec))

    def vocab_size(self, spec: Spec) -> int:
        return spec.model.vocab_size or self.data_facts(spec.data)[0]


def _plan_variant(study: Study, resolver: _Resolver, name: str, baseline: VariantPlan | None) -> VariantPlan:
    spec, notes = resolver.load(name)
    match, matched = study.config.match, None
    if match is not None:
        check_free(spec, match, f"{study.place('match.free')}: match.free")
    if match is not None and baseline is not None:
        target = quantity_of(baseline.cost, match.quantity)
        matched = match_variant(name, spec, match, target=target, vocab_size=resolver.vocab_size(spec))
        spec, notes = resolver.load(name, _solved(matched))
    return VariantPlan(
        name=name,
        keys=study.config.variants[name],
        cost=resolver.cost(spec),
        matched=matched,
        free_value=value_at(spec, match.free) if match is not None else None,
        notes=tuple(notes),
    )


def _solved(matched: Matched) -> tuple[dict[str, Any], str]:
    return {matched.free: matched.value}, "match"


def _cell(study: Study, resolver: _Resolver, variant: VariantPlan, seed: int) -> Cell:
    run_dir = study.out / "cells" / cell_key(variant.name, seed)
    own = {
        "name": f"{study.config.study}.{variant.name}.seed-{seed}",
        "run_dir": str(run_dir),
        "seed": seed,
        "data.seed": seed,
    }
    solved = [_solved(variant.matched)] if variant.matched else []
    spec, _ = resolver.load(variant.name, *solved, (own, f"seed {seed} of the study"))
    keys = {**variant.keys, **(solved[0][0] if solved else {}), **own}
    return Cell(
        variant=variant.name,
        seed=seed,
        run_dir=run_dir,
        overrides=resolver.overrides(spec, keys),
        spec=spec,
        vocab_size=resolver.vocab_size(spec),
        data_fingerprint=resolver.data_facts(spec.data)[1],
    )
