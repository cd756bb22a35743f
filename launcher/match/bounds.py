"""What FLOPs allow at a larger model: how much faster each variant of a study could train there, at equal parameters.

A study at small sizes measures losses. Whether a variant can be faster where attention is a large part of the cost is a
matter of counting: its forward FLOPs per token at long sequences, with the dimension that the study matches solved at
the larger model too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from headway.data.config import StrictModel
from headway.launcher.base.errors import SpecError, printable
from headway.launcher.match.matching import MatchConfig, match_variant, quantity_of, spec_cost, spec_with, value_at
from headway.launcher.spec.advice import closest
from headway.launcher.spec.load import load_spec

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec
    from headway.launcher.spec.yamlio import Node


class BoundsConfig(StrictModel):
    """A larger model, and the sequences at which FLOPs are counted."""

    spec: str = Field(min_length=1, description="spec of the larger model, relative to the study file")
    seq_len: list[int] = Field(min_length=1, max_length=16, description="tokens per sequence: [8192, 32768]")
    keys: dict[str, dict[str, Any]] = Field(
        default={},
        description="variant -> keys that differ in the larger model, such as attention.top_k where it has more heads",
    )

    goal: list[float] = Field(
        default=[],
        description="how many times as fast as the baseline a variant has to be, for each of seq_len: [1.33, 1.9]",
    )

    @property
    def goals(self) -> dict[int, float]:
        """Tokens per sequence -> how many times as fast as the baseline a variant has to be there."""
        return dict(sorted(zip(self.seq_len, self.goal, strict=False)))

    @field_validator("seq_len")
    @classmethod
    def _lengths(cls, value: list[int]) -> list[int]:
        if min(value) < 1 or len(set(value)) != len(value):
            raise ValueError("lengths are positive and different")
        return value

    @model_validator(mode="after")
    def _goals(self) -> BoundsConfig:
        if self.goal and len(self.goal) != len(self.seq_len):
            raise ValueError(
                f"goal: write {len(self.seq_len)} ratios, one for each of seq_len, and not {len(self.goal)}"
            )
        if any(not (math.isfinite(value) and value > 0) for value in self.goal):
            raise ValueError("goal: ratios are positive numbers, such as 1.33")
        return self


def bound_specs(
    config: BoundsConfig,
    path: Path,
    variants: Mapping[str, Node],
    *,
    baseline: str,
    match: MatchConfig | None,
    arguments: Sequence[str] = (),
) -> tuple[dict[str, Spec], int]:
    """The spec of each variant at the larger model, with its size solved, and the vocabulary.

    `path`: file of the larger spec. `variants`: the keys that each variant sets above it. `arguments` (`a.b=c`): change
    the larger spec of all variants. Raises SpecError if the file does not exist or names no vocabulary, and if a
    variant does not fit or cannot be matched.
    """
    if not path.is_file():
        raise SpecError(f"bounds.spec: no such file: {printable(config.spec)}; the name is relative to the study file")
    layers: dict[str, list[tuple[Any, str]]] = {name: [(node, f"variant {name}")] for name, node in variants.items()}
    for name, keys in config.keys.items():
        if name not in layers:
            close = closest(name, list(layers))
            hint = f" Did you mean {close[0]}?" if close else ""
            raise SpecError(f"bounds.keys: {printable(name)} is not a variant.{hint} Variants: {', '.join(layers)}")
        layers[name].append((keys, f"bounds.keys of {name}"))
    specs = {name: load_spec(path, arguments, extra=found).spec for name, found in layers.items()}
    base = specs[baseline]
    vocab_size = base.model.vocab_size
    if vocab_size is None:
        raise SpecError(f"bounds.spec: {printable(config.spec)} has no model.vocab_size; add it, to count without data")
    target = None if match is None else quantity_of(spec_cost(base, vocab_size, match.seq_len), match.quantity)
    for name, spec in specs.items():
        if match is not None and target is not None and name != baseline:
            matched = match_variant(f"{name} at {base.name}", spec, match, target=target, vocab_size=vocab_size)
            specs[name] = spec_with(spec, matched.free, matched.value)
    return specs, vocab_size


def count_bounds(
    config: BoundsConfig, path: Path, variants: Mapping[str, Node], *, baseline: str, match: MatchConfig | None
) -> dict[str, Any]:
    """The counts at the larger model, as JSON: its name and parameters, and a row for each variant.

    FLOPs are useful forward FLOPs; training costs three times as much in every variant, so ratios are those of
    training. Raises SpecError as `bound_specs` does.
    """
    specs, vocab_size = bound_specs(config, path, variants, baseline=baseline, match=match)
    lengths = sorted(config.seq_len)
    rows = {name: _row(spec, vocab_size, lengths, match) for name, spec in specs.items()}
    flops = rows[baseline]["flops_per_token"]
    for row in rows.values():
        row["speed_up"] = {n: flops[n] / own for n, own in row["flops_per_token"].items()}
    goal = {"goal": {str(n): ratio for n, ratio in config.goals.items()}} if config.goal else {}
    return {"spec": config.spec, "name": specs[baseline].name, "seq_len": lengths, **goal, "variants": rows}


def _row(spec: Spec, vocab_size: int, lengths: list[int], match: MatchConfig | None) -> dict[str, Any]:
    costs = {str(n): spec_cost(spec, vocab_size, n) for n in lengths}
    return {
        "free_value": None if match is None else value_at(spec, match.free),
        "num_params": next(iter(costs.values())).num_params,
        "flops_per_token": {n: cost.flops_per_token.useful for n, cost in costs.items()},
        "kv_bytes_per_token": {n: cost.kv_bytes_per_token for n, cost in costs.items()},
    }


def bound_rows(bounds: Mapping[str, Any], match: Mapping[str, Any] | None) -> Iterator[tuple[str, ...]]:
    """Rows of a table of `count_bounds`, header first. `match`: of the study. KV bytes are those at the last length."""
    lengths = [str(n) for n in bounds["seq_len"]]
    free = [] if match is None else [match["free"]]
    yield ("variant", *free, "params", *(f"FLOPs at {int(n):,} tokens" for n in lengths), "KV bytes/token")
    for name, row in bounds["variants"].items():
        sizes = [] if match is None else [f"{row['free_value']:,}"]
        ratios = [f"{row['speed_up'][n]:.2f}x" for n in lengths]
        kv = f"{row['kv_bytes_per_token'][lengths[-1]]:,.0f}"
        yield (name, *sizes, f"{row['num_params']:,}", *ratios, kv)
