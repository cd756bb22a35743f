"""Figures of tuned keys: the losses of trials over the values that were tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headway.launcher.compare.ladder.read import Search, Tuning
from headway.launcher.report.charts import Axis, Chart, Drawing, Panel, Series
from headway.launcher.report.plots.chart import draw
from headway.launcher.report.plots.style import WIDTH_IN


def draw_tuning(tuning: Tuning, looks: Mapping[str, Any], unit: str) -> dict[str, Drawing | None]:
    """Name -> figure of every tuned key. `unit`: of the losses."""
    keys = list(dict.fromkeys(s.key for s in tuning.searches))
    tried = {key: [s for s in tuning.searches if s.key == key and s.trials] for key in keys}
    return {f"tuning-{key}": _tuning(key, found, looks, unit) for key, found in tried.items()}


def _tuning(key: str, searches: Sequence[Search], looks: Mapping[str, Any], unit: str) -> Drawing | None:
    sizes = list(dict.fromkeys(s.size for s in searches))
    if not sizes:
        return None
    positive = all(value > 0 for s in searches for value, _, _ in s.trials)
    panels = []
    for size in sizes:
        series = [one for s in searches if s.size == size for one in _tuned(s)]
        label = f"mean loss of trials ({unit})" if size == sizes[0] else ""
        values = sorted({value for s in searches if s.size == size for value, _, _ in s.trials})
        x_axis = Axis(label=key, log=positive, ticks=[(value, f"{value:g}") for value in values])
        panels.append(Panel(title=size, x=x_axis, y=Axis(label=label), series=series))
    chart = Chart(styles=looks, panels=panels)
    caption = (
        "Lines: mean over the seeds of the trials; hollow: single trials; filled: the chosen value, at the lowest mean."
    )
    return Drawing(
        draw(chart, height_in=3.8, width_in=max(WIDTH_IN, 3.4 * len(sizes))), f"Tuning of {key}", caption, chart
    )


def _tuned(search: Search) -> list[Series]:
    curve = search.curve()
    trials = [(value, seed, loss) for value, seed, loss in search.trials if loss is not None]
    x, y = [value for value, _, _ in trials], [loss for _, _, loss in trials]
    texts = [f"seed {seed}" for _, seed, _ in trials]
    found = [Series(variant=search.variant, name="trial", x=x, y=y, mark="ring", texts=texts)]
    if not curve:
        return found if trials else []
    values, means = [value for value, _ in curve], [loss for _, loss in curve]
    found.append(Series(variant=search.variant, name="mean", x=values, y=means))
    chosen = search.chosen
    if chosen is not None and values[0] <= chosen <= values[-1]:
        found.append(Series(variant=search.variant, name="chosen", x=[chosen], y=[min(means)], mark="dot"))
    return found
