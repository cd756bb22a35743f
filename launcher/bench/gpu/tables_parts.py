"""Tables of `headway bench report` about limits, correctness, operations, layers and inference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headway.launcher.bench.gpu.text import NOT_MEASURED, duration, rate, spread_text
from headway.launcher.report.page import Block, Heading, Table, Text


def ceilings(data: Mapping[str, Any]) -> list[Block]:
    """Tables of copies, products and attention cores."""
    copy, cache, launch = (data.get(f"ceilings/{name}") for name in ("copy", "cache", "launch"))
    grouped, products = data.get("ceilings/grouped"), data.get("ceilings/matmul", {}).get("products", [])
    table = [["what", "rate"]]
    table.append(["copy, read and written", rate(copy and copy["bytes_per_s"], "B/s")])
    table.append(["reads from L2, lower bound", rate(cache and cache["bytes_per_s"], "B/s")])
    table.append(["launch of a small operation", duration(launch and launch["seconds_per_operation"])])
    table += [
        [f"product of {p['rows']} rows, K = N = {p['inner']}", rate(p["flops_per_s"], "FLOP/s")] for p in products
    ] or [["matrix products", NOT_MEASURED]]
    for form in ("grouped", "dense"):
        found = grouped and grouped.get("flops_per_s")
        table.append([f"{form} product, N of one head", rate(found and found[form], "FLOP/s")])
    blocks: list[Block] = [Heading("Limits of the machine"), Table(table)]
    shapes = [
        (backend, s)
        for backend in ("cudnn", "flash")
        for s in data.get(f"ceilings/core {backend}", {"shapes": []})["shapes"]
    ]
    if not shapes:
        return [*blocks, Text(f"Attention cores: {NOT_MEASURED}.")]
    core = [["core by", "head size", "tokens", "heads : KV heads", "forward", "forward and backward"]]
    for backend, s in shapes:
        cells = ["forward_flops_per_s", "both_flops_per_s"]
        rates: list[str] = [s["refused"], ""] if "refused" in s else [rate(s[cell], "FLOP/s") for cell in cells]
        core.append([backend, str(s["head_dim"]), f"{s['seq_len']:,}", f"{s['heads']} : {s['kv_heads']}", *rates])
    return [*blocks, Table(core)]


def cores(data: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(backend, measurement of one shape) of all attention cores."""
    for key, row in data.items():
        if key.startswith("ceilings/core "):
            for shape in row["shapes"]:
                yield key.removeprefix("ceilings/core "), shape


