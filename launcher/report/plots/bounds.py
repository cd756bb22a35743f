"""Figure: difference in loss against what FLOPs allow at a larger model.

Imports matplotlib only to draw a figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headway.launcher.base.text import short_number
from headway.launcher.compare.goal import largest_known
from headway.launcher.compare.simultaneous import Simultaneous
from headway.launcher.report.charts import Axis, Chart, Drawing, Panel, Rule, Series
from headway.launcher.report.plots.chart import draw


def draw_bounds(
    record: Mapping[str, Any],
    sizes: Sequence[tuple[str, Mapping[str, Simultaneous]]],
    looks: Mapping[str, Mapping[str, Any]],
    unit: str,
) -> Drawing | None:
    """One panel for each length of `bounds`; None without `bounds` or differences. `sizes`: by increasing size."""
    bounds, found = record.get("bounds"), largest_known(sizes)
    if not bounds or not found:
        return None
    base, goal = record["baseline"], bounds.get("goal", {})
    panels = []
    for n in map(str, bounds["seq_len"]):
        series = []
        for variant, at in found.items():
            if variant not in bounds["variants"]:
                continue
            d, speed_up = at.difference, bounds["variants"][variant]["speed_up"][n]
            low, high = ([d.mean if end is None else end] for end in (d.low, d.high))
            texts = [f"at {at.size}" if at.size else ""]
            series.append(
                Series(
                    variant=variant,
                    name="difference",
                    x=[speed_up],
                    y=[d.mean],
                    low=low,
                    high=high,
                    mark="dot",
                    texts=texts,
                )
            )
        rules = [Rule(axis="y", at=0.0)]
        rules += [Rule(axis="x", at=goal[n], label="speed of the goal")] if n in goal else []
        x = Axis(label=f"times {base}'s speed that FLOPs allow, {int(n):,} tokens")
        y = Axis(label=f"loss minus {base}'s ({unit})\n\u2190 better          worse \u2192")
        panels.append(Panel(x=x, y=y, series=series, rules=rules))
    chart = Chart(styles=looks, panels=panels)
    params = short_number(bounds["variants"][base]["num_params"])
    where = " at the largest size at which the variant has one" if any(at.size for at in found.values()) else ""
    caption = (
        f"Across: counted in a model of {params} parameters, an upper bound and not a speed. Up: paired difference "
        f"with its 95 % interval (for all variants of a size at once){where}; no bar with one seed."
    )
    if goal:
        caption += " The goal lies below 0 and right of the dotted line, at every length."
    return Drawing(draw(chart, height_in=4.0, share_y=True), "Loss against what FLOPs allow", caption, chart)
