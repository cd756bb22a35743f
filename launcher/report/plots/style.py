"""Common style of the figures of a report: sizes, colours, legends, short numbers.

Imports matplotlib only to draw a figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headway.launcher.base.text import short_number
from headway.launcher.compare.analyse import StudyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Palette of Okabe and Ito, distinguishable for colour-blind readers and in greyscale; the baseline is black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)))
"""With `COLOURS`, 35 styles beside the baseline's. The last one is a dash and two dots."""
MARKERS: dict[Any, str] = dict(zip(DASHES, ("o", "s", "D", "^", "v"), strict=True))
"""Points of variants of one colour differ as their dashes do."""
GREY = "#777777"
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
    # Text stays text, so that it can be searched and copied. DejaVu Sans, with which matplotlib measures it, is wider
    # than what browsers take instead: text keeps its place.
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "figure.facecolor": "white",
}


def styles(result: StudyResult) -> dict[str, dict[str, Any]]:
    """Variant -> colour and dash pattern, the same in every figure."""
    return styles_of(result.baseline.name, [v.name for v in result.others])


def styles_of(baseline: str, others: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Variant -> colour and dash pattern. The others differ by their order."""
    found: dict[str, dict[str, Any]] = {baseline: {"color": "#000000", "linestyle": "-"}}
    for i, name in enumerate(others):
        found[name] = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
    return found


def marker(look: Mapping[str, Any]) -> str:
    """Mark of the points of a variant, from its style."""
    return MARKERS.get(look.get("linestyle", "-"), "o")


def variant_gid(name: str) -> str:
    """Id of everything in a figure that belongs to a variant. The page hides what has it together with the variant."""
    return f"variant:{name}"


def legend_below(figure: Figure, shown: Mapping[str, Any]) -> None:
    """Add a legend (label -> handle) below the axes, in as many columns as its width holds, and make room for it."""
    if not shown:
        return
    longest = max(len(label) for label in shown)
    width, height = figure.get_size_inches()
    # At 11 points, a character is at most 0.1 inches wide; line and gaps take 0.65 inches.
    columns = max(1, min(len(shown), int(width / (0.65 + 0.1 * longest))))
    lines = -(-len(shown) // columns)
    figure.set_size_inches(width, height + 0.25 * lines)
    legend = figure.legend(
        list(shown.values()), list(shown), loc="outside lower center", ncols=columns, frameon=False, handlelength=2.6
    )
    for text, handle, name in zip(legend.get_texts(), legend.legend_handles, shown, strict=True):
        text.set_gid(variant_gid(name))
        if handle is not None:
            handle.set_gid(variant_gid(name))


def engineering() -> Any:
    """Tick formatter that uses `short_number`."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda x, _: short_number(x))
