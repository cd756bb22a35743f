"""Plan the cells of a study: match every variant to the baseline, and resolve the spec of every variant and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.data.config import MdsSource
from headway.launcher.base import console
from headway.launcher.base.errors import SpecError, printable
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
from headway.launcher.spec.fields import root_shape
from headway.launcher.spec.load import DEFAULT, Loaded, load_spec
from headway.launcher.spec.merge import format_value, override_layer
from headway.launcher.spec.yamlio import Node
from headway.launcher.study.config import SET_BY_STUDY, Study

if TYPE_CHECKING:
    from headway.data.config import DataConfig
    from headway.launcher.spec.spec import Spec
    from headway.model.cost import Cost


START = "model.branch_start"
NO_AUTO = "would give each variant a micro-batch of its own, and the variants of a study must cut their batches alike"


@dataclass(frozen=True, kw_only=True)
class VariantPlan:
    """A variant with its size. `matched`: None for the baseline, and for all variants of a study without matching.

    `free_value`: the value of `match.free`, solved or as written; None in a study without matching.
    """

    name: str
    keys: dict[str, Any]
    spec: Spec
    cost: Cost
    matched: Matched | None
    free_value: Any
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the study. `overrides`: arguments of `headway train` that change the base spec into `spec`."""

    variant: str
    seed: int
    run_dir: Path
    overrides: tuple[str, ...]
    spec: Spec
    vocab_size: int
    data_fingerprint: str | None

    def resolved(self) -> dict[str, Any]:
        """The spec as JSON, as the run folder will contain it, with the vocabulary size of the data."""
        tree = self.spec.model_dump(mode="json")
        tree["model"]["vocab_size"] = self.vocab_size
        return tree

    @property
    def key(self) -> str:
        return cell_key(self.variant, self.seed)


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """A planned study. `cells` are seed-major: an interrupted study has all variants of its finished seeds."""

    study: Study
    arguments: tuple[str, ...]
    variants: tuple[VariantPlan, ...]
    cells: tuple[Cell, ...]


def cell_key(variant: str, seed: int) -> str:
    """Name of a cell and of its folder in `cells/`."""
    return f"{variant}/seed-{seed}"


def plan_study(study: Study, arguments: Sequence[str] = (), *, measurements: Measurements | None = None) -> StudyPlan:
    """Resolve and match every cell.

    `arguments` (`a.b=c`) change the base of all cells; keys of a variant override them. Times come from `measurements`
    (default: those in the folder of the study). Missing times are measured. Raises SpecError for an invalid spec or a
    size that cannot be matched, and DataError if the data does not exist.
    """
    check_arguments(study, arguments)
    resolver = _Resolver(study, arguments)
    measurements = Measurements.of(study.out) if measurements is None else measurements
    names = [study.config.baseline_name, *(n for n in study.config.variants if n != study.config.baseline_name)]
    plans: dict[str, VariantPlan] = {}
    for name in names:  # the baseline comes first: its cost is the target for the others
        plans[name] = _plan_variant(study, resolver, name, plans.get(names[0]), measurements)
    variants = tuple(plans[name] for name in study.config.variants)
    cells = tuple(_cell(study, resolver, v, seed) for seed in study.config.seeds for v in variants)
    return StudyPlan(study=study, arguments=tuple(arguments), variants=variants, cells=cells)


def variant_spec(study: Study, arguments: Sequence[str], variant: str) -> Spec:
    """The spec of a variant before its size is solved and its seed is set. Does not read the data."""
    return _Resolver(study, arguments).load(variant)[0]


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
        "match": None if config.match is None else config.match.model_dump(),
        "branch_start": config.branch_start,
        "margin_nats": config.margin_nats,
        "asks": list(config.asks),
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


def _variant_record(v: VariantPlan) -> dict[str, Any]:
    return {
        "name": v.name,
        "keys": v.keys,
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
        },
    }


