"""Report section on the FLOPs of a larger model (`bounds` of a study)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from headway.launcher.base.text import short_number
from headway.launcher.match.bounds import bound_rows
from headway.launcher.match.matching import WORDS
from headway.launcher.report.page import Block, Heading, Table, Text


def bound_blocks(record: Mapping[str, Any]) -> Iterator[Block]:
    """`record`: study.json or ladder.json. No blocks without `bounds`."""
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
        f"per token of a sequence of {bounds['seq_len'][-1]:,}."
    )
    yield Table(list(bound_rows(bounds, match)))
