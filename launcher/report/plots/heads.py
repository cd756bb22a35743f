"""Figures of routers and heads: load per expert, and similarity of the heads of a group over training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from headway.launcher.compare.analyse import StudyResult, seed_mean
from headway.launcher.report.charts import Axis, Chart, Drawing, Panel, Series
from headway.launcher.report.plots.chart import draw
from headway.launcher.report.plots.style import WIDTH_IN, styles, variant_gid
from headway.launcher.run.records_heads import Router

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"c_w": "C_W: |cosine| of weights", "c_o": "C_o: cosine of outputs", "cka": "CKA of outputs"}


def draw_heads(result: StudyResult) -> Drawing | None:
    """Head similarity over training, all variants; None if no variant has two records."""
    variants = [v for v in result.variants if any(h.tokens.size > 1 for h in v.heads.values())]
    if not variants:
        return None
    panels = []
    for key, label in PANELS.items():
        points = {v.name: {s: (h.tokens, h.mean(key)) for s, h in v.heads.items()} for v in variants}
        series = [s for name, seeds in points.items() for s in seed_series(name, seeds)]
        panels.append(Panel(title=label, x=Axis(label="training tokens", low=0), y=Axis(label=""), series=series))
    chart = Chart(styles=styles(result), panels=panels)
    caption = (
        "Likeness of the heads (or value experts) of a group on the probe batch, mean over pairs, groups and layers; "
        "bold: mean over seeds. High: heads do the same."
    )
    return Drawing(draw(chart, height_in=3.5), "Likeness of heads over training", caption, chart)


def seed_series(variant: str, seeds: Mapping[int, tuple[Any, Any]]) -> list[Series]:
    """A thin line for each of several seeds (seed -> x and y), and a thick one for their mean or the only seed."""
    mean = seed_mean(list(seeds.values()))
    several = len(seeds) > 1
    lines = seeds.items() if several else ()
    thin = [Series(variant=variant, name=f"seed {s}", x=x, y=y, mark="thin") for s, (x, y) in lines]
    if mean is None:
        return thin
    name = f"mean of {len(seeds)} seeds" if several else f"seed {next(iter(seeds))}"
    return [*thin, Series(variant=variant, name=name, x=mean[0], y=mean[1])]


def draw_routers(result: StudyResult) -> tuple[Figure, str, str] | None:
    """(figure, title, caption): a heat map of router loads for each variant; None without routers."""
    import matplotlib.pyplot as plt

    panels = [
        (v.name, name, [r for r in v.routers if r.name == name])
        for v in result.variants
        for name in sorted({r.name for r in v.routers})
    ]
    # Skip routers with one expert, and those whose number of experts differs by layer: they have no common axis.
    panels = [p for p in panels if {r.load.shape[1] for r in p[2]} - {1} and len({r.load.shape[1] for r in p[2]}) == 1]
    if not panels:
        return None
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(sum(r.load.shape[0] for r in routers) for _, _, routers in panels)
    height = lines * min(9.0, 1.2 + 0.28 * tallest)
    figure, axes = plt.subplots(
        lines, columns, figsize=(WIDTH_IN, max(2.6, height)), squeeze=False, layout="constrained"
    )
    image = None
    for axis, (variant, name, routers) in zip(axes.flat, panels, strict=False):
        image = _heat_map(axis, routers)
        label = name.replace("_", " ").removesuffix("router").strip()
        axis.set_gid(variant_gid(variant))
        # Two lines, so that long names do not overlap.
        axis.set_title(f"{variant}\n{label} router".replace("\n ", "\n"))
    for first in axes[:, 0]:
        first.set_ylabel("layer.group")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    assert image is not None, "there is a panel"
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, ticks=[0, 0.5, 1, 1.5, 2])
    bar.ax.set_yticklabels(["0", "0.5", "1 (even)", "1.5", "\u2265 2"])
    caption = (
        "Load of each expert (query head, or value/output expert) over an even share, last tenth of training, mean "
        "over seeds. Rows: layer and group."
    )
    return figure, "Router load", caption


def _heat_map(axis: Axes, routers: list[Router]) -> Any:
    load = np.concatenate([r.load for r in routers]) * routers[0].load.shape[1]
    image = axis.imshow(np.clip(load, 0, 2), cmap="PuOr", vmin=0, vmax=2, aspect="auto")
    labels = [
        f"{r.layer.removeprefix('layer_').lstrip('0') or '0'}.{g}" for r in routers for g in range(r.load.shape[0])
    ]
    every = max(1, len(labels) // 24)
    axis.set_yticks(range(0, len(labels), every), labels[::every])
    axis.set_xticks(range(load.shape[1]) if load.shape[1] <= 16 else range(0, load.shape[1], 8))
    axis.set_xlabel("expert")
    axis.grid(visible=False)
    if load.shape[1] <= 8 and len(labels) <= 24:
        # Panels are equally wide, so more experts leave less room for each number.
        digits, size = (2, 9) if load.shape[1] <= 4 else (1, 7)
        for (row, column), value in np.ndenumerate(load):
            colour = "white" if abs(value - 1) > 0.7 else "black"
            axis.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=size, color=colour)
    return image
