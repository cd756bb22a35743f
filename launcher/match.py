"""Solve one dimension of a variant so that it costs what the baseline costs.

The matched quantity is counted by `headway.model.cost.account`; nothing is trained or measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator

from headway.data.config import StrictModel
from headway.launcher.advice import closest
from headway.launcher.errors import SpecError

if TYPE_CHECKING:
    from headway.launcher.spec import Spec
    from headway.model.cost import Cost

Quantity = Literal["params", "flops"]

LARGEST = 1 << 24
"""Largest value the free dimension may take; wider than any transformer's MLP."""


class MatchConfig(StrictModel):
    """Which cost is equal in all variants, and which dimension gives way."""

    quantity: Quantity = Field(
        default="params", description="params: all parameters; flops: useful forward FLOPs per token"
    )
    free: str = Field(default="model.ffn_width", description="dotted key of the integer that is solved")
    multiple: int = Field(default=16, ge=1, le=LARGEST, description="the solved value is a multiple of this")
    tolerance: float = Field(
        default=0.01, ge=0, lt=1, description="largest share by which a variant may miss the baseline: 0.25% or 0.0025"
    )

    @field_validator("tolerance", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        if isinstance(value, str) and value.rstrip().endswith("%"):
            try:
                return float(value.rstrip()[:-1]) / 100
            except ValueError:
                raise ValueError(f"{value!r} is not a percentage; write 0.25% or 0.0025") from None
        return value


@dataclass(frozen=True, kw_only=True)
class Matched:
    """One variant's matched size. `residual` = cost / target - 1; 0.01 means 1 % more than the baseline."""

    free: str
    value: int
    cost: float
    target: float

    @property
    def residual(self) -> float:
        return self.cost / self.target - 1


def nearest_multiple(cost: Callable[[int], float], *, target: float, multiple: int) -> int:
    """The multiple of `multiple` (at least one of it) whose cost is nearest to `target`; the smaller one on a tie.

    `cost` must not decrease. Raises ValueError where the cost does not grow at all.
    """
    if cost(multiple) >= target:
        return multiple
    low, high = 1, 2  # in multiples; cost(low) < target
    while cost(high * multiple) < target:
        low, high = high, high * 2
        if high * multiple > LARGEST:
            raise ValueError(f"no value up to {LARGEST} reaches the baseline's cost")
    while high - low > 1:
        middle = (low + high) // 2
        if cost(middle * multiple) < target:
            low = middle
        else:
            high = middle
    below, above = target - cost(low * multiple), cost(high * multiple) - target
    return (low if below <= above else high) * multiple


def spec_with(spec: Spec, key: str, value: Any) -> Spec:
    """`spec` with the dotted `key` set. Raises ValidationError where the result is not a legal spec."""
    tree = spec.model_dump()
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[last] = value
    return type(spec).model_validate(tree)


def value_at(spec: Spec, key: str) -> Any:
    """Value of a dotted key. Raises KeyError where the spec has no such key."""
    node: Any = spec.model_dump()
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            raise KeyError(key)
        node = node[part]
    return node


def spec_cost(spec: Spec, vocab_size: int) -> Cost:
    """Parameters, FLOPs and KV bytes of the spec's model at its sequence length and precision."""
    from headway.model.cost import account

    return account(
        spec.model,
        spec.attention,
        vocab_size=vocab_size,
        seq_len=spec.data.seq_len,
        bytes_per_element=2 if spec.parallel.precision == "bf16" else 4,
    )


def quantity_of(cost: Cost, quantity: Quantity) -> float:
    return float(cost.num_params) if quantity == "params" else float(cost.flops_per_token.useful)


def check_free(spec: Spec, match: MatchConfig, head: str) -> None:
    """Raise SpecError, beginning with `head`, where `match.free` is not an integer of the spec."""
    try:
        own = value_at(spec, match.free)
    except KeyError:
        from headway.launcher.run_dir import flatten

        whole = [k for k, v in flatten(spec.model_dump()).items() if isinstance(v, int) and not isinstance(v, bool)]
        close = closest(match.free, [key for key in whole if key.startswith(("model.", "attention."))])
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SpecError(
            f"{head}: the spec has no such key {match.free!r}.{hint} Use model.ffn_width or another integer of the "
            "model"
        ) from None
    if not isinstance(own, int) or isinstance(own, bool):
        raise SpecError(f"{head}: is {own!r}, not an integer; use model.ffn_width or another integer of the model")


def match_variant(variant: str, spec: Spec, match: MatchConfig, *, target: float, vocab_size: int) -> Matched:
    """Solve `match.free` of one variant's spec so that its cost is nearest to `target`.

    Raises SpecError where the key is not an integer of the spec, where the cost does not depend on it, where a value on
    the way is illegal, or where the nearest cost misses `target` by more than the tolerance.
    """
    head = f"variant {variant}: match.free {match.free}"
    check_free(spec, match, head)

    def cost(value: int) -> float:
        try:
            candidate = spec_with(spec, match.free, value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise SpecError(
                f"{head}: {value} on the way to the match is not legal ({reason}); use a match.multiple whose "
                "multiples are all legal, or free another dimension, such as model.ffn_width"
            ) from None
        return quantity_of(spec_cost(candidate, vocab_size), match.quantity)

    if cost(match.multiple) == cost(2 * match.multiple):
        raise SpecError(
            f"{head}: {match.quantity} do not depend on it; free a dimension that has a cost, such as model.ffn_width, "
            "or leave `match` out to compare as they are"
        )
    try:
        value = nearest_multiple(cost, target=target, multiple=match.multiple)
    except ValueError as error:
        raise SpecError(f"{head}: {error}; check the baseline, or free another dimension") from None
    matched = Matched(free=match.free, value=value, cost=cost(value), target=target)
    if abs(matched.residual) > match.tolerance:
        raise SpecError(_beyond_tolerance(head, matched, match))
    return matched


def _beyond_tolerance(head: str, matched: Matched, match: MatchConfig) -> str:
    reason = f"the nearest multiple of {match.multiple} is {matched.value}"
    if matched.value == match.multiple and matched.residual > 0:
        reason = f"even its smallest value {matched.value} is too much"
    missed = abs(matched.residual)
    second = (
        f"match.tolerance: {missed * 100 + 0.01:.2f}% if that is fair" if missed < 0.5 else "free another dimension"
    )
    return (
        f"{head}: {reason}: {matched.cost:,.0f} {match.quantity} against the baseline's {matched.target:,.0f}, "
        f"{matched.residual:+.2%}, beyond the tolerance of {match.tolerance:.2%}; "
        f"use a smaller match.multiple, or {second}"
    )
