"""The data of a chart that readers work with in the page: hover, zoom, hidden variants.

A figure of a report has two forms. The static one is an SVG and a PNG by matplotlib: it is in report.md, in print, and
in the page where scripts are off. The live one is a `Chart`, which the page holds as JSON and page.js draws. How to add
the live form to a figure:

    chart = Chart(
        styles=styles(result),  # plots.style: the colour and dashes that the variant has in every figure
        panels=[
            Panel(
                x=Axis(label="training tokens", low=0),
                y=Axis(label="difference (nats per token)"),
                series=[
                    Series(variant="moa", name="mean", x=tokens, y=mean, low=low, high=high),  # a line with a band
                    Series(variant="moa", name="seed 1", x=tokens, y=one, mark="thin"),
                ],
                rules=[Rule(axis="y", at=0.0)],
            )
        ],
    )
    return Drawing(figure, title, caption, chart)  # from a function in the list of `draw_all`

A scatter with a front: for each variant one series of `mark="dot"` (with `x_low`, `x_high`, `low`, `high` where there
are intervals, and `texts` for what only the hover text shows) and one of `mark="thin"` if its points belong together;
the front itself is `Series(variant=None, name="front", mark="line", ...)`, which is grey and never hidden.
`plots.chart.draw` makes the static figure from a chart, so that both forms have the same numbers; a figure that
matplotlib draws in another way may carry a chart too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = Sequence[float] | NDArray[Any]
Mark = Literal["line", "thin", "dot", "ring", "triangle"]
DIGITS = 7
"""Significant digits of numbers in the page. A loss of 3.512345 keeps its sixth decimal."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis with its title, which contains the unit.

    `low`, `high`: the first range; None: that of the data. An axis with `low` > `high` runs the other way. `ticks`:
    fixed (value, text) pairs, for categories; without them the page chooses round numbers. `log`: all values are
    positive.
    """

    label: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    ticks: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one variant (None: of no variant) under one name, such as `mean`, `seed 1` or `FLOP ratio`.

    `x`, `y`: equally long; a value that is not finite interrupts a line. `low`, `high`: bounds of `y`, a band around a
    line and a bar through a dot. `x_low`, `x_high`: bounds of `x`, a bar through a dot. `texts`: one for each point,
    for the hover text. Marks: `line` is thick, for means; `thin` is a pale line, for seeds; `dot` is filled; `ring` and
    `triangle` are small.
    """

    variant: str | None
    name: str
    x: Numbers
    y: Numbers
    mark: Mark = "line"
    low: Numbers | None = None
    high: Numbers | None = None
    x_low: Numbers | None = None
    x_high: Numbers | None = None
    texts: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A straight line at one value of an axis, such as no difference. It has a label, or explains itself."""

    axis: Literal["x", "y"]
    at: float
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One coordinate system. Panels of a chart stand side by side, and below each other on a phone."""

    x: Axis
    y: Axis
    series: Sequence[Series]
    rules: Sequence[Rule] = ()
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Panels, and the style of each variant as `plots.style.styles` returns it: `color` and `linestyle`."""

    panels: Sequence[Panel]
    styles: Mapping[str, Mapping[str, Any]]

    def variants(self) -> list[str]:
        """Variants that have points, in the order of `styles`."""
        drawn = {s.variant for p in self.panels for s in p.series}
        return [name for name in self.styles if name in drawn]


class Drawing(NamedTuple):
    """What a function of `plots.study.draw_all` returns. A tuple of the first three fields does as well."""

    figure: Figure
    title: str
    caption: str
    chart: Chart | None = None


def chart_json(chart: Chart) -> str:
    """JSON for page.js. Numbers have 7 significant digits; what is not finite becomes null."""
    panels = [
        {
            "title": p.title,
            "x": _axis(p.x),
            "y": _axis(p.y),
            "series": [_series(s) for s in p.series],
            "rules": [{"axis": r.axis, "at": r.at, "label": r.label} for r in p.rules],
        }
        for p in chart.panels
    ]
    return json.dumps({"variants": chart.variants(), "panels": panels}, separators=(",", ":"), allow_nan=False)


def _axis(axis: Axis) -> dict[str, Any]:
    return {
        "label": axis.label,
        "low": axis.low,
        "high": axis.high,
        "log": axis.log,
        "ticks": [list(tick) for tick in axis.ticks],
    }


def _series(series: Series) -> dict[str, Any]:
    found: dict[str, Any] = {"variant": series.variant, "name": series.name, "mark": series.mark}
    for key in ("x", "y", "low", "high", "x_low", "x_high"):
        values = getattr(series, key)
        if values is not None:
            found[key] = [_number(float(v)) for v in values]
    if series.texts is not None:
        found["texts"] = list(series.texts)
    lengths = {len(v) for v in found.values() if isinstance(v, list)}
    assert len(lengths) == 1, f"{series.variant} {series.name}: lists of different lengths"
    return found


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded
