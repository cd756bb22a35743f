"""Sections of a study file for several sizes (`sizes`, `tokens_per_param`, `scale`) and for tuning (`tune`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from headway.data.config import StrictModel

LEAST_SIZES = 3
"""A curve with a level for each variant and a common exponent and asymptote needs three sizes to show a misfit."""

LEAST_GRID = 3
"""A parabola, and an optimum with a neighbour on both sides, need three values."""


RULE_OF_TOKENS = "`tokens_per_param`"


def flat_keys(tree: Any) -> Any:
    """{"attention": {"type": "rgqa"}} -> {"attention.type": "rgqa"}. An empty value counts as no keys.

    Raises ValueError if a key is given both dotted and nested.
    """
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        return tree
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = {f"{key}.{k}": v for k, v in flat_keys(value).items()} if isinstance(value, dict) else {key: value}
        if twice := flat.keys() & inner.keys():
            raise ValueError(f"{sorted(twice)[0]} is given twice")
        flat |= inner
    return flat


def overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are equal, or one is a prefix of the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def check_seeds(value: list[int]) -> list[int]:
    """The seeds. Raises ValueError for a repeated one, and for numbers that are no seeds."""
    if len(set(value)) != len(value):
        raise ValueError("a seed is given twice; a repeated seed is the same run, not another sample")
    if min(value) < 0 or max(value) >= 1 << 63:
        raise ValueError("seeds are integers from 0 to 2^63 - 1")
    return value


class SizeConfig(StrictModel):
    """One size of a ladder: a study of its own, with the variants and seeds of the file unless it names its own."""

    base: str | None = Field(
        default=None, min_length=1, description="base spec of this size, relative to the study file; default: `base`"
    )
    keys: Annotated[dict[str, Any], BeforeValidator(flat_keys)] = Field(
        default={}, description="what differs from the base, as spec keys: {model.width: 96, model.layers: 4}"
    )
    seeds: list[int] | None = Field(default=None, min_length=1, description="default: `seeds` of the study")
    variants: list[str] | None = Field(
        default=None, min_length=1, description="names of the variants at this size, with the baseline; default: all"
    )

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: list[int] | None) -> list[int] | None:
        return value if value is None else check_seeds(value)


class TuneConfig(StrictModel):
    """Search of one numeric key: a grid, a wider grid where an optimum lies on its edge, and a parabola in its log.

    All variants are trained on the same values, so that none gets more trials than another.
    """

    grid: list[float] = Field(min_length=LEAST_GRID, description="values that every variant is trained with")
    factor: float = Field(default=2.0, gt=1, le=100, description="ratio of a new value to the edge that it extends")
    extend: int = Field(default=3, ge=0, le=20, description="most values that are added to the grid, on both sides")
    seeds: list[int] = Field(min_length=1, description="seeds of the trials; the study may not use them")
    budget: float = Field(default=1.0, gt=0, le=1, description="share of the tokens of a size that a trial trains")
    sizes: list[str] | None = Field(default=None, min_length=1, description="sizes with trials; default: all")
    carry: Literal["same", "fit", "width"] = Field(
        default="same",
        description="value at sizes without trials. same: that of the largest size with trials; fit: a power law in "
        "parameters through the sizes with trials, one exponent for all variants; width: inversely to model.width",
    )
    check: bool = Field(
        default=True,
        description="train the baseline with the carried value and both neighbours at the largest size without trials",
    )

    @field_validator("grid")
    @classmethod
    def _grid(cls, value: list[float]) -> list[float]:
        if not all(x > 0 and math.isfinite(x) for x in value):
            raise ValueError("values of a grid are numbers above 0, because they are compared by their logarithms")
        if len(set(value)) != len(value):
            raise ValueError("a value is given twice; a repeated value is the same trial")
        return sorted(value)

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: list[int]) -> list[int]:
        return check_seeds(value)


def check_sizes(
    sizes: Mapping[str, SizeConfig],
    *,
    variants: Mapping[str, Mapping[str, Any]],
    baseline: str,
    scale: Mapping[str, float],
    tokens_per_param: float | None,
) -> None:
    """Raise ValueError for sizes that cannot be compared, and for keys that are set twice."""
    if not sizes and scale:
        raise ValueError("scale: is a rule over sizes, and the study has no `sizes`; set the keys in the base instead")
    if sizes and len(sizes) < LEAST_SIZES:
        raise ValueError(
            f"sizes: {len(sizes)} given, and a trend over sizes needs at least {LEAST_SIZES}; add sizes, or run one "
            "study for each"
        )
    for name, size in sizes.items():
        if size.variants is not None:
            if unknown := [v for v in size.variants if v not in variants]:
                raise ValueError(f"sizes: {name}: {unknown[0]!r} is not a variant. Variants: {', '.join(variants)}")
            if baseline not in size.variants:
                raise ValueError(f"sizes: {name}: the baseline {baseline} is missing; every difference is taken to it")
        for key in size.keys:
            if any(overlap(key, own) for own in scale):
                raise ValueError(f"sizes: {name}: {key} is in `scale` too; leave it out of one of them")
            if tokens_per_param is not None and overlap(key, "train.tokens"):
                raise ValueError(f"sizes: {name}: `tokens_per_param` sets {key}; leave one of them out")
            for variant, keys in variants.items():
                if any(overlap(key, own) for own in keys):
                    raise ValueError(
                        f"sizes: {name}: {key} is set by variant {variant} too; leave it out of one of them"
                    )
    rules = {
        **dict.fromkeys(scale, "`scale`"),
        **({} if tokens_per_param is None else {"train.tokens": RULE_OF_TOKENS}),
    }
    for key in scale:
        if tokens_per_param is not None and overlap(key, "train.tokens"):
            raise ValueError(f"scale: {RULE_OF_TOKENS} sets {key}; leave one of them out")
    for key, rule in rules.items():
        for variant, keys in variants.items():
            if any(overlap(key, own) for own in keys):
                raise ValueError(f"variants: {variant}: {rule} sets {key}; leave it out of one of them")


def check_tune(
    tune: Mapping[str, TuneConfig],
    *,
    sizes: Mapping[str, SizeConfig],
    seeds: list[int],
    set_elsewhere: Mapping[str, str],
) -> None:
    """Raise ValueError for a search that is not possible or not fair. `set_elsewhere`: key -> what sets it."""
    used = {*seeds, *(s for size in sizes.values() for s in size.seeds or ())}
    for key, search in tune.items():
        for own, what in set_elsewhere.items():
            if overlap(key, own):
                raise ValueError(f"tune: {key}: {what} sets {own}; leave it out of one of them")
        if both := used & set(search.seeds):
            raise ValueError(
                f"tune: {key}: seed {min(both)} is a seed of the study too, so the best trial would be chosen on the "
                "data that it is judged on; use other seeds"
            )
        if search.sizes is not None and not sizes:
            raise ValueError(f"tune: {key}: sizes: the study has no `sizes`; leave it out")
        if unknown := [s for s in search.sizes or () if s not in sizes]:
            raise ValueError(f"tune: {key}: {unknown[0]!r} is not a size. Sizes: {', '.join(sizes)}")
        _check_carried(key, search, sizes)
        tuned = len(search.sizes or sizes)
        if search.carry == "fit" and tuned < len(sizes) and tuned < 2:
            raise ValueError(f"tune: {key}: carry: fit needs trials at two sizes or more; use `same` or `width`")


def _check_carried(key: str, search: TuneConfig, sizes: Mapping[str, SizeConfig]) -> None:
    """Raise ValueError for a variant that is trained at a size without trials, and has no trial at any other size."""
    tuned = [size for name, size in sizes.items() if search.sizes is None or name in search.sizes]
    if any(size.variants is None for size in tuned):
        return
    tried = {v for size in tuned for v in size.variants or ()}
    for name, size in sizes.items():
        if lost := [v for v in size.variants or () if v not in tried]:
            raise ValueError(
                f"tune: {key}: variant {lost[0]} of size {name} is at none of the sizes with trials; add it"
            )
        if size.variants is None:
            raise ValueError(
                f"tune: {key}: size {name} has all variants, and the sizes with trials have {', '.join(sorted(tried))} "
                "alone; name the variants of this size, or add them there"
            )


def written_keys(
    variants: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, SizeConfig]
) -> Iterator[tuple[str, str]]:
    """(key, what sets it) of all variants and sizes."""
    for name, keys in variants.items():
        yield from ((key, f"variant {name}") for key in keys)
    for name, size in sizes.items():
        yield from ((key, f"size {name}") for key in size.keys)
