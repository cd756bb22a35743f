"""The static form of a chart, by matplotlib. Imports matplotlib only to draw a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from headway.launcher.report.charts import Axis, Chart, Panel, Rule, Series
from headway.launcher.report.plots.style import GREY, WIDTH_IN, engineering, legend_below, marker, variant_gid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(chart: Chart, *, height_in: float, share_y: bool = False, width_in: float = WIDTH_IN) -> Figure:
    """Draw the panels side by side, `height_in` high without the legend, which has one entry for each variant below.

    There is no legend if the rows of the axes are the variants.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(chart.panels), figsize=(width_in, height_in), sharey=share_y, squeeze=False, layout="constrained"
    )
    for i, (axis, panel) in enumerate(zip(axes[0], chart.panels, strict=True)):
        _panel(axis, panel, chart, y_label=i == 0 or not share_y)
    if not any(p.y.ticks for p in chart.panels):
        shown = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
        legend_below(figure, shown)
    return figure


def _panel(axis: Axes, panel: Panel, chart: Chart, *, y_label: bool) -> None:
    for group in _together(panel.series):
        if len(group) > 1:
            _seeds(axis, group, chart)
        else:
            _series(axis, group[0], chart)
    for rule in panel.rules:
        _rule(axis, rule)
    axis.set_title(panel.title)
    _scale(axis, "x", panel.x)
    _scale(axis, "y", panel.y)
    if not y_label:
        axis.set_ylabel("")


def _together(series: Sequence[Series]) -> Iterator[list[Series]]:
    """Neighbours that one artist can draw: the seeds of a variant. A study of 1,000 cells has thousands of them."""

    def kind(s: Series) -> tuple[object, ...]:
        plain = s.mark in ("thin", "ring") and all(b is None for b in (s.low, s.high, s.x_low, s.x_high))
        return (s.variant, s.mark) if plain else (id(s),)

    for _, group in groupby(series, kind):
        yield list(group)


def _seeds(axis: Axes, group: Sequence[Series], chart: Chart) -> None:
    """Thin lines or rings of one variant as one artist, with the look that `_series` gives to each."""
    from matplotlib.collections import LineCollection

    look, common = _look(group[0], chart)
    if group[0].mark == "ring":
        x, y = (np.concatenate([np.asarray(getattr(s, key), float) for s in group]) for key in ("x", "y"))
        axis.plot(x, y, marker(look), mfc="white", mec=look["color"], markersize=5, zorder=3, **common)
        return
    lines = [np.column_stack([np.asarray(s.x, float), np.asarray(s.y, float)]) for s in group]
    axis.add_collection(LineCollection(lines, linewidths=0.8, alpha=0.45, zorder=2, **look, **common))
    axis.autoscale_view()


def _look(series: Series, chart: Chart) -> tuple[dict[str, Any], dict[str, Any]]:
    """(colour and dashes, id of what the page hides with the variant)."""
    if series.variant is None:
        return {"color": GREY, "linestyle": "-"}, {}
    return dict(chart.styles[series.variant]), {"gid": variant_gid(series.variant)}


def _series(axis: Axes, series: Series, chart: Chart) -> None:
    look, common = _look(series, chart)
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    bars = {"linewidth": 2.5, "alpha": 0.55, "capstyle": "butt"}
    if series.low is not None and series.high is not None:
        low, high = np.asarray(series.low, float), np.asarray(series.high, float)
        if series.mark in ("line", "thin"):
            axis.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0, **common)
        else:
            axis.vlines(x, low, high, color=look["color"], **bars, **common)
    if series.x_low is not None and series.x_high is not None:
        axis.hlines(y, np.asarray(series.x_low), np.asarray(series.x_high), color=look["color"], **bars, **common)
    match series.mark:
        case "line":
            axis.plot(x, y, linewidth=2.2, label=series.variant or series.name, **look, **common)
        case "thin":
            axis.plot(x, y, linewidth=0.8, alpha=0.45, **look, **common)
        case "dot":
            label = series.variant or series.name
            axis.plot(x, y, marker(look), color=look["color"], markersize=7, zorder=4, label=label, **common)
        case "ring":
            axis.plot(x, y, marker(look), mfc="white", mec=look["color"], markersize=5, zorder=3, **common)
        case "triangle":
            axis.plot(x, y, "v", color=GREY, markersize=6, **common)


def _rule(axis: Axes, rule: Rule) -> None:
    line = axis.axvline if rule.axis == "x" else axis.axhline
    if rule.label:
        line(rule.at, color=GREY, linewidth=1, linestyle=(0, (1, 2)), label=rule.label)
    else:
        line(rule.at, color="black", linewidth=1.2)


def _scale(axis: Axes, which: str, data: Axis) -> None:
    import matplotlib.pyplot as plt

    scale = getattr(axis, f"{which}axis")
    getattr(axis, f"set_{which}label")(data.label)
    if data.log:
        getattr(axis, f"set_{which}scale")("log")
    if data.ticks:
        scale.set_major_locator(plt.FixedLocator([value for value, _ in data.ticks]))
        scale.set_major_formatter(plt.FixedFormatter([text for _, text in data.ticks]))
        scale.set_minor_locator(plt.NullLocator())
    elif which == "x" and not data.log:
        scale.set_major_formatter(engineering())
        scale.set_major_locator(plt.MaxNLocator(4))
    if data.low is not None:
        getattr(axis, f"set_{which}lim")(**{"left" if which == "x" else "bottom": data.low})
    if data.high is not None:
        getattr(axis, f"set_{which}lim")(**{"right" if which == "x" else "top": data.high})
    if data.ticks and which == "y":
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
