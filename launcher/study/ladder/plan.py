"""The studies that a file with `sizes` or `tune` consists of: one for each size, and one for each value of a trial.

Every one of them is a plain study in its own folder, with all features of a study: matched sizes, paired seeds,
resuming, records, a report. With sizes, the study of a size is in `OUT/sizes/SIZE`; without, in `OUT`. The trials of
one value of a tuned key are the study `tune/KEY/VALUE` below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base.errors import SpecError, printable
from headway.launcher.compare.questions import parse_question
from headway.launcher.match.matching import value_at
from headway.launcher.spec.merge import format_value
from headway.launcher.spec.yamlio import Node, Place, value_node
from headway.launcher.study.config import FULL, Study, StudyConfig
from headway.launcher.study.ladder.choice import Legal, multiples, significant
from headway.launcher.study.plan import check_arguments, study_bounds
from headway.launcher.study.resolver import Facts, Resolver
from headway.launcher.study.sizes import SizeConfig, overlap

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

TOKENS, BATCH = "train.tokens", "train.global_batch"

PLAIN = ""
"""Name of the only size of a study without `sizes`."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of a study. `keys`: what the size and its rules set, for all variants.

    `params`: parameters of the baseline. `tokens`: those of a full run. `spec`: of the baseline, before tuning.
    `records`: folder of the records of its cells; None if none are kept.
    """

    name: str
    out: Path
    keys: dict[str, Any]
    params: int
    tokens: int
    spec: Spec
    records: Path | None = None

    @property
    def title(self) -> str:
        return self.name or "the study"


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """A study file with its sizes, smallest list position first. `facts`: of the data, read once for all studies.

    `bounds`: as in `StudyPlan`, of a study with sizes.
    """

    study: Study
    arguments: tuple[str, ...]
    sizes: tuple[Size, ...]
    facts: Facts = field(default_factory=dict)
    bounds: dict[str, Any] | None = None

    @property
    def config(self) -> StudyConfig:
        return self.study.config

    def tuned_sizes(self, key: str) -> list[Size]:
        """Sizes with trials of `key`."""
        named = self.config.tune[key].sizes
        return [size for size in self.sizes if named is None or size.name in named]

    def checked_size(self, key: str) -> Size | None:
        """The largest size without trials of `key`, where the carried value is checked; None without such a size."""
        search, tuned = self.config.tune[key], {size.name for size in self.tuned_sizes(key)}
        without = [size for size in self.sizes if size.name not in tuned]
        return max(without, key=lambda size: size.params) if search.check and without else None

    def legal(self, size: Size, key: str) -> Legal:
        """Rounding of a tuned or carried value of `key` at a size."""
        if key == BATCH:
            return multiples(size.spec.train.micro_batch)
        try:
            value = value_at(size.spec, key)
        except KeyError:  # a key that the baseline does not have
            return significant
        return multiples(1) if isinstance(value, int) and not isinstance(value, bool) else significant

    def trial_tokens(self, size: Size, key: str) -> int:
        """Tokens of each trial of `key`."""
        return _whole_steps(size.spec, self.config.tune[key].budget * size.tokens)

    def main(self, size: Size, values: Mapping[str, Mapping[str, Any]]) -> Study:
        """The study of a size. `values`: variant -> tuned keys and their values."""
        return _study(self.study, size, out=size.out, keys=size.keys, values=values)

    def trial(self, size: Size, key: str, value: float, values: Mapping[str, Mapping[str, Any]]) -> Study:
        """The study of one value of a tuned key. `values`: variant -> earlier tuned keys and their values."""
        search = self.config.tune[key]
        keys = size.keys | {TOKENS: self.trial_tokens(size, key)} | {key: whole(value)}
        return _study(
            self.study,
            size,
            out=trial_folder(size.out, key, value),
            keys=keys,
            values=values,
            seeds=search.seeds,
            trial=f"{key}-{value:g}",
        )


def trial_folder(out: Path, key: str, value: float) -> Path:
    """Folder of the trials of one value, in the folder of a size."""
    return out / "tune" / key / f"{value:g}"


def whole(value: float) -> int | float:
    """An integral value as an integer, so that keys such as train.global_batch accept it."""
    return int(value) if float(value).is_integer() and abs(value) >= 1 else value


def plan_ladder(study: Study, arguments: Sequence[str] = ()) -> Ladder:
    """Resolve the keys, the parameters and the tokens of every size.

    Raises SpecError for an illegal size, for keys of rules that the base does not have, and for arguments that a size
    or a rule overrides; DataError if the data does not exist.
    """
    config = study.config
    check_arguments(study, arguments)
    for argument in arguments:
        _refuse_argument(study, argument)
    if config.match is not None and config.match.quantity == "wall_clock":
        raise SpecError(
            f"{study.place('match.quantity')}: match.quantity: wall_clock is measured for each study anew; with "
            "`sizes` or `tune`, use params or flops"
        )
    facts: Facts = {}
    sizes: list[Size] = []
    for name, size in (config.sizes or {PLAIN: SizeConfig()}).items():
        out = study.out / "sizes" / name if name else study.out
        sizes.append(_size(study, arguments, name, size, out, sizes[0] if sizes else None, facts))
    return Ladder(
        study=study,
        arguments=tuple(arguments),
        sizes=tuple(sizes),
        facts=facts,
        bounds=study_bounds(study) if config.sizes else None,
    )


def size_names(study: Study) -> dict[str, Path]:
    """Size -> folder, without reading a base or data."""
    return {name: study.out / "sizes" / name for name in study.config.sizes} or {PLAIN: study.out}


def records_below(study: Study, out: Path) -> Path | None:
    """The records of a part of a study, whose folder is `out`; None if the study keeps none."""
    return None if study.records is None else study.records / out.relative_to(study.out)


def unplanned(study: Study, name: str, out: Path) -> Study:
    """The study of a size with the names and seeds of its cells alone, for commands that read the folder."""
    keys = {} if not name else study.config.sizes[name].keys
    return _study_of(study, name, out=out, keys=keys, values={})


def unplanned_trials(study: Study, name: str, out: Path) -> Iterator[tuple[str, Study]]:
    """(`KEY=VALUE`, study) of the trials in the folder of a size, as `unplanned`."""
    for key, search in study.config.tune.items():
        folders = [p for p in (out / "tune" / key).glob("*") if (p / "study.json").exists()]
        for folder in sorted(folders, key=lambda p: _number(p.name)):
            values = _study_of(study, name, out=folder, keys={}, values={}, seeds=search.seeds, trial=folder.name)
            yield f"{key}={folder.name}", values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


def _size(
    study: Study, arguments: Sequence[str], name: str, size: SizeConfig, out: Path, first: Size | None, facts: Facts
) -> Size:
    config = study.config
    try:
        spec, params = _baseline(study, arguments, name, size.keys, facts)
        ratio = 1.0 if first is None else params / first.params
        keys = size.keys | {key: _scaled(study, spec, key, power, ratio) for key, power in config.scale.items()}
        if config.tokens_per_param is not None:
            batch = keys.get(BATCH, spec.train.global_batch)
            step = batch * keys.get("data.seq_len", spec.data.seq_len)
            keys[TOKENS] = -(-round(config.tokens_per_param * params) // step) * step
        spec, counted = _baseline(study, arguments, name, keys, facts)
    except SpecError as e:
        raise SpecError(f"{study.place(f'sizes.{name}')}: sizes: {name}: {e}" if name else str(e)) from e
    if counted != params:
        raise SpecError(f"scale: changes the parameters of size {name}; scale keys that do not, such as optimizer.lr")
    return Size(
        name=name,
        out=out,
        keys=keys,
        params=params,
        tokens=_whole_steps(spec, spec.train.tokens),
        spec=spec,
        records=records_below(study, out),
    )


def _baseline(
    study: Study, arguments: Sequence[str], name: str, keys: dict[str, Any], facts: Facts
) -> tuple[Spec, int]:
    only = _study_of(study, name, out=study.out, keys=keys, values={})
    resolver = Resolver(only, arguments, facts)
    spec, _ = resolver.load(study.config.baseline_name)
    return spec, resolver.cost(spec).num_params


def _scaled(study: Study, spec: Spec, key: str, power: float, ratio: float) -> int | float:
    try:
        value = value_at(spec, key)
    except KeyError:
        raise SpecError(f"{study.place('scale')}: scale: {printable(key)} is not a key of the base spec") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SpecError(f"{study.place('scale')}: scale: {key} is {format_value(value)}, not a number")
    scaled = value * ratio**power
    if isinstance(value, float):
        return float(f"{scaled:.4g}")
    unit = spec.train.micro_batch if key == BATCH else 1
    return max(unit, round(scaled / unit) * unit)


def _whole_steps(spec: Spec, tokens: float) -> int:
    """`tokens` rounded up to whole steps of the spec."""
    return -(-round(tokens) // spec.tokens_per_step) * spec.tokens_per_step


def _study(whole_study: Study, size: Size, **more: Any) -> Study:
    return _study_of(whole_study, size.name, **more)


def _study_of(
    study: Study,
    name: str,
    *,
    out: Path,
    keys: Mapping[str, Any],
    values: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int] | None = None,
    trial: str | None = None,
) -> Study:
    """A plain study. `keys` are added to every variant, so that the command line of every cell has them.

    `trial`: the last part of the name of a study of trials, which has neither budgets nor questions.
    """
    config = study.config
    size = config.sizes[name] if name else SizeConfig()
    names = [v for v in config.variants if size.variants is None or v in size.variants]
    free = config.match.free if config.match else None
    place = Place(f"{study.path}: size {name}" if name else str(study.path))
    changes, nodes = {}, {}
    for variant in names:
        # `match` solves the free key of all others
        own = {k: v for k, v in keys.items() if variant == config.baseline_name or k != free} | dict(
            values.get(variant, {})
        )
        changes[variant] = {**own, **config.variants[variant]}
        written = study.variants[variant]
        nodes[variant] = Node({**value_node(own, place).value, **written.value}, written.place, written.key_place)
    base = size.base or config.base
    part = StudyConfig(
        study=".".join([config.study, *([name] if name else []), *([] if trial is None else [trial])]),
        base=base,
        out=str(out),
        match=config.match,
        baseline=config.baseline_name,
        branch_start=config.branch_start,
        margin_nats=config.margin_nats,
        asks=[] if trial is not None else [text for text in config.asks if _about(text, config, names)],
        seeds=list(seeds or size.seeds or config.seeds),
        budgets=[FULL] if trial is not None else config.budgets,
        bounds=None if name or trial is not None else config.bounds,
        variants=changes,
    )
    return replace(
        study,
        config=part,
        base=study.path.parent / base,
        out=out,
        records=records_below(study, out),
        variants=nodes,
        tuned=tuple(dict.fromkeys(key for chosen in values.values() for key in chosen)),
    )


def _about(text: str, config: StudyConfig, names: Sequence[str]) -> bool:
    """Whether the question concerns variants that are trained at this size."""
    question = parse_question(text, baseline=config.baseline_name, variants=config.variants)
    return {question.variant, question.other} <= set(names)


def _refuse_argument(study: Study, argument: str) -> None:
    key = argument.partition("=")[0]
    config = study.config
    setters = [(own, f"size {name}") for name, size in config.sizes.items() for own in size.keys]
    setters += [(own, "`scale`") for own in config.scale] + [(own, "`tune`") for own in config.tune]
    setters += [(TOKENS, "`tokens_per_param`")] if config.tokens_per_param is not None else []
    scaled = [own for own in config.scale if own == key]
    if scaled:  # the base value of the rule, which is what an argument changes
        return
    if found := next(((own, what) for own, what in setters if overlap(key, own)), None):
        raise SpecError(
            f"argument '{argument}': {found[1]} sets {found[0]}; change it in {study.path}, or give an argument that "
            "concerns all sizes, such as train.validation_tokens=1e5"
        )
