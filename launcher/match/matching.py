"""Solve one dimension of a variant so that its cost equals the baseline's.

Parameters, FLOPs and KV bytes are counted by `headway.model.cost.account`; `headway.launcher.match.time` measures time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from headway.data.config import StrictModel
from headway.launcher.base.errors import SpecError
from headway.launcher.match.search import LARGEST, Candidates, Illegal
from headway.launcher.spec.advice import closest

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec
    from headway.model.cost import Cost

Quantity = Literal["params", "flops", "kv_bytes", "wall_clock"]

WORDS: dict[str, str] = {
    "params": "parameters",
    "flops": "useful FLOPs per token",
    "kv_bytes": "KV bytes per token",
    "wall_clock": "seconds per forward and backward pass",
}
"""The matched quantity in messages and reports; a plural."""


def _or_percent(schema: dict[str, Any]) -> None:
    """Let a JSON schema of a share accept text such as `0.25%` too."""
    limits = {key: schema.pop(key) for key in ("type", "minimum", "exclusiveMaximum")}
    schema["anyOf"] = [limits, {"type": "string", "pattern": r"^\s*[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?\s*%\s*$"}]


class MatchConfig(StrictModel):
    """Which cost is equal in all variants, and which dimension is solved."""

    quantity: Quantity = Field(
        default="params",
        description="params: all parameters; flops: useful forward FLOPs per token; kv_bytes: KV cache per token; "
        "wall_clock: measured time of a micro-batch's forward and backward pass on this machine",
    )
    free: str = Field(default="model.ffn_width", description="dotted key of the integer that is solved")
    multiple: int = Field(default=16, ge=1, le=LARGEST, description="the solved value is a multiple of this")
    tolerance: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="largest relative difference to the baseline's cost: 0.25% or 0.0025",
        json_schema_extra=_or_percent,
    )
    seq_len: int | None = Field(
        default=None, ge=1, description="tokens per sequence at which costs are compared; none: data.seq_len"
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="tensor parallel size by which every layer of the solved model must divide",
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

    @model_validator(mode="after")
    def _sequence_matters(self) -> Self:
        if self.seq_len is not None and self.quantity == "params":
            raise ValueError(
                "seq_len: the number of parameters does not depend on it; leave it out, or use quantity flops"
            )
        return self

    @property
    def words(self) -> str:
        """What is matched: `useful FLOPs per token at 4096 tokens`."""
        return quantity_words(self.model_dump())


def quantity_words(match: dict[str, Any]) -> str:
    """`MatchConfig.words` for a config from a study's record."""
    seq_len = match.get("seq_len")
    return WORDS[match["quantity"]] + ("" if seq_len is None else f" at {seq_len:,} tokens")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Quartiles of a measured residual over `rounds` rounds. In each round, variant and baseline run in turns."""

    low: float
    high: float
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Matched:
    """One variant's matched size. `residual` is the relative difference to the baseline: 0.01 means 1 % more.

    Counted quantities: `residual` = cost / target - 1, and `spread` is None. Measured time: `residual` is the median
    over rounds of (variant / baseline) - 1, and `cost` and `target` are the median seconds of variant and baseline.
    """

    free: str
    value: int
    cost: float
    target: float
    residual: float
    spread: Spread | None = None


def spec_with(spec: Spec, key: str, value: Any) -> Spec:
    """`spec` with the dotted `key` set. Raises ValidationError if the result is not a legal spec."""
    tree = spec.model_dump()
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[last] = value
    return type(spec).model_validate(tree)


def value_at(spec: Spec, key: str) -> Any:
    """Value of a dotted key. Raises KeyError if the spec has no such key."""
    node: Any = spec.model_dump()
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            raise KeyError(key)
        node = node[part]
    return node


def spec_cost(spec: Spec, vocab_size: int, seq_len: int | None = None) -> Cost:
    """Parameters, FLOPs and KV bytes of the spec's model in its precision, at `seq_len` (default: data.seq_len).

    The encoder of an encoder-decoder reads the same share of other lengths.
    Raises ValueError if a per-layer field does not fit the number of layers.
    """
    from headway.model.cost import account

    length, source = seq_len or spec.data.seq_len, spec.data.encoder_tokens
    return account(
        spec.model,
        spec.attention,
        vocab_size=vocab_size,
        seq_len=length,
        bytes_per_element=2 if spec.parallel.precision == "bf16" else 4,
        encoder_tokens=None if source is None else max(1, source * length // spec.data.seq_len),
    )


def quantity_of(cost: Cost, quantity: Quantity) -> float:
    """The counted quantity. Raises KeyError for `wall_clock`, which is measured and not counted."""
    counted = {
        "params": cost.num_params,
        "flops": cost.flops_per_token.useful,
        "kv_bytes": cost.kv_bytes_per_token,
    }
    return float(counted[quantity])


def check_baseline(spec: Spec, match: MatchConfig, head: str) -> None:
    """Raise SpecError, beginning with `head`, if the baseline does not divide by `match.tensor_parallel`."""
    from headway.launcher.spec.layouts import why_not_cuttable

    reason = why_not_cuttable(spec, match.tensor_parallel)
    if reason:
        raise SpecError(f"{head}: the baseline itself: {reason}; change its sizes, or use a smaller tensor_parallel")


def candidate(spec: Spec, match: MatchConfig, value: int, vocab_size: int) -> tuple[Spec, Cost]:
    """`spec` with `match.free` set to `value`, and its counted cost. Raises Illegal with the reason."""
    from headway.launcher.spec.layouts import why_not_cuttable

    try:
        changed = spec_with(spec, match.free, value)
        cost = spec_cost(changed, vocab_size, match.seq_len)
    except ValidationError as error:
        raise Illegal(_reason(error.errors()[0]["msg"])) from None
    except ValueError as error:
        raise Illegal(_reason(str(error))) from None
    reason = why_not_cuttable(changed, match.tensor_parallel)
    if reason:
        raise Illegal(reason)
    return changed, cost


def _reason(message: str) -> str:
    """Remove the advice from a message, because the user did not write the value."""
    return message.removeprefix("Value error, ").partition("; use ")[0]


def check_free(spec: Spec, match: MatchConfig, head: str) -> None:
    """Raise SpecError, beginning with `head`, if `match.free` is not an integer of the spec."""
    try:
        own = value_at(spec, match.free)
    except KeyError:
        from headway.launcher.run.run_dir import flatten

        whole = [k for k, v in flatten(spec.model_dump()).items() if isinstance(v, int) and not isinstance(v, bool)]
        close = closest(match.free, [key for key in whole if key.startswith(("model.", "attention."))])
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SpecError(
            f"{head}: the spec has no such key {match.free!r}.{hint} Use model.ffn_width or another integer of the "
            "model"
        ) from None
    if not isinstance(own, int) or isinstance(own, bool):
        raise SpecError(f"{head} is {own!r}, not an integer; use model.ffn_width or another integer of the model")


def match_variant(variant: str, spec: Spec, match: MatchConfig, *, target: float, vocab_size: int) -> Matched:
    """Solve `match.free` of one variant's spec so that its counted cost is nearest to `target`.

    Values that give no legal spec are skipped. Raises SpecError if the key is not an integer of the spec, if no
    multiple is legal, if the cost does not depend on it, or if the nearest cost differs from `target` by more than the
    tolerance.
    """
    head = f"variant {variant}: match.free {match.free}"
    check_free(spec, match, head)
    candidates = Candidates(
        lambda value: quantity_of(candidate(spec, match, value, vocab_size)[1], match.quantity),
        multiple=match.multiple,
    )
    value = candidates.nearest_cost(target)
    if value is None:
        raise SpecError(nothing_legal(head, candidates, match))
    if len(candidates.costs) > 1 and len(set(candidates.costs.values())) == 1:
        raise SpecError(
            f"{head}: {match.words} do not depend on it; free a dimension that has a cost, such as model.ffn_width, "
            "or remove `match` to compare the variants as they are"
        )
    cost = candidates.costs[value]
    matched = Matched(free=match.free, value=value, cost=cost, target=target, residual=cost / target - 1)
    if abs(matched.residual) > match.tolerance:
        found = f"{cost:,.10g} {match.words} against the baseline's {target:,.10g}"
        raise SpecError(beyond_tolerance(head, matched, match, candidates, found))
    return matched


def nothing_legal(head: str, candidates: Candidates, match: MatchConfig) -> str:
    """The message if no multiple is legal, with the reason for the first one."""
    first, reason = next(iter(candidates.reasons.items()))
    fewer = "a smaller match.tensor_parallel or " if match.tensor_parallel > 1 else ""
    return (
        f"{head}: no multiple of {match.multiple} is legal ({first}: {reason}); use {fewer}another match.multiple, "
        "or free another dimension, such as model.ffn_width"
    )


def beyond_tolerance(head: str, matched: Matched, match: MatchConfig, candidates: Candidates, found: str) -> str:
    """The message if the nearest legal value exceeds the tolerance; `found` states both costs."""
    value, excess = matched.value, matched.residual
    grows = candidates.costs[max(candidates.costs)] >= candidates.costs[min(candidates.costs)]
    upward = (excess < 0) == grows
    wanted = value + (match.multiple if upward else -match.multiple)
    beyond = candidates.nearest_legal(wanted, low=value) if upward else candidates.nearest_legal(wanted, high=value)
    if beyond is None:
        much = "too much" if excess > 0 else "too little"
        reason = f"even its {'largest' if upward else 'smallest'} legal value {value} is {much}"
    else:
        reason = f"the nearest legal multiple of {match.multiple} is {value}"
    if wanted in candidates.reasons:
        reason += f" ({wanted} is not legal: {candidates.reasons[wanted]})"
    missed = abs(excess)
    finer = "use a smaller match.multiple" if match.multiple > 1 else "free another dimension"
    second = (
        f"match.tolerance: {missed * 100 + 0.01:.2f}% if that difference is acceptable"
        if missed < 0.5
        else "change the variant's other sizes"
    )
    return (
        f"{head}: {reason}: {found}, {excess:+.2%}, beyond the tolerance of {match.tolerance:.2%}; {finer}, or {second}"
    )
