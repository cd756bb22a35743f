"""Figures of a report, each as SVG (embedded in the page) and PNG. Imports matplotlib only to draw a figure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headway.launcher.compare.analyse import StudyResult, VariantResult
from headway.launcher.compare.ladder.read import Tuning
from headway.launcher.compare.training_flops import training_flops
from headway.launcher.report.charts import Axis, Chart, Drawing, Panel, Rule, Series
from headway.launcher.report.plots.bounds import draw_bounds
from headway.launcher.report.plots.chart import draw
from headway.launcher.report.plots.effective import draw_pareto, draw_trend
from headway.launcher.report.plots.heads import draw_heads, draw_routers, seed_series
from headway.launcher.report.plots.style import STYLE, styles
from headway.launcher.report.plots.tuning import draw_tuning
from headway.launcher.report.plots.uptraining import draw_uptraining
from headway.launcher.run.records import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EARLY = 0.2
"""Share of the tokens whose losses do not extend the axis: the initial drop is the same for all and hides the rest."""

ENOUGH = 4
"""Validations of every run with which the figure of losses shows validation losses."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn figure. `svg` and `png` are file names in the folder of the study. `chart`: its live form in the page."""

    title: str
    caption: str
    svg: str
    png: str
    chart: Chart | None = None


def draw_all(result: StudyResult, tuning: Tuning) -> list[Plot]:
    """Draw all figures that have data into the folder of the study."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    functions: dict[str, Callable[[StudyResult], Drawing | tuple[Figure, str, str] | None]] = {
        "loss": _loss,
        "effects": _effects,
        "trend": draw_trend,
        "pareto": draw_pareto,
        "heads": draw_heads,
        "routers": draw_routers,
        "uptraining": draw_uptraining,
    }
    with plt.rc_context({**STYLE, "svg.hashsalt": str(result.record["study"])}):
        for name, draw_one in functions.items():
            made = draw_one(result)
            if made is None:
                continue
            figure, title, caption, chart = made if isinstance(made, Drawing) else Drawing(*made)
            drawn.append(save(figure, result.out, name, title=title, caption=caption, chart=chart))
        several = draw_tuning(tuning, styles(result), result.unit)
        differences = [("", result.comparison.differences)]
        several["bounds"] = draw_bounds(result.record, differences, styles(result), result.unit)
        for name, made in several.items():
            if made is not None:
                figure, title, caption, chart = made
                drawn.append(save(figure, result.out, name, title=title, caption=caption, chart=chart))
    return drawn


def save(figure: Figure, folder: Path, name: str, *, title: str, caption: str, chart: Chart | None = None) -> Plot:
    """Write a figure as NAME.svg and NAME.png and close it."""
    import matplotlib.pyplot as plt

    figure.set_layout_engine("constrained", w_pad=0.12)
    for kind in ("svg", "png"):
        # Omit the date, so that the same numbers give the same file.
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(folder / f"{name}.{kind}", dpi=170, metadata=metadata)
        figure.set_layout_engine("none")  # the first file has laid it out
    plt.close(figure)
    return Plot(title=title, caption=caption, svg=f"{name}.svg", png=f"{name}.png", chart=chart)


def inline_svg(path: Path) -> str:
    """The <svg> element of a file, for a page that holds several.

    Prolog and metadata, which contain external addresses, are left out. Ids start with the name of the file, so that
    they differ between figures; what belongs to a variant gets `data-variant`, since an id may stand only once.
    """
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    start, end = text.find("<metadata>"), text.find("</metadata>")
    if start >= 0:
        text = text[:start] + text[end + len("</metadata>") :]
    text = re.sub(r' id="variant:([^"]*)"', r' data-variant="\1"', text)
    for before in (' id="', "url(#", 'href="#'):
        text = text.replace(before, f"{before}{path.stem}.")
    return text.strip()


# ---------------------------------------------------------------- loss against tokens, FLOPs, seconds


def curves(result: StudyResult) -> tuple[str, dict[str, list[Curve]]]:
    """(label, variant -> one curve per finished seed): validation with `ENOUGH` points, else smoothed training."""
    done = [c for c in result.cells if c.done]
    validated = bool(done) and min(len(c.record.validation) for c in done) >= ENOUGH
    by_variant: dict[str, list[Curve]] = {}
    for c in done:
        curve = c.record.validation if validated else c.steps.curve
        by_variant.setdefault(c.variant, []).append(curve)
    return ("validation loss" if validated else "training loss (running mean)"), by_variant


def _loss(result: StudyResult) -> Drawing | None:
    what, by_variant = curves(result)
    if not any(len(c) > 1 for found in by_variant.values() for c in found):
        return None
    of_variant = {v.name: v.cost for v in result.variants}
    panels: list[tuple[str, Callable[[str, Curve], Any]]] = [
        ("training tokens", lambda _, c: c.tokens),
        ("useful training FLOPs", lambda name, c: training_flops(of_variant[name], c.tokens)),
    ]
    if (seconds_of := _seconds_of(result)) is not None:
        panels.append(("training seconds", seconds_of))
    y_axis, rules, note = _loss_axis(by_variant, result.card("unigram_entropy_nats"), result.unit)
    chart = Chart(
        styles=styles(result),
        panels=[
            Panel(x=Axis(label=label, low=0), y=y_axis, series=_loss_series(result, by_variant, x_of), rules=rules)
            for label, x_of in panels
        ],
    )
    figure = draw(chart, height_in=3.8, share_y=True)
    seeds = max(len(found) for found in by_variant.values())
    lines = "bold: mean over seeds; thin: each seed" if seeds > 1 else "one seed"
    caption = f"{what.capitalize()}; {lines}. {note}"
    costs = "tokens, FLOPs and seconds" if len(panels) == 3 else "tokens and FLOPs"
    return Drawing(figure, f"Loss against {costs}", caption.strip(), chart)


def _seconds_of(result: StudyResult) -> Callable[[str, Curve], Any] | None:
    """(variant, curve) -> training seconds: as recorded, or by the speeds of the timing part; None without speeds."""
    speeds = result.speeds
    if speeds.source == "cells":
        return lambda _, c: c.train_s
    if speeds.source == "timing":
        return lambda name, c: c.tokens * (speeds.seconds(name, 1) or math.nan)
    return None


def _loss_series(
    result: StudyResult, by_variant: dict[str, list[Curve]], x_of: Callable[[str, Curve], Any]
) -> list[Series]:
    series = []
    for name, found in by_variant.items():
        seeds = [c.seed for c in result.cells if c.done and c.variant == name]
        series += seed_series(name, {s: (x_of(name, c), c.loss) for s, c in zip(seeds, found, strict=True) if len(c)})
    return series


def _loss_axis(by_variant: dict[str, list[Curve]], unigram: float | None, unit: str) -> tuple[Axis, list[Rule], str]:
    """(axis without the initial drop, unigram entropy if it is in the axis, what the caption says of both)."""
    found = [c for group in by_variant.values() for c in group if len(c)]
    lows = [float(np.nanmin(c.loss)) for c in found]
    tops = [float(np.nanmax(c.loss[c.tokens >= EARLY * c.tokens[-1]])) for c in found]
    low, top = min(lows), max(tops)
    pad = 0.05 * max(top - low, 1e-3)
    hidden = any(float(np.nanmax(c.loss)) > top + pad for c in found)
    notes = [f"The first {EARLY:.0%} of the tokens may lie above the axis."] if hidden else []
    rules = []
    if unigram is not None and math.isfinite(unigram):
        if unigram <= top + pad:
            rules = [Rule(axis="y", at=unigram, label="unigram entropy")]
        else:
            notes.append(
                f"The unigram entropy of the validation text, {unigram:.2f} nats per token, is above the axis."
            )
    return Axis(label=f"loss ({unit})", low=low - pad, high=top + pad), rules, " ".join(notes)


# ---------------------------------------------------------------- differences to the baseline


def _effects(result: StudyResult) -> Drawing | None:
    rows = [v for v in result.others if v.difference is not None or v.speed_ratio is not None]
    if not rows:
        return None
    base = result.baseline
    losses: list[Series] = []
    speeds: list[Series] = []
    one = "round" if result.speeds.source == "timing" else "seed"
    for y, v in enumerate(rows):
        paired = {s: v.losses[s] - base.losses[s] for s in sorted(v.losses.keys() & base.losses.keys())}
        losses += _estimate_series(y, v.name, v.difference, paired)
        both = sorted(v.speeds.keys() & base.speeds.keys())
        ratios = {s: v.speeds[s].tokens_per_s / base.speeds[s].tokens_per_s for s in both}
        speeds += _estimate_series(y, v.name, v.speed_ratio, ratios, one=one)
        name = f"{base.name}'s useful FLOPs over its own"
        speeds.append(Series(variant=v.name, name=name, x=[flop_ratio(v, base)], y=[y - 0.24], mark="triangle"))
    low, high, cut = _ratio_range(rows, base)
    variants = Axis(label="", low=len(rows) - 0.5, high=-0.5, ticks=[(float(y), v.name) for y, v in enumerate(rows)])
    loss_axis = Axis(label=f"validation loss minus {base.name}'s ({result.unit})\n\u2190 better          worse \u2192")
    speed_label = f"tokens per second over {base.name}'s\n\u2190 slower          faster \u2192"
    speed_axis = Axis(label=speed_label, low=low, high=high)
    chart = Chart(
        styles=styles(result),
        panels=[
            Panel(x=loss_axis, y=variants, series=losses, rules=[Rule(axis="x", at=0)]),
            Panel(x=speed_axis, y=variants, series=speeds, rules=[Rule(axis="x", at=1)]),
        ],
    )
    figure = draw(chart, height_in=1.5 + (0.5 if len(rows) <= 10 else 0.34) * len(rows), share_y=True)
    caption = (
        "Filled: mean over seeds; bar: 95 % interval (of losses: for all variants at once); hollow: single seeds"
        f"{_speeds_over(result)}. Left of the line is better for the loss, "
        f"right of it for speed. Grey triangle: the speed that the ratio of {base.name}'s useful FLOPs per token to "
        f"the variant's would give.{' Bars that run out of the axis are cut.' if cut else ''}"
    )
    return Drawing(figure, f"Differences to {base.name}", caption, chart)


def _speeds_over(result: StudyResult) -> str:
    if result.speeds.source == "missing":
        return " (speeds were taken beside other cells and are not shown)"
    return " (of speeds: rounds of the timing part)" if result.speeds.source == "timing" else ""


def _estimate_series(y: int, name: str, estimate: Any, seeds: dict[int, float], *, one: str = "seed") -> list[Series]:
    """A dot with its interval in row `y`, and a ring for each seed (or `one`); nothing without an estimate."""
    if estimate is None:
        return []
    rings = [Series(variant=name, name=f"{one} {s}", x=[x], y=[y], mark="ring") for s, x in seeds.items()]
    bounds = {} if estimate.low is None else {"x_low": [estimate.low], "x_high": [estimate.high]}
    return [*rings, Series(variant=name, name="mean", x=[estimate.mean], y=[y], mark="dot", **bounds)]


def _ratio_range(rows: list[VariantResult], base: VariantResult) -> tuple[float, float, bool]:
    """(low, high, whether a bar is cut off) in which ratios stay readable if one interval is very wide."""
    ratios = [r for r in (v.speed_ratio for v in rows) if r is not None]
    shown = [1.0, *(flop_ratio(v, base) for v in rows), *(r.mean for r in ratios)]
    ends = [e for r in ratios for e in (r.low, r.high) if e is not None]
    low, high = min([*shown, *ends]), max([*shown, *ends])
    kept_low, kept_high = max(low, min(shown) / 2), min(high, max(shown) * 2)
    pad = 0.04 * (kept_high - kept_low) + 1e-3
    return kept_low - pad, kept_high + pad, kept_low > low or kept_high < high


def flop_ratio(variant: VariantResult, baseline: VariantResult) -> float:
    """Expected speed-up if time is proportional to useful FLOPs."""
    return baseline.cost["flops_per_token_useful"] / variant.cost["flops_per_token_useful"]
