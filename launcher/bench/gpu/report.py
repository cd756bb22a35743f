"""`headway bench report`: write tables and a plot from the rows of `headway bench gpu`, and update planner constants.

Only rows of the code and device in machine.json are shown. Quantities without a row are shown as "not measured".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headway.kernels.choice import TABLE, Form, override
from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.bench.gpu.run import read_rows
from headway.launcher.bench.gpu.tables import bound, comparisons, headline, sections
from headway.launcher.plan.hardware import GPUS, Gpu
from headway.launcher.report.page import Block, Heading, Image, Items, Text, to_html, to_markdown


def report_gpu(folder: Path, *, out: Path | None = None, refit: bool = False) -> int:
    """Write report.md, report.html and speed.png into `out` (default: `folder`). Returns 0.

    `refit` also writes the planner's constants of this GPU to launcher/plan/measured.json, and the faster form of each
    product to kernels/choice.json. Raises SpecError if the folder has no rows, or lacks the rows for the constants.
    """
    card, rows = load(folder)
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    blocks = blocks_of(card, rows, out)
    title = f"Speed on {card['device']}"
    (out / "report.md").write_text(to_markdown(blocks))
    (out / "report.html").write_text(to_html(blocks, title=title, folder=out))
    console.result(f"written to {out / 'report.md'} and {out / 'report.html'}")
    if refit:
        _refit(card, rows, folder)
    return 0


def load(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The content of machine.json, and the newest row of each key for that code and device."""
    try:
        card = json.loads((folder / "machine.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SpecError(
            f"{folder}: no machine.json of `headway bench gpu` ({error}); name the folder given as its --out"
        ) from None
    newest = {row["key"]: row for row in read_rows(folder) if row["id"] == card["id"]}
    if not newest:
        raise SpecError(
            f"{folder}: no row of the code and device in machine.json; run headway bench gpu --out {folder}"
        )
    return card, list(newest.values())


def gpu_of(card: Mapping[str, Any]) -> Gpu | None:
    """The planner's entry for the measured device, found by name; None if there is none."""
    words = card["device"].lower().replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


def blocks_of(card: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], out: Path) -> list[Block]:
    """The whole report; draws its figure into `out`."""
    gpu, versions = gpu_of(card), card["versions"]
    reduced = card["scale"] != "gpu"
    data = {row["key"]: row["data"] for row in rows if row["status"] in ("measured", "wrong")}
    blocks: list[Block] = [
        Heading(f"Speed on {card['device']}", 1),
        Text(
            f"`headway bench gpu`, code {card['code']} (commit {card['git_commit'] or 'unknown'}), "
            f"{card['measured_at']}, torch {versions['torch']}, Triton {versions['triton']}, CUDA {versions['cuda']}. "
            "Random data, the machine's own clock settings, medians with quartiles. The compared passes take turns "
            "round by round, and ratios compare times of the same round. Models on both sides of a ratio have the same "
            f"`speed.compile`{_compiled(rows)}. Raw times: rows.jsonl."
        ),
    ]
    if reduced:
        blocks.append(Text("A reduced run on a CPU, to test the benchmark: no number here applies to a GPU.", "warn"))
    wrong = [row for row in rows if row["status"] in ("wrong", "crashed")]
    if wrong:
        names = ", ".join(row["key"] for row in wrong)
        blocks.append(Text(f"WRONG RESULTS: {names}. Ignore the speeds of these kernels.", "warn"))
    blocks += headline({} if reduced else data, gpu)
    blocks += sections(data, rows, gpu)
    if not reduced and (plot := _draw(data, out)) is not None:
        blocks.insert(3 + bool(wrong), Image(plot))
    left = [
        f"{row['key']}: {row['status']}, {row.get('why', '')}" for row in rows if row["status"] not in ("measured",)
    ]
    if left:
        blocks += [Heading("Rows without a number"), Items(left)]
    return blocks


def _compiled(rows: Sequence[Mapping[str, Any]]) -> str:
    found = sorted({row["data"]["compile"] for row in rows if "compile" in row.get("data", {})})
    return f": {', '.join(found)}" if found else ""


def _refit(card: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    from headway.launcher.plan.measured import FILE, fit, write

    gpu = gpu_of(card)
    if gpu is None:
        raise SpecError(
            f"--refit: the planner does not know {card['device']!r}; it knows {', '.join(GPUS)}. Add a datasheet entry "
            "to launcher/plan/hardware.py first, or omit --refit"
        )
    try:
        entry = fit(rows, source=f"{folder}, {card['measured_at']}")
    except ValueError as error:
        raise SpecError(f"--refit: {error}") from None
    write(gpu.name, entry)
    console.note(f"updated the planner's constants of {gpu.name} in {FILE}")
    if faster := faster_forms(rows):
        override(faster)
        console.note(f"updated {len(faster)} choices of the dense or routed form in {TABLE}")


def faster_forms(rows: Sequence[Mapping[str, Any]]) -> dict[str, Form]:
    """Key of kernels/choice.json -> the faster form with evenly distributed tokens."""
    found: dict[str, Form] = {}
    for row in rows:
        if row["status"] == "measured" and row["key"].startswith("forms/"):
            for product in row["data"]["products"]:
                if product["kind"] == "even":
                    found[product["key"]] = "routed" if product["ratio"]["median"] > 1 else "dense"
    return found


def _draw(data: Mapping[str, Any], out: Path) -> Any:
    """Draw the speedup over gqa by length, one panel per size; dashed: the Amdahl bound of the same run."""
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in comparisons(data):
        panels.setdefault(row["size"], []).append(row)
    if not panels:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from headway.launcher.report.plots.study import save
    from headway.launcher.report.plots.style import COLOURS, STYLE, WIDTH_IN

    with plt.rc_context({**STYLE, "svg.hashsalt": "bench gpu"}):
        figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH_IN, 4.5), squeeze=False, sharey=True)
        for axis, (size, rows) in zip(axes[0], panels.items(), strict=True):
            names = [c["name"] for c in rows[0]["contestants"] if c["active"] or c["name"] in ("switchhead", "hybrid")]
            for name, colour in zip(names, COLOURS * 2, strict=False):
                found = [(row["seq_len"], c) for row in rows for c in row["contestants"] if c["name"] == name]
                xs, ratios = [x for x, _ in found], [c["ratio"] for _, c in found]
                errors = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
                axis.errorbar(xs, [r["median"] for r in ratios], errors, marker="o", color=colour, label=name)
                bounds = [(x, b) for x, c in found if (b := bound(data, size, x, c)) is not None]
                if bounds:
                    axis.plot(*zip(*bounds, strict=True), color=colour, linestyle="--", linewidth=1)
            axis.set_xscale("log", base=2)
            axis.set_title(size)
            axis.set_xlabel("tokens per sequence")
            axis.axhline(1.0, color="#000000", linewidth=1)
        axes[0][0].set_ylabel("times as fast as its baseline")
        axes[0][0].legend()
        caption = (
            "Forward and backward over the baseline's of the same rounds; dashed: the most that routing can bring."
        )
        return save(figure, out, "speed", title="Speed-up by length", caption=caption)
