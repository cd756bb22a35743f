"""`from` and `compute` of a variant: what it starts from, and whose compute it is given.

    gqa-mean: {from: {run: mha, convert: {to: gqa, kv_heads: 2, how: mean}, alpha: [0, 0.01, 0.05, 0.1]}}
    scratch: {attention.type: gqa, attention.kv_heads: 2, compute: {of: gqa-mean-a0.05, teacher: counted}}

A list of alphas stands for one variant per alpha above 0, named NAME-aALPHA. Alpha 0, the converted model without
training, is the validation before the first step of the variant with the smallest alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from headway.data.config import StrictModel
from headway.launcher.study.sizes import overlap
from headway.model.convert.methods import By, How

FROM, COMPUTE = "from", "compute"
OWN = (FROM, COMPUTE)
"""Keys of a variant that are no keys of a spec."""

GIVEN = ("attention.type", "attention.kv_heads", "init", "train.tokens", "train.validate_first")
"""Keys of a spec that `from` sets."""


class ConvertTo(StrictModel):
    """The conversion of the teacher's weights."""

    to: Literal["gqa", "mqa", "wgqa", "rgqa", "moh", "switchhead", "block_sparse"] = Field(
        description="the new mechanism"
    )
    kv_heads: int | None = Field(default=None, ge=1, description="its KV heads; default: as many as the teacher has")
    how: How = Field(default="mean", description="how KV heads of a group become one")
    by: By = Field(default="activations", description="what align, cluster and cluster_align compare")
    tokens: int = Field(default=16_384, ge=1, description="tokens for calibration and for the losses of the card")


