"""Common style of the figures of a report: sizes, colours, short numbers. Imports matplotlib only to draw a figure."""

from __future__ import annotations

from typing import Any

from headway.launcher.base.text import short_number
from headway.launcher.compare.analyse import StudyResult

# Palette of Okabe and Ito, distinguishable for colour-blind readers and in greyscale; the baseline is black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
DASHES = ("-", "--", "-.", ":")
WIDTH_IN = 10.0
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "legend.fontsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "svg.fonttype": "path",
    "figure.facecolor": "white",
}


def styles(result: StudyResult) -> dict[str, dict[str, Any]]:
    """Variant -> colour and dash pattern, the same in every figure."""
    found: dict[str, dict[str, Any]] = {result.baseline.name: {"color": "#000000", "linestyle": "-"}}
    for i, v in enumerate(result.others):
        found[v.name] = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
    return found


def engineering() -> Any:
    """Tick formatter that uses `short_number`."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda x, _: short_number(x))
