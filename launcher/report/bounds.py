"""Report section on the FLOPs of a larger model (`bounds` of a study), and on its goal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headway.launcher.base.text import short_number
from headway.launcher.compare.findings import signed_interval
from headway.launcher.compare.goal import AtSize, goal_words, largest_known
from headway.launcher.compare.simultaneous import Simultaneous
from headway.launcher.match.bounds import bound_rows
from headway.launcher.match.matching import WORDS
from headway.launcher.report.page import Block, Heading, Image, Table, Text
from headway.launcher.report.plots.study import Plot


def bound_blocks(
    record: Mapping[str, Any], sizes: Sequence[tuple[str, Mapping[str, Simultaneous]]], plot: Plot | None
) -> Iterator[Block]:
    """`record`: study.json or ladder.json. `sizes`: (name, variant -> difference) by increasing size. No blocks without
    `bounds`.
    """
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
    if bounds.get("goal"):
        yield from _goal(bounds, base, largest_known(sizes))
    if plot is not None:
        yield Image(plot)


def _goal(bounds: Mapping[str, Any], base: str, found: Mapping[str, AtSize]) -> Iterator[Block]:
    speeds = " and ".join(f"{ratio:g} times as fast at {int(n):,} tokens" for n, ratio in bounds["goal"].items())
    yield Heading("The goal", 3)
    yield Text(
        f"A better loss than {base}, and {speeds}. Losses are those of the largest size at which the variant has an "
        "interval. That a loss is not worse at these sizes does not mean that it is not worse at a larger one."
    )
    several = len({at.size for at in found.values()}) > 1 or any(at.size for at in found.values())
    rows = [("variant", *(["size"] if several else []), f"difference to {base}", "goal")]
    for variant in bounds["variants"]:
        if variant == base:
            continue
        at = found.get(variant)
        size = [at.size if at else "-"] if several else []
        difference = "not measured" if at is None else signed_interval(at.difference)
        rows.append((variant, *size, difference, goal_words(bounds, variant, at)))
    yield Table(rows, frozenset({0, len(rows[0]) - 1}))