class Origin(StrictModel):
    """What an uptrained variant starts from."""

    run: str = Field(
        min_length=1, description="a variant of the study, or the folder of a finished run or of imported weights"
    )
    convert: ConvertTo
    alpha: float = Field(description="share of the teacher's tokens that the converted model is trained on")
    schedule: Literal["teacher", "own"] | None = Field(
        default=None,
        description="teacher: the teacher's schedule with all its lengths times alpha (default of runs); own: that of "
        "the spec (default of imported weights)",
    )
    teacher_tokens: int | None = Field(
        default=None, ge=1, description="of imported weights: the tokens that they were trained on"
    )

    @field_validator("alpha")
    @classmethod
    def _in_range(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError(
                f"{value:g} is out of range: a share of the teacher's tokens is above 0 and at most 1, such as 0.05; 0 "
                "is measured in a list with others, such as [0, 0.05]"
            )
        return value


class Compute(StrictModel):
    """Whose training FLOPs a variant from scratch is given."""

    of: str = Field(min_length=1, description="an uptrained variant")
    teacher: Literal["counted", "free"] = Field(
        description="counted: the FLOPs of the teacher's training too; free: of the uptraining alone"
    )


def expanded(variants: Any) -> Any:
    """Variants with one alpha each: NAME with alphas [0, 0.05] becomes NAME-a0.05. Raises ValueError for bad lists."""
    if not isinstance(variants, dict):
        return variants
    found: dict[str, Any] = {}
    for name, keys in variants.items():
        alphas = keys.get(f"{FROM}.alpha") if isinstance(keys, dict) else None
        if not isinstance(alphas, list | tuple):
            found[name] = keys
            continue
        if not all(isinstance(alpha, int | float) and not isinstance(alpha, bool) for alpha in alphas):
            raise ValueError(f"{name}: from.alpha: is a number or a list of numbers, such as [0, 0.01, 0.05, 0.1]")
        trained = [float(alpha) for alpha in alphas if alpha != 0]
        if not trained:
            raise ValueError(
                f"{name}: from.alpha: only 0, which trains nothing; add an alpha above 0, such as [0, 0.05]: its "
                "validation before the first step is that of alpha 0"
            )
        if len(set(alphas)) != len(alphas):
            raise ValueError(f"{name}: from.alpha: an alpha is given twice, which would be the same run")
        for alpha in trained:
            if (twice := f"{name}-a{alpha:g}") in variants:
                raise ValueError(f"{name}: from.alpha: {alpha:g} gives a variant {twice}, which is written too")
            found[f"{name}-a{alpha:g}"] = {**keys, f"{FROM}.alpha": alpha}
    return found


def method_of(name: str, alpha: float) -> str:
    """The name without its alpha: what the points of a curve over alpha have in common."""
    return name.removesuffix(f"-a{alpha:g}")


def spec_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a variant that are those of a spec."""
    return {key: value for key, value in keys.items() if key.partition(".")[0] not in OWN}


def origin_of(name: str, keys: Mapping[str, Any]) -> Origin | None:
    """`from` of a variant; None without. Raises ValueError."""
    return _parsed(Origin, FROM, name, keys)


def compute_of(name: str, keys: Mapping[str, Any]) -> Compute | None:
    """`compute` of a variant; None without. Raises ValueError."""
    return _parsed(Compute, COMPUTE, name, keys)


def check_origins(variants: Mapping[str, Mapping[str, Any]], *, elsewhere: Mapping[str, bool]) -> None:
    """Raise ValueError for `from` and `compute` that are wrong or do not fit together.

    `elsewhere`: names of sections of the study that cannot be combined with them -> whether it has them.
    """
    origins = {name: origin_of(name, keys) for name, keys in variants.items()}
    computes = {name: compute_of(name, keys) for name, keys in variants.items()}
    used = [name for name in variants if origins[name] is not None or computes[name] is not None]
    if not used:
        return
    if clash := [section for section, there in elsewhere.items() if there]:
        raise ValueError(
            f"{clash[0]}: cannot be combined with variants that have `from` or `compute` ({used[0]}), which set sizes "
            f"and tokens themselves; leave {clash[0]} out, or make a study of its own"
        )
    for name in used:
        _check_one(name, variants[name], origins, computes)


def _check_one(
    name: str,
    keys: Mapping[str, Any],
    origins: Mapping[str, Origin | None],
    computes: Mapping[str, Compute | None],
) -> None:
    origin, compute = origins[name], computes[name]
    if origin is not None and compute is not None:
        raise ValueError(f"variants: {name}: has `from` and `compute`; use one of them")
    given = GIVEN if origin is not None else ("init", "train.tokens")
    for key in spec_keys(keys):
        if any(overlap(key, other) for other in given):
            raise ValueError(f"variants: {name}: `{FROM if origin else COMPUTE}` sets {key}; leave it out here")
    if origin is not None and origin.run in origins:
        if origin.run == name:
            raise ValueError(f"variants: {name}: from.run: is the variant itself; name its teacher")
        if origins[origin.run] is not None:
            raise ValueError(
                f"variants: {name}: from.run: {origin.run} is uptrained itself; name a variant that is trained from "
                "its start"
            )
    if compute is not None and origins.get(compute.of) is None:
        there = ", ".join(other for other, found in origins.items() if found is not None) or "none"
        raise ValueError(
            f"variants: {name}: compute.of: {compute.of} is no variant with `from`; use one of these: {there}"
        )


def _parsed(model: type[Any], section: str, name: str, keys: Mapping[str, Any]) -> Any:
    own = {key.removeprefix(f"{section}."): value for key, value in keys.items() if key.partition(".")[0] == section}
    if not own:
        return None
    tree: dict[str, Any] = {}
    for key, value in own.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    if section in own:
        raise ValueError(f"variants: {name}: {section}: is a mapping, such as {_SHOWN[section]}")
    try:
        return model.model_validate(tree, strict=False)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join([section, *map(str, first["loc"])])
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            what = f"unknown key; this section looks like {_SHOWN[section]}"
        raise ValueError(f"variants: {name}: {where}: {what[0].lower()}{what[1:]}") from None


_SHOWN = {
    FROM: "{run: mha, convert: {to: gqa, kv_heads: 2, how: mean}, alpha: 0.05}",
    COMPUTE: "{of: gqa-mean-a0.05, teacher: counted}",
}