class _Resolver:
    """Resolve specs layer by layer: base file, arguments, variant, solved size, seed."""

    def __init__(self, study: Study, arguments: Sequence[str]) -> None:
        from headway.launcher.spec.spec import Spec

        self.study, self.arguments = study, list(arguments)
        self.layer = override_layer(self.arguments, root_shape(Spec))
        self.facts: dict[str, tuple[int, str | None]] = {}

    def as_written(self, variant: str) -> Loaded[Spec]:
        """The spec of a variant from the base file, the arguments and the keys of the variant only."""
        layers: list[tuple[dict[str, Any] | Node, str]] = [
            (self.layer, "arguments"),
            (self.study.variants[variant], f"variant {variant}"),
        ]
        return load_spec(self.study.base, extra=layers, no_auto=NO_AUTO)

    def load(self, variant: str, *more: tuple[dict[str, Any], str]) -> tuple[Spec, list[str]]:
        layers: list[tuple[dict[str, Any] | Node, str]] = [
            (self.layer, "arguments"),
            (self.study.variants[variant], f"variant {variant}"),
            *more,
        ]
        loaded = load_spec(self.study.base, extra=layers, no_auto=NO_AUTO)
        start = self.start(loaded)
        if start:
            loaded = load_spec(self.study.base, extra=[(start, "branch_start of the study"), *layers], no_auto=NO_AUTO)
        return loaded.spec, loaded.notes

    def start(self, loaded: Loaded[Spec]) -> dict[str, Any]:
        """Keys that `branch_start` of the study sets; none if a file or argument sets them or weights are given."""
        if str(loaded.origins[START]) != str(DEFAULT) or loaded.spec.init.weights is not None:
            return {}
        return {START: self.study.config.branch_start}

    def overrides(self, spec: Spec, cell_keys: dict[str, Any]) -> tuple[str, ...]:
        """Arguments that give the same spec from the base file alone, where they form one layer and none is dropped."""
        present = flatten(spec.model_dump(mode="json"))
        arguments = []
        for argument in self.arguments:
            key = argument.partition("=")[0]
            exists = key in present or any(known.startswith(f"{key}.") for known in present)
            if key not in cell_keys and exists:  # else the mechanism of the variant lacks the key or sets it
                arguments.append(argument)
        return (*arguments, *(f"{key}={format_value(value)}" for key, value in cell_keys.items()))

    def data_facts(self, data: DataConfig) -> tuple[int, str | None]:
        """(vocabulary size, fingerprint) of a source; the fingerprint is None for synthetic data."""
        source = data.source
        if not isinstance(source, MdsSource):
            return source.vocab_size, None
        key = f"{source.path}\0{source.remote}\0{data.seq_len}"
        if key not in self.facts:
            from headway.data.verify import verify

            info = verify(source, seq_len=data.seq_len, progress=console.progress)
            self.facts[key] = (info.vocab_size, info.fingerprint)
        return self.facts[key]

    def cost(self, spec: Spec) -> Cost:
        return spec_cost(spec, self.vocab_size(spec))

    def sized(self, spec: Spec) -> Spec:
        """The spec with the vocabulary size of the data."""
        model = spec.model.model_copy(update={"vocab_size": self.vocab_size(spec)})
        return spec.model_copy(update={"model": model})

    def vocab_size(self, spec: Spec) -> int:
        return spec.model.vocab_size or self.data_facts(spec.data)[0]


def _plan_variant(
    study: Study, resolver: _Resolver, name: str, baseline: VariantPlan | None, measurements: Measurements
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
    return VariantPlan(
        name=name,
        keys=study.config.variants[name],
        spec=spec,
        cost=resolver.cost(spec),
        matched=matched,
        free_value=value_at(spec, match.free) if match is not None else None,
        notes=tuple(notes),
    )


def _match(
    resolver: _Resolver, name: str, spec: Spec, baseline: Spec, match: MatchConfig, measurements: Measurements
) -> Matched:
    if match.quantity == "wall_clock":
        return measurements.match(name, resolver.sized(spec), resolver.sized(baseline), match)
    target = quantity_of(spec_cost(baseline, resolver.vocab_size(baseline), match.seq_len), match.quantity)
    return match_variant(name, spec, match, target=target, vocab_size=resolver.vocab_size(spec))


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
    start = {} if START in variant.keys else resolver.start(resolver.as_written(variant.name))
    keys = {**start, **variant.keys, **(solved[0][0] if solved else {}), **own}
    return Cell(
        variant=variant.name,
        seed=seed,
        run_dir=run_dir,
        overrides=resolver.overrides(spec, keys),
        spec=spec,
        vocab_size=resolver.vocab_size(spec),
        data_fingerprint=resolver.data_facts(spec.data)[1],
    )
