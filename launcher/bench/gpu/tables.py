"""Tables of `headway bench report`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from headway.launcher.bench.gpu.tables_parts import (
    ceilings,
    cores,
    correctness,
    forms,
    layers,
    levers,
    prefill,
    products,
)
from headway.launcher.bench.gpu.text import NOT_MEASURED, duration, number, spread_text
from headway.launcher.plan.hardware import Gpu
from headway.launcher.report.page import Block, Heading, Table, Text

HEADLINE = "940M"
GOALS = {2048: (1.08, 1.12, 1.15), 8192: (1.28, 1.33, 1.37), 32_768: (1.80, 1.90, 1.98)}
"""Goals for the speedup of R-GQA with k=1/4 over gqa, by length: accepted, target, stretch. Set before measuring."""
DENSE_WITHIN = "gqa, within documents"
"""Name of dense gqa's pass over packed documents in rows of steps."""
MFU_GOALS = (0.52, 0.56, 0.60)
"""Goals for the MFU of dense gqa at 2048 tokens: accepted, target, stretch."""
TOKENS_PER_UPDATE = 524_288
"""Tokens per optimizer step, for rates that include the optimizer's time."""


def comparisons(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Rows of whole passes."""
    for key, row in data.items():
        if key.startswith("steps/") and "contestants" in row:
            yield row


def rate_seconds(row: Mapping[str, Any], contestant: Mapping[str, Any]) -> float:
    """Seconds per token, including the optimizer's share."""
    return contestant["seconds"]["median"] / row["tokens"] + row["optimizer_s"]["median"] / TOKENS_PER_UPDATE


def mfu(row: Mapping[str, Any], contestant: Mapping[str, Any], gpu: Gpu | None) -> float | None:
    """MFU: useful causal FLOP/s over the datasheet's FLOP/s."""
    if gpu is None:
        return None
    return contestant["useful_flops_per_token"] / rate_seconds(row, contestant) / gpu.bf16_flops


def bound(data: Mapping[str, Any], size: str, seq_len: int, contestant: Mapping[str, Any]) -> float | None:
    """Upper bound of the speedup by routing: gqa's times with the routed parts, the rotation of queries among them,
    reduced to the share of active heads.

    Uses the dense gqa profile of the same run and size, within documents for a pass within documents. None without a
    profile, or if the mechanism does not route the query heads of that gqa.
    """
    documents = contestant.get("documents", False)
    profile = data.get(_profile_key(size, seq_len, documents=documents))
    if profile is None or not contestant["active"] or contestant["baseline"] not in ("gqa", DENSE_WITHIN):
        return None
    active, pool = contestant["active"]
    return 1 / (1 - (1 - active / pool) * min(1.0, profile["routed_share"]))


def _profile_key(size: str, seq_len: int, *, documents: bool) -> str:
    return f"steps/profile {size} {seq_len}{' documents' if documents else ''}"


def headline(data: Mapping[str, Any], gpu: Gpu | None) -> list[Block]:
    """Table of the goals set before measuring, with the measured values."""
    found_rows = [row for row in comparisons(data) if row["size"] == HEADLINE]
    found_rows.sort(key=lambda row: row.get("headline", False))  # its own rows win over those of all mechanisms
    at = {row["seq_len"]: row for row in found_rows}
    table = [["goal (accept / target / stretch)", "measured", "bound of the same run"]]
    dense = at.get(2048)
    found = None if dense is None else mfu(dense, dense["contestants"][0], gpu)
    table.append(
        [
            f"dense gqa, {HEADLINE}, 2048 tokens: MFU " + " / ".join(f"{goal:.0%}" for goal in MFU_GOALS),
            NOT_MEASURED if found is None else f"{found:.1%}",
            "",
        ]
    )
    for seq_len, goals in GOALS.items():
        row = at.get(seq_len)
        routed = [c for c in row["contestants"] if c["name"].startswith("rgqa k=1")] if row else []
        for documents in (False, True):
            c = next((c for c in routed if c.get("documents", False) == documents), None)
            goal = " / ".join(f"{goal:.2f}" for goal in goals)
            table.append(
                [
                    f"rgqa k=1/4 over gqa, {seq_len} tokens" + (" within documents" if documents else f": {goal}"),
                    NOT_MEASURED if c is None else spread_text(c["ratio"]),
                    number(None if c is None else bound(data, HEADLINE, seq_len, c)),
                ]
            )
    return [Heading("Goals"), Table(table), *alike(at.values())]


def alike(rows: Iterable[Mapping[str, Any]]) -> list[Block]:
    """How both sides of the ratios were compiled."""
    found = sorted({row["compile"] for row in rows if "compile" in row})
    return [Text(f"Both sides of every ratio: `speed.compile: {'`, `'.join(found)}`.")] if found else []


def sections(data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], gpu: Gpu | None) -> list[Block]:
    """All other tables, in the order of the measurements."""
    return [
        *ceilings(data),
        *correctness(rows),
        *(block for row in comparisons(data) for block in _steps(data, row, gpu)),
        *levers(data),
        *layers(data),
        *forms(data),
        *products(data),
        *prefill(data),
    ]