def correctness(rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Table of the kernel checks and their results."""
    table = [["kernel check", "result", "comparisons", "largest error over its tolerance"]]
    for row in rows:
        if row["key"].startswith("correctness/"):
            data = row.get("data", {})
            result = {"measured": "right", "wrong": "WRONG"}.get(row["status"], row["status"])
            count = str(len(data["comparisons"])) if data else ""
            worst = data.get("worst")
            cells = [row["key"].removeprefix("correctness/"), str(result), count]
            table.append([*cells, "" if worst is None else f"{worst:.2f}"])
    if len(table) == 1:
        return [Heading("Kernels against float64"), Text(f"{NOT_MEASURED.capitalize()}.")]
    return [Heading("Kernels against float64"), Table(table)]


def levers(data: Mapping[str, Any]) -> list[Block]:
    """One table of speed options per shape."""
    blocks: list[Block] = [Heading("Levers, one at a time")]
    for key, row in data.items():
        if not key.startswith("levers/"):
            continue
        table = [["lever", "time", "times as fast (quartiles)", "memory"]]
        for lever in row["levers"]:
            if "refused" in lever:
                table.append([lever["name"], lever["refused"], "", ""])
                continue
            memory = lever.get("peak_bytes")
            table.append(
                [
                    lever["name"],
                    duration(lever["seconds"]["median"]),
                    spread_text(lever["ratio"]),
                    "" if memory is None else f"{memory / 2**30:.1f} GiB",
                ]
            )
        blocks += [Text(row["about"]), Table(table)]
    return blocks if len(blocks) > 1 else [*blocks, Text(f"{NOT_MEASURED.capitalize()}.")]


def layers(data: Mapping[str, Any]) -> list[Block]:
    """Table of single attention layers."""
    head = ["layer", "tokens", "forward", "over baseline (quartiles)", "with backward", "over baseline"]
    table = [[*head, "plain PyTorch", "one product per expert"]]
    for key, row in data.items():
        if not key.startswith("layers/"):
            continue
        for c in row["contestants"]:
            name = f"{row['size']} {c['name']}" + ("" if c["baseline"] == "gqa" else f" (over {c['baseline']})")
            cells = [name, f"{row['seq_len']:,}"]
            for form in ("forward", "both"):
                cells += [duration(c[form]["seconds"]["median"]), spread_text(c[form]["ratio"])]
            table.append(
                [*cells, *(spread_text(c[form]["ratio"]) if form in c else "" for form in ("plain", "grouped"))]
            )
    if len(table) == 1:
        return [Heading("Attention layers"), Text(f"{NOT_MEASURED.capitalize()}.")]
    text = (
        "Each ratio compares with the baseline's time in the same rounds. The last two columns are for forward and "
        "backward together. Both sides of a ratio are compiled alike (`speed.compile` as in the tables of "
        "whole passes); plain PyTorch and one product per expert replace Headway's kernels and nothing else."
    )
    return [Heading("Attention layers"), Table(table), Text(text)]


def forms(data: Mapping[str, Any]) -> list[Block]:
    """Table of products in the dense and the routed form."""
    table = [["product", "shape", "tokens on", "dense", "routed", "routed over dense (quartiles)"]]
    for key, row in data.items():
        if not key.startswith("forms/"):
            continue
        for p in row["products"]:
            times = [duration(p[form]["median"]) for form in ("dense", "routed")]
            table.append([p["product"], row["shape"], p["kind"], *times, spread_text(p["ratio"])])
    if len(table) == 1:
        return [Heading("Dense or routed"), Text(f"{NOT_MEASURED.capitalize()}.")]
    return [Heading("Dense or routed"), Table(table), Text("The time of the routed form includes building its lists.")]


def products(data: Mapping[str, Any]) -> list[Block]:
    """Table of single operations, compared with plain PyTorch and with their floor."""
    table = [["operation", "shape", "time", "over plain PyTorch (quartiles)", "of its floor"]]
    for key, row in data.items():
        if not key.startswith("products/"):
            continue
        for found in row["operations"]:
            floor, ours = _floor(data, found), found["seconds"]["median"]
            table.append(
                [
                    found["name"],
                    row["shape"],
                    duration(ours),
                    spread_text(found["ratio"]),
                    "" if floor is None else f"{floor / ours:.0%}",
                ]
            )
    if len(table) == 1:
        return [Heading("Operations"), Text(f"{NOT_MEASURED.capitalize()}.")]
    text = (
        "Floor: the larger of two times: minimum memory traffic at the copy rate, and FLOPs at the best product's "
        "rate. Plain PyTorch is not compiled here, so this ratio shows fusion too."
    )
    return [Heading("Operations"), Table(table), Text(text)]


def _floor(data: Mapping[str, Any], operation: Mapping[str, Any]) -> float | None:
    """Lower bound of an operation's seconds on this machine; None if the rates were not measured."""
    copy, products = data.get("ceilings/copy"), data.get("ceilings/matmul")
    if copy is None or products is None:
        return None
    moved, flops = operation["moved_bytes"], operation.get("flops", 0.0)
    return max(moved / copy["bytes_per_s"], flops / products["best_flops_per_s"])


def prefill(data: Mapping[str, Any]) -> list[Block]:
    """Table of prefill, decoding and KV cache."""
    table = [
        ["model", "tokens", "prefill", "over baseline (quartiles)", "per decoded token", "over baseline", "KV cache"]
    ]
    for key, row in data.items():
        if not key.startswith("prefill/"):
            continue
        for c in row["contestants"]:
            table.append(
                [
                    f"{row['size']} {c['name']}" + ("" if c["baseline"] == "gqa" else f" (over {c['baseline']})"),
                    f"{row['seq_len']:,}",
                    duration(c["prefill"]["median"]),
                    spread_text(c["prefill_ratio"]),
                    duration(c["decode_s_per_token"]),
                    spread_text(c["decode_ratio"]),
                    f"{c['kv_bytes_per_token']:,.0f} B/token",
                ]
            )
    if len(table) == 1:
        return [Heading("Inference"), Text(f"{NOT_MEASURED.capitalize()}.")]
    return [Heading("Inference"), Table(table)]
