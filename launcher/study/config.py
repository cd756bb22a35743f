"""Config of a study file: variants of one base spec, matched sizes, several seeds."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from headway.data.config import StrictModel
from headway.launcher.compare.questions import parse_question
from headway.launcher.match.bounds import BoundsConfig
from headway.launcher.match.matching import MatchConfig
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.sections import LONGEST_NAME
from headway.launcher.spec.yamlio import Node
from headway.launcher.study.sizes import (
    SizeConfig,
    TuneConfig,
    check_seeds,
    check_sizes,
    check_tune,
    flat_keys,
    written_keys,
)
from headway.launcher.study.uptrain.origins import OWN, check_origins, expanded
from headway.model.config import BranchStart

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

FULL = 1.0
"""The budget of a run that trains all of `train.tokens`."""

BRANCH_START = 0.3
"""Default of `branch_start`: rms of the output of a branch / rms of its residual stream, before the first step."""

SET_BY_STUDY = {
    "name": "name the variant instead",
    "run_dir": "use `out` of the study instead",
    "seed": "use `seeds` of the study instead",
    "data.seed": "use `seeds` of the study instead: pairing needs the same data order in every variant",
}
"""Spec keys that the study sets for every cell -> advice for a user who wants to set one."""


_A_VALUE = "1.23457e-05"
"""A tuned value as long as any is in the name of a trial."""


def _longest_seed(seeds: list[int]) -> int:
    return max(len(f".seed-{seed}") for seed in seeds)


def _flat_changes(value: Any) -> Any:
    return {name: flat_keys(keys) for name, keys in value.items()} if isinstance(value, dict) else value


Changes = Annotated[dict[str, dict[str, Any]], BeforeValidator(_flat_changes)]
"""Name -> changes to the base spec by dotted key. The file may nest the keys."""

Variants = Annotated[dict[str, dict[str, Any]], BeforeValidator(lambda value: expanded(_flat_changes(value)))]
"""`Changes`, with `from` and `compute` (`headway.launcher.study.uptrain.origins`)."""


def check_changes(section: str, changes: Changes) -> None:
    """Raise ValueError for a name that is not a valid folder name, and for a key that the study sets.

    `section`: the section of the file that contains the changes.
    """
    for name, keys in changes.items():
        if not re.match(NAME, name):
            raise ValueError(f"{section}: {name!r} cannot name a folder; use letters, digits, '.', '_' and '-'")
        for key in keys:
            if key in SET_BY_STUDY:
                raise ValueError(f"{section}: {name}: the study sets {key}; {SET_BY_STUDY[key]}")


class StudyConfig(StrictModel):
    """Every variant is trained once per seed. A seed sets both the initial parameters and the order of the data."""

    study: str = Field(max_length=128, pattern=NAME, description="name of the study")
    base: str = Field(min_length=1, description="spec all variants start from, relative to the study file")
    out: str | None = Field(default=None, min_length=1, description="folder of runs and report; default studies/NAME")
    records: str | None = Field(
        default=None,
        min_length=1,
        description="folder of small records of finished cells, to be kept in git, relative to the study file",
    )
    match: MatchConfig | None = Field(default=None, description="none: sizes are compared as they are written")
    baseline: str | None = Field(default=None, description="variant the others are compared to; default: the first")
    branch_start: BranchStart = Field(
        default=BRANCH_START,
        description="model.branch_start of every variant that does not set its own, so that all start equally strongly",
    )
    margin_nats: float | None = Field(
        default=None, gt=0, description="differences in loss below it do not matter: verdicts may say equivalent"
    )
    asks: list[str] = Field(
        default=[], description="questions stated beforehand: `rgqa-k1 is not worse than gqa by more than 0.01`"
    )
    seeds: list[int] = Field(min_length=1, description="one run of every variant per seed")
    budgets: list[float] = Field(
        default=[FULL],
        min_length=1,
        description="fractions of train.tokens, with 1: one run per variant, seed and budget, each with its own decay",
    )
    sizes: dict[str, SizeConfig] = Field(
        default={}, description="name -> a size; every variant is trained at each, and the report shows the trend"
    )
    tokens_per_param: float | None = Field(
        default=None, gt=0, description="train.tokens of each size = this x parameters of the baseline at that size"
    )
    scale: dict[str, float] = Field(
        default={},
        description="key -> exponent p: at a size, value of the base x (parameters / those of the first size)^p",
    )
    tune: dict[str, TuneConfig] = Field(
        default={}, description="key -> search of its best value for each variant; later keys use the earlier results"
    )
    extrapolate: float | None = Field(
        default=None, ge=1, description="parameters of a larger model whose losses the report of a ladder predicts"
    )
    bounds: BoundsConfig | None = Field(
        default=None,
        description="a larger model and lengths of sequences at which the report counts how much faster FLOPs let each "
        "variant be: {spec: ../models/940m.yaml, seq_len: [8192, 32768]}",
    )
    variants: Variants = Field(
        min_length=1,
        description="name -> what differs from the base, as spec keys: {attention.type: rgqa}; `from` and `compute`: "
        "start from a converted run, and get its compute (docs/uptraining.md)",
    )

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        return check_seeds(value)

    @field_validator("budgets")
    @classmethod
    def _with_full_run(cls, value: list[float]) -> list[float]:
        if not all(0 < budget <= FULL for budget in value):
            raise ValueError("budgets are fractions of train.tokens, above 0 and up to 1, such as [0.25, 0.5, 1]")
        if len(set(value)) != len(value):
            raise ValueError("a budget is given twice; a repeated budget is the same run")
        if FULL not in value:
            raise ValueError(
                f"budget 1, the full run, is missing; write [{', '.join(f'{budget:g}' for budget in [*value, FULL])}]"
            )
        return sorted(value)

    @model_validator(mode="after")
    def _check(self) -> StudyConfig:
        check_changes("variants", self.variants)
        check_origins(
            self.variants,
            elsewhere={
                "match": self.match is not None,
                "budgets": len(self.budgets) > 1,
                "sizes": bool(self.sizes),
                "tune": bool(self.tune),
                "tokens_per_param": self.tokens_per_param is not None,
                "bounds": self.bounds is not None,
            },
        )
        for name, keys in self.variants.items():
            if self.match and name != self.baseline_name and self.match.free in keys:
                raise ValueError(
                    f"variants: {name}: `match` solves {self.match.free}; leave it out here, or free another dimension"
                )
        if self.baseline is not None and self.baseline not in self.variants:
            close = difflib.get_close_matches(self.baseline, self.variants, n=1, cutoff=0)
            raise ValueError(
                f"baseline: {self.baseline!r} is not a variant. Did you mean {close[0]}? "
                f"Variants: {', '.join(self.variants)}"
            )
        for text in self.asks:
            parse_question(text, baseline=self.baseline_name, variants=self.variants)
        self._check_ladder()
        return self

    def _check_ladder(self) -> None:
        check_changes("sizes", {name: size.keys for name, size in self.sizes.items()})
        check_sizes(
            self.sizes,
            variants=self.variants,
            baseline=self.baseline_name,
            scale=self.scale,
            tokens_per_param=self.tokens_per_param,
        )
        if self.extrapolate is not None and not self.sizes:
            raise ValueError("extrapolate: one size shows no trend; add `sizes`")
        elsewhere = dict(written_keys(self.variants, self.sizes))
        elsewhere |= dict.fromkeys(SET_BY_STUDY, "the study") | dict.fromkeys(self.scale, "`scale`")
        elsewhere |= {"train.tokens": "`tokens_per_param`"} if self.tokens_per_param is not None else {}
        elsewhere |= {self.match.free: "`match`"} if self.match else {}
        check_tune(self.tune, sizes=self.sizes, seeds=self.seeds, set_elsewhere=elsewhere)
        self._check_names()
        if self.bounds is not None and self.match is not None and self.match.quantity == "wall_clock":
            raise ValueError("bounds: sizes of a larger model cannot be matched by time here; match params or flops")

    def _check_names(self) -> None:
        """Raise ValueError if the name of a run would be longer than that of a spec may be, also of a trial."""
        budget = max(0 if budget == FULL else len(f".budget-{budget!r}") for budget in self.budgets)
        for part, variants, seeds in self._parts():
            # What follows the study and the part, and the characters that follow the variant.
            runs = [("", budget + _longest_seed(seeds))]
            runs += [(f".{key}-{_A_VALUE}", _longest_seed(search.seeds)) for key, search in self.tune.items()]
            for variant in variants:
                for trial, end in runs:
                    name = f"{self.study}{part and f'.{part}'}{trial}.{variant}"
                    if len(name) + end > LONGEST_NAME:
                        raise ValueError(
                            f"variants: {variant}: a run would have the name {name}.seed-..., of {len(name) + end} "
                            f"characters, and {LONGEST_NAME} are the most; use a shorter name of the study"
                            f"{part and f', of {part}'} or of the variant"
                        )

    def _parts(self) -> list[tuple[str, list[str], list[int]]]:
        """(name, variants, seeds) of each study of which this one consists; the name of a single one is empty."""
        sizes = self.sizes or {"": SizeConfig()}
        return [(name, own.variants or [*self.variants], own.seeds or self.seeds) for name, own in sizes.items()]

    @property
    def is_ladder(self) -> bool:
        """Whether the file describes more than one plain study: several sizes, or trials before it."""
        return bool(self.sizes or self.tune or self.tokens_per_param is not None)

    @property
    def baseline_name(self) -> str:
        return self.baseline or next(iter(self.variants))


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study file after loading.

    `base`: path of the base spec. `out`: folder of the runs and the report. `records`: folder of the records of
    finished cells; None: none are written or read. `variants`: each variant as written, with its positions in the file.
    `tuned`: keys whose values a search chose for each variant, or for all of them.
    """

    config: StudyConfig
    path: Path
    base: Path
    out: Path
    variants: dict[str, Node]
    tree: Node
    records: Path | None = None
    tuned: tuple[str, ...] = ()

    def place(self, key: str) -> str:
        """Position of `key` (dotted) in the file, such as `study.yaml:3:9`; the file alone if the key is not in it."""
        node = self.tree
        for part in key.split("."):
            node = node.value.get(part, node) if node.is_mapping else node
        return str(node.at if node is not self.tree else self.path)


def load_study(path: Path, root: type[StudyConfig] = StudyConfig) -> Study:
    """Read a study file. `root`: StudyConfig or a subclass with more keys.

    Raises NoInputError or SpecError with file:line, the key, and advice.
    """
    loaded = load_spec(path, root=root)
    config = loaded.spec
    written = loaded.tree.value["variants"].value
    return Study(
        config=config,
        path=path,
        base=path.parent / config.base,
        out=Path(config.out or f"studies/{config.study}"),
        tree=loaded.tree,
        records=None if config.records is None else path.parent / config.records,
        variants={name: _without_own(_written(written, name)) for name in config.variants},
    )


def _written(written: Mapping[str, Node], name: str) -> Node:
    """The node of a variant; one of a list of alphas has that of the list."""
    return written[name] if name in written else written[name.rpartition("-a")[0]]


def _without_own(node: Node) -> Node:
    """The keys of a variant that are those of a spec."""
    if not node.is_mapping:
        return _empty(node)
    kept = {key: item for key, item in node.value.items() if key.partition(".")[0] not in OWN}
    return Node(kept, node.place, node.key_place)


def _empty(node: Node) -> Node:
    return Node({}, node.place, node.key_place)