def _steps(data: Mapping[str, Any], row: Mapping[str, Any], gpu: Gpu | None) -> list[Block]:
    size, seq_len = row["size"], row["seq_len"]
    head = [
        "mechanism",
        "parameters",
        "tokens/s",
        "MFU",
        "over baseline (quartiles)",
        "by FLOPs",
        "bound",
        "of roofline",
    ]
    table = [[*head, "memory"]]
    for c in row["contestants"]:
        found = mfu(row, c, gpu)
        ideal = roofline_s_per_token(data, row, c)
        table.append(
            [
                c["name"] if c["baseline"] in ("gqa", c["name"]) else f"{c['name']} (over {c['baseline']})",
                f"{c['params'] / 1e6:,.0f}M",
                f"{1 / rate_seconds(row, c):,.0f}",
                "" if found is None else f"{found:.1%}",
                spread_text(c["ratio"]),
                number(c["useful_flop_ratio"]),
                number(bound(data, size, seq_len, c), missing=""),
                "" if ideal is None else f"{ideal * row['tokens'] / c['seconds']['median']:.0%}",
                "" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 2**30:.1f} GiB",
            ]
        )
    blocks: list[Block] = [
        Heading(f"{size}, {seq_len:,} tokens" + (", gqa and rgqa alone" if row.get("headline") else "")),
        Table(table),
        Text(
            f"Forward and backward over {row['tokens']:,} tokens; tokens/s and MFU with an update every "
            f"{TOKENS_PER_UPDATE:,} tokens ({duration(row['optimizer_s']['median'])}). By FLOPs: ratio of the useful "
            "FLOPs of the whole model. Bound: gqa's time with queries, their rotation, core and output reduced to the "
            "active heads. Of roofline: time of the executed FLOPs at the best rates above, over the measured time. "
            "Memory: in addition to the weights."
        ),
        *alike([row]),
    ]
    if counts := row.get("documents"):
        blocks.append(Text(f"Documents in each sequence, where passes are within documents: {join(counts)}."))
    if row["recompute"] != "none":
        blocks.append(Text("Passes did not fit into memory, so all of them recompute their blocks here.", "warn"))
    for documents in (False, True):
        profile = data.get(_profile_key(size, seq_len, documents=documents))
        if profile is not None:
            whole = profile["whole_s"]["median"]
            parts = {**profile["parts_s"], "rest": profile["rest_s"]}
            shares = ", ".join(f"{name} {s / whole:.0%}" for name, s in parts.items())
            kind = " within documents" if documents else ""
            text = f"Parts of dense gqa's {duration(whole)}{kind}, measured separately: {shares}."
            if slots := profile.get("slot_rotation_s"):
                of = ", ".join(f"{duration(s)} with {k} per group" for k, s in slots.items())
                text += f" A routed model selects and rotates its slots instead of rotating queries: {of}."
            blocks.append(Text(text))
    return blocks


def join(counts: Sequence[int]) -> str:
    """Document counts of the sequences: the first few, and the range of many."""
    return ", ".join(map(str, counts)) if len(counts) <= 8 else f"{min(counts)} to {max(counts)}"


def roofline_s_per_token(
    data: Mapping[str, Any], row: Mapping[str, Any], contestant: Mapping[str, Any]
) -> float | None:
    """Seconds per token for the executed FLOPs at the best rates of this run; None if they were not measured."""
    products = data.get("ceilings/matmul")
    rates = [
        shape["both_flops_per_s"]
        for _, shape in cores(data)
        if "both_flops_per_s" in shape and shape["seq_len"] == row["seq_len"]
    ]
    if products is None or not rates:
        return None
    core = contestant["core_flops_per_token"]
    dense = contestant["executed_flops_per_token"] - core
    return dense / products["best_flops_per_s"] + core * 3.5 / 3 / max(rates)
