"""Figures: losses at annealed ends against costs, with their Pareto fronts, and differences over tokens.

Imports matplotlib only to draw a figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from headway.launcher.base.text import short_number
from headway.launcher.compare.analyse import CellResult, StudyResult
from headway.launcher.compare.cell_results import FULL
from headway.launcher.compare.training_flops import training_flops
from headway.launcher.report.charts import Axis, Chart, Drawing, Panel, Rule, Series
from headway.launcher.report.plots.chart import draw
from headway.launcher.report.plots.style import WIDTH_IN, engineering, styles, variant_gid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_IN_ONE = 8
"""Variants whose bands can be told apart in one panel. More of them get a panel each."""
EARLY = 0.2
"""Share of the tokens whose differences do not extend the axis."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The mean over the finished seeds of one variant and budget. `loss` in the unit of the study."""

    budget: float
    tokens: int
    seconds: float | None
    flops: float
    loss: float


def points_of(result: StudyResult) -> dict[str, list[Point]]:
    """Variant -> its points by increasing budget. Training FLOPs are useful ones, three times those of the forward."""
    found: dict[str, list[Point]] = {}
    cells = [c for c in (*result.short_cells, *result.cells) if c.done and c.loss is not None]
    for v in result.variants:
        for budget in sorted({c.budget for c in cells}):
            mine = [c for c in cells if c.variant == v.name and c.budget == budget]
            tokens = result.tokens_of(v.name) if budget == FULL else result.effective.tokens.get(budget)
            if mine and tokens is not None:
                flops = float(training_flops(v.cost, tokens))
                seconds = _seconds(result, v.name, mine, tokens)
                loss = mean(c.loss for c in mine if c.loss is not None)
                found.setdefault(v.name, []).append(
                    Point(budget=budget, tokens=tokens, seconds=seconds, flops=flops, loss=loss)
                )
    return found


def _seconds(result: StudyResult, variant: str, cells: Sequence[CellResult], tokens: int) -> float | None:
    """Training seconds of `tokens`: the mean of cells that trained alone, or by the speed of the timing part."""
    if result.speeds.source != "cells":
        return result.speeds.seconds(variant, tokens)
    times = [seconds for c in cells if (seconds := _seconds_at(c, tokens)) is not None]
    return mean(times) if times else None


def _seconds_at(cell: CellResult, tokens: int) -> float | None:
    curve = cell.record.validation
    at = [float(s) for s, t in zip(curve.train_s, curve.tokens, strict=True) if t == tokens and math.isfinite(s)]
    return at[-1] if at else None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, loss) that no other point beats in one of both without being worse in the other."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(set(points)):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def draw_pareto(result: StudyResult) -> Drawing | None:
    """Losses at annealed ends against training seconds, FLOPs and KV bytes; None with fewer than two variants."""
    points = points_of(result)
    if len(points) < 2:
        return None
    kv = {v.name: float(v.cost["kv_bytes_per_token"]) for v in result.variants}
    timed = {name: [(p.seconds, p) for p in found if p.seconds is not None] for name, found in points.items()}
    counted = {name: [(p.flops, p) for p in found] for name, found in points.items()}
    stored = {name: [(kv[name], p) for p in found if p.budget == FULL] for name, found in points.items()}
    panels = [_cost_panel("training seconds", timed, result.unit)] if result.speeds.source != "missing" else []
    panels += [
        _cost_panel("useful training FLOPs", counted, result.unit),
        _cost_panel("KV bytes per token", stored, result.unit),
    ]
    chart = Chart(styles=styles(result), panels=panels)
    several = len(result.effective.tokens) > 1
    ends = "at the end of every budget" if several else "at the end of training"
    caption = (
        f"Mean validation loss over seeds, {ends}, where the learning rate has decayed"
        f"{'; KV bytes: of the full budget' if several else ''}. Grey steps: Pareto front, what no other point "
        "beats in cost without a higher loss. Points hold for these seeds: the front has no interval."
    )
    return Drawing(draw(chart, height_in=3.7, share_y=True), "Loss against cost", caption, chart)


