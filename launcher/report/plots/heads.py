"""Figures of routers and heads: load per expert, and similarity of the heads of a group over training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from headway.launcher.compare.analyse import StudyResult, seed_mean
from headway.launcher.report.plots.style import WIDTH_IN, engineering, styles
from headway.launcher.run.records_heads import Router

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"c_w": "C_W: |cosine| of weights", "c_o": "C_o: cosine of outputs", "cka": "CKA of outputs"}


def draw_heads(result: StudyResult) -> tuple[Figure, str, str] | None:
    """(figure, title, caption): head similarity over training, all variants; None if no variant has two records."""
    import matplotlib.pyplot as plt

    variants = [v for v in result.variants if any(h.tokens.size > 1 for h in v.heads.values())]
    if not variants:
        return None
    figure, axes = plt.subplots(1, len(PANELS), figsize=(WIDTH_IN, 3.8), layout="constrained")
    for axis, (key, label) in zip(axes, PANELS.items(), strict=True):
        for v in variants:
            points = [(h.tokens, h.mean(key)) for h in v.heads.values()]
            if len(points) > 1:
                for x, y in points:
                    axis.plot(x, y, linewidth=0.8, alpha=0.45, **styles(result)[v.name])
            mean = seed_mean(points)
            if mean is not None:
                axis.plot(*mean, linewidth=2.2, label=v.name, **styles(result)[v.name])
        axis.set_xlabel("training tokens")
        axis.set_title(label)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(engineering())
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, max(1, len(labels))), frameon=False)
    caption = (
        "Likeness of the heads (or value experts) of a group on the probe batch, mean over pairs, groups and layers; "
        "bold: mean over seeds. High: heads do the same."
    )
    return figure, "Likeness of heads over training", caption


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
        for (row, column), value in np.ndenumerate(load):
            colour = "white" if abs(value - 1) > 0.7 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
    return image
