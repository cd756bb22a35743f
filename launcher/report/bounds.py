"""Report section on the FLOPs of a larger model (`bounds` of a study)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headway.launcher.base.text import short_number
from headway.launcher.match.bounds import bound_rows
from headway.launcher.match.matching import WORDS
from headway.launcher.report.page import Block, Heading, Table, Text


def bound_blocks(record: Mapping[str, Any], studies: Sequence[Mapping[str, Any]] = ()) -> Iterator[Block]:
    """`record`: study.json or ladder.json; `studies`: study.json of each size. No blocks without `bounds`."""
    bounds, match = record.get("bounds"), record.get("match")
    if not bounds:
        return
    base = record["baseline"]
    equal = f"at equal {WORDS[match['quantity']]}" if match else "with sizes as written"
    yield Heading(f"What FLOPs allow at {short_number(bounds['variants'][base]['num_params'])} parameters")
    yield Text(
        f"Counted, not measured: FLOPs per token of {base} over those of the variant, in the model of "
        f"`{bounds['spec']}`, {equal}. A variant trains that many times as fast if every FLOP takes the same time. "
        "Kernels that reach a smaller share of the machine's peak than the baseline's are slower than that. KV bytes: "
        f"per token of a sequence of {bounds['seq_len'][-1]:,}.{recomputation([record, *studies])}"
    )
    yield Table(list(bound_rows(bounds, match)))


def recomputation(value: Any) -> str:
    """A sentence, after a space, if a spec in `value` has layers whose backward pass is more than twice the forward."""
    if not _has_delta(value):
        return ""
    return (
        " Layers of `gated_delta` compute their states again in the backward pass: in training, their core executes up "
        "to five times its forward FLOPs, not three times, which no number here counts."
    )


def _has_delta(value: Any, key: str = "") -> bool:
    if isinstance(value, Mapping):
        return any(_has_delta(item, str(name)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return any(_has_delta(item, key) for item in value)
    return value == "gated_delta" and key.rpartition(".")[2] == "type"