def _cost_panel(label: str, costs: dict[str, list[tuple[float, Point]]], unit: str) -> Panel:
    series = [_steps(pareto_front([(x, p.loss) for found in costs.values() for x, p in found]))]
    for name, found in costs.items():
        x, y = [x for x, _ in found], [p.loss for _, p in found]
        texts = [f"budget {p.budget:g}: {short_number(p.tokens)} tokens" for _, p in found]
        if len(found) > 1:
            series.append(Series(variant=name, name="budgets", x=x, y=y, mark="thin"))
        if found:
            series.append(Series(variant=name, name="mean over seeds", x=x, y=y, mark="dot", texts=texts))
    return Panel(x=Axis(label=label, low=0), y=Axis(label=f"validation loss ({unit})"), series=series)


def _steps(front: Sequence[tuple[float, float]]) -> Series:
    """A stair: between two points of the front, the loss of the cheaper one is what that cost can reach."""
    x, y = list[float](), list[float]()
    for cost, loss in front:
        if y:
            x.append(cost)
            y.append(y[-1])
        x.append(cost)
        y.append(loss)
    return Series(variant=None, name="Pareto front", x=x, y=y)


# ---------------------------------------------------------------- differences over tokens


def draw_trend(result: StudyResult) -> Drawing | None:
    """Differences to the baseline at each common validation, with simultaneous intervals; None with fewer than two."""
    trend = result.trend
    found = {} if trend is None else {v.name: trend.of(v.name) for v in result.others}
    found = {name: points for name, points in found.items() if len(points) > 1}
    if not found:
        return None
    series = []
    for name, points in found.items():
        tokens, differences = [t for t, _ in points], [d for _, d in points]
        bands = all(d.low is not None for d in differences)
        low, high = ([getattr(d, end) for d in differences] if bands else None for end in ("low", "high"))
        means = [d.mean for d in differences]
        series.append(Series(variant=name, name="mean over seeds", x=tokens, y=means, low=low, high=high))
    low, high = _range(series)
    x = Axis(label="training tokens", low=0)
    y = Axis(label=f"validation loss minus {result.baseline.name}'s\n({result.unit})", low=low, high=high)
    panel = Panel(x=x, y=y, series=series, rules=[Rule(axis="y", at=0.0)])
    chart = Chart(styles=styles(result), panels=[panel])
    one = len(series) <= MOST_IN_ONE
    figure = draw(chart, height_in=3.7) if one else _multiples(chart)
    caption = (
        "Difference to the baseline at every validation that all finished runs have, mean over seeds; below 0 is "
        "better. Bands: 95 % intervals that hold for all variants at once, at one token count; the course of a band is "
        f"no test. The first {EARLY:.0%} of the tokens may lie outside of the axis."
    )
    return Drawing(figure, f"Differences to {result.baseline.name} over training", caption, chart)


def _range(series: Sequence[Series]) -> tuple[float, float]:
    """Limits of the axis: zero, and means and intervals after the first part of the tokens."""
    shown = [0.0]
    for s in series:
        x = list(s.x)
        late = [i for i, tokens in enumerate(x) if tokens >= EARLY * x[-1]]
        for values in (s.y, s.low, s.high):
            if values is not None:
                every = list(values)
                shown += [every[i] for i in late if math.isfinite(every[i])]
    pad = 0.05 * max(max(shown) - min(shown), 1e-4)
    return min(shown) - pad, max(shown) + pad


def _multiples(chart: Chart) -> Figure:
    """One small panel for each variant, on common axes."""
    import matplotlib.pyplot as plt

    panel, columns = chart.panels[0], 4
    lines = -(-len(panel.series) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(WIDTH_IN, 1.9 * lines), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, s in zip(axes.flat, panel.series, strict=False):
        assert s.variant is not None
        gid, colour, x = variant_gid(s.variant), chart.styles[s.variant]["color"], list(s.x)
        axis.set_gid(gid)
        axis.axhline(0.0, color="black", linewidth=1.2)
        if s.low is not None and s.high is not None:
            axis.fill_between(x, list(s.low), list(s.high), color=colour, alpha=0.15, linewidth=0, gid=gid)
        axis.plot(x, list(s.y), color=colour, linewidth=2.2, gid=gid)
        axis.set_title(s.variant)
        axis.set_xlim(left=0)
        axis.set_ylim(panel.y.low, panel.y.high)
        axis.xaxis.set_major_formatter(engineering())
        axis.xaxis.set_major_locator(plt.MaxNLocator(3))
    for axis in list(axes.flat)[len(panel.series) :]:
        axis.set_visible(False)
    figure.supxlabel(panel.x.label)
    figure.supylabel(panel.y.label.replace("\n", " "))
    return figure
