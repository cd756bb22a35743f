"""Plans of the models and layouts in `yaml/`, as JSON and Markdown: `python -m headway.launcher.plan.tables`.

All numbers are computed, none is measured. Speeds are estimates from datasheets.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from headway.launcher.plan.hardware import GIB, find_gpu, find_network
from headway.launcher.plan.layouts import Layout, plan_layout, search
from headway.launcher.plan.planner import cost_of, with_vocabulary
from headway.launcher.plan.text import assumption_lines, describe, layout_figures, rounded
from headway.launcher.spec.load import load_spec

GPU, NETWORK = "h100", "ndr"
FAR = 512
"""Number of GPUs of the second table, for which `yaml/layouts` has no file."""

Row = dict[str, Any]


def shipped(root: Path) -> list[Row]:
    """A row for each file of `yaml/layouts`, sorted by model size and GPUs."""
    gpu, network = find_gpu(GPU), find_network(NETWORK)
    rows = []
    for file in (root / "yaml" / "layouts").glob("*.yaml"):
        spec = with_vocabulary(load_spec(file).spec)
        useful = 3 * cost_of(spec)["flops_per_token_useful"]
        rows.append(_row(plan_layout(spec, gpu, network, useful_flops_per_token=useful), f"yaml/layouts/{file.name}"))
    return sorted(rows, key=lambda row: (row["num_params"], row["gpus"]))


def far(root: Path) -> list[Row]:
    """Layouts on `FAR` GPUs: the layout of each kind with the highest expected speed.

    Includes every model whose global batch has at least one sequence per GPU.
    """
    gpu, network = find_gpu(GPU), find_network(NETWORK)
    rows = []
    for file in (root / "yaml" / "models").glob("*.yaml"):
        spec = with_vocabulary(load_spec(file).spec)
        if spec.train.global_batch < FAR:
            continue
        useful = 3 * cost_of(spec)["flops_per_token_useful"]
        found = search(spec, gpus=FAR, gpu=gpu, network=network, useful_flops_per_token=useful)
        kinds: dict[tuple[bool, bool], Layout] = {}
        for layout in found.best:
            kinds.setdefault((layout.spec.parallel.tensor > 1, layout.spec.parallel.pipeline > 1), layout)
        rows += [_row(layout, f"yaml/models/{file.name} {' '.join(layout.overrides)}") for layout in kinds.values()]
    return sorted(rows, key=lambda row: (row["num_params"], -row["tokens_per_s_estimated"][1]))


def _row(layout: Layout, spec: str) -> Row:
    figures = layout_figures(layout, find_gpu(GPU), find_network(NETWORK))
    return {
        "spec": spec,
        "name": layout.spec.name,
        "gpus": layout.spec.launch.world_size,
        "num_params": cost_of(layout.spec)["num_params"],
        "described": describe(layout),
        **figures,
    }


def markdown(tables: dict[str, list[Row]]) -> str:
    """Both tables, preceded by their assumptions."""
    lines = ["# Plans", "", "Computed by `make plans`; none of these layouts was run. GiB and GB are per rank.", ""]
    lines += assumption_lines(find_gpu(GPU), find_network(NETWORK))
    titles = {"shipped": "Layouts in yaml/layouts", "far": f"Layouts on {FAR} GPUs"}
    for name, rows in tables.items():
        lines += ["", f"## {titles[name]}", ""]
        lines += [
            "| model | GPUs | layout | peak GiB | sent GB per step | bubble | tokens/s, estimated | MFU |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_markdown_row(row) for row in rows]
    return "\n".join(lines) + "\n"


def _markdown_row(row: Row) -> str:
    slow, fast = row["tokens_per_s_estimated"]
    low, high = row["mfu_causal_estimated"]
    cells = [
        row["name"],
        f"{row['gpus']}",
        row["described"],
        f"{row['memory_bytes']['peak'] / GIB:.1f}",
        f"{sum(row['sent_bytes_per_step'].values()) / 1e9:.2f}",
        f"{row['pipeline_bubble']:.1%}",
        f"{rounded(slow)} to {rounded(fast)}",
        f"{low:.0%} to {high:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def tables(root: Path) -> dict[str, list[Row]]:
    """Table name -> rows, as in the JSON file. `root`: the repository."""
    return {"shipped": shipped(root), "far": far(root)}


def main(root: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    found = tables(root)
    content = {"command": "make plans", "assumptions": assumption_lines(find_gpu(GPU), find_network(NETWORK)), **found}
    (out / "plans.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "plans.md").write_text(markdown(found))


if __name__ == "__main__":
    main(Path.cwd(), Path(sys.argv[1]))
