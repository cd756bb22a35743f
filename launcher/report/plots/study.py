"""Figures of a report, each as SVG (embedded in the page) and PNG. Imports matplotlib only to draw a figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headway.launcher.compare.analyse import StudyResult, VariantResult, seed_mean
from headway.launcher.report.charts import Chart, Drawing
from headway.launcher.report.plots.heads import draw_heads, draw_routers
from headway.launcher.report.plots.style import STYLE, WIDTH_IN, engineering, styles
from headway.launcher.run.records import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EARLY = 0.2
"""Share of the tokens whose losses do not extend the axis: the initial drop is the same for all and hides the rest."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn figure. `svg` and `png` are file names in the folder of the study. `chart`: its live form in the page."""

    title: str
    caption: str
    svg: str
    png: str
    chart: Chart | None = None


def draw_all(result: StudyResult) -> list[Plot]:
    """Draw all figures that have data into the folder of the study."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    with plt.rc_context({**STYLE, "svg.hashsalt": str(result.record["study"])}):
        for name, draw in (("loss", _loss), ("effects", _effects), ("heads", draw_heads), ("routers", draw_routers)):
            made = draw(result)
            if made is None:
                continue
            figure, title, caption, chart = Drawing(*made)
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
    plt.close(figure)
    return Plot(title=title, caption=caption, svg=f"{name}.svg", png=f"{name}.png", chart=chart)


def inline_svg(path: Path) -> str:
    """The <svg> element of a file, without prolog and metadata, which contain external addresses."""
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    start, end = text.find("<metadata>"), text.find("</metadata>")
    if start >= 0:
        text = text[:start] + text[end + len("</metadata>") :]
    return text.strip()


# ---------------------------------------------------------------- loss against tokens, FLOPs, seconds


def curves(result: StudyResult) -> tuple[str, dict[str, list[Curve]]]:
    """(label, variant -> one curve per finished seed): validation with at least 4 points, else smoothed training."""
    done = [c for c in result.cells if c.done]
    validated = bool(done) and min(len(c.record.validation) for c in done) >= 4
    by_variant: dict[str, list[Curve]] = {}
    for c in done:
        curve = c.record.validation if validated else _smooth(c.record.train)
        by_variant.setdefault(c.variant, []).append(curve)
    return ("validation loss" if validated else "training loss (running mean)"), by_variant


def _smooth(curve: Curve) -> Curve:
    window = max(1, len(curve) // 40)
    if window == 1:
        return curve
    kernel = np.ones(window) / window
    # Mean loss of the last `window` steps, placed at the latest step: a point uses no later steps.
    loss = np.convolve(curve.loss, kernel, mode="valid")
    keep = np.linspace(0, loss.size - 1, min(400, loss.size)).astype(int)
    rest = {k: getattr(curve, k)[window - 1 :][keep] for k in ("step", "tokens", "train_s")}
    return Curve(loss=loss[keep], **rest)


def _loss(result: StudyResult) -> tuple[Figure, str, str] | None:
    import matplotlib.pyplot as plt

    what, by_variant = curves(result)
    if not any(len(c) > 1 for found in by_variant.values() for c in found):
        return None
    train_flops = {v.name: 3 * v.cost["flops_per_token_useful"] for v in result.variants}
    panels: list[tuple[str, Callable[[str, Curve], Any]]] = [
        ("training tokens", lambda _, c: c.tokens),
        ("useful training FLOPs", lambda name, c: c.tokens * train_flops[name]),
        ("training seconds", lambda _, c: c.train_s),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH_IN, 4.1), sharey=True, layout="constrained")
    for axis, (label, x_of) in zip(axes, panels, strict=True):
        for name, found in by_variant.items():
            style = styles(result)[name]
            points = [(x_of(name, c), c.loss) for c in found if len(c)]
            if len(points) > 1:
                for x, y in points:
                    axis.plot(x, y, linewidth=0.8, alpha=0.45, **style)
            mean = seed_mean(points)
            if mean is not None:
                axis.plot(*mean, linewidth=2.2, label=name, **style)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(engineering())
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
    axes[0].set_ylabel("loss (nats per token)")
    note = _limit_loss_axis(axes, by_variant, result.card("unigram_entropy_nats"))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, max(1, len(labels))), frameon=False)
    seeds = max(len(found) for found in by_variant.values())
    lines = "bold: mean over seeds; thin: each seed" if seeds > 1 else "one seed"
    caption = f"{what.capitalize()}; {lines}. {note}"
    return figure, "Loss against tokens, FLOPs and seconds", caption.strip()


def _limit_loss_axis(axes: Any, by_variant: dict[str, list[Curve]], unigram: float | None) -> str:
    found = [c for group in by_variant.values() for c in group if len(c)]
    lows = [float(np.nanmin(c.loss)) for c in found]
    tops = [float(np.nanmax(c.loss[c.tokens >= EARLY * c.tokens[-1]])) for c in found]
    low, top = min(lows), max(tops)
    pad = 0.05 * max(top - low, 1e-3)
    hidden = any(float(np.nanmax(c.loss)) > top + pad for c in found)
    for axis in axes:
        axis.set_ylim(low - pad, top + pad)
    notes = [f"The first {EARLY:.0%} of the tokens may lie above the axis."] if hidden else []
    if unigram is not None and math.isfinite(unigram):
        if unigram <= top + pad:
            for axis in axes:
                axis.axhline(unigram, color="#777777", linewidth=1, linestyle=(0, (1, 2)), label="unigram entropy")
        else:
            notes.append(
                f"The unigram entropy of the validation text, {unigram:.2f} nats per token, is above the axis."
            )
    return " ".join(notes)


# ---------------------------------------------------------------- differences to the baseline


def _effects(result: StudyResult) -> tuple[Figure, str, str] | None:
    import matplotlib.pyplot as plt

    rows = [v for v in result.others if v.difference is not None or v.speed_ratio is not None]
    if not rows:
        return None
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH_IN, 1.5 + 0.5 * len(rows)), sharey=True, layout="constrained"
    )
    base = result.baseline
    for y, v in enumerate(rows):
        colour = styles(result)[v.name]["color"]
        paired = [v.losses[s] - base.losses[s] for s in sorted(v.losses.keys() & base.losses.keys())]
        _interval(left, y, v.difference, paired, colour)
        both = sorted(v.speeds.keys() & base.speeds.keys())
        _interval(
            right, y, v.speed_ratio, [v.speeds[s].tokens_per_s / base.speeds[s].tokens_per_s for s in both], colour
        )
        theory = flop_ratio(v, base)
        right.plot(theory, y - 0.24, marker="v", color="#777777", markersize=6, linestyle="none")
    cut = _limit_ratio_axis(right, rows, base)
    left.axvline(0, color="black", linewidth=1.2)
    right.axvline(1, color="black", linewidth=1.2)
    left.set_yticks(range(len(rows)), [v.name for v in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set_xlabel(f"validation loss minus {base.name}'s (nats per token)\n\u2190 better          worse \u2192")
    right.set_xlabel(f"tokens per second over {base.name}'s\n\u2190 slower          faster \u2192")
    for axis in (left, right):
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
    caption = (
        "Dot: mean over seeds; bar: 95 % interval (of losses: for all variants at once); rings: single seeds. Left of "
        "the line is better for the loss, "
        f"right of it for speed. Grey triangle: the speed that the ratio of {base.name}'s useful FLOPs per token to "
        f"the variant's would give.{' Bars that run out of the axis are cut.' if cut else ''}"
    )
    return figure, f"Differences to {base.name}", caption


def _limit_ratio_axis(axis: Axes, rows: list[VariantResult], base: VariantResult) -> bool:
    """Limit the axis so that ratios stay readable if one interval is very wide. True if a bar is cut off."""
    ratios = [r for r in (v.speed_ratio for v in rows) if r is not None]
    shown = [1.0, *(flop_ratio(v, base) for v in rows), *(r.mean for r in ratios)]
    ends = [e for r in ratios for e in (r.low, r.high) if e is not None]
    low, high = min([*shown, *ends]), max([*shown, *ends])
    kept_low, kept_high = max(low, min(shown) / 2), min(high, max(shown) * 2)
    pad = 0.04 * (kept_high - kept_low) + 1e-3
    axis.set_xlim(kept_low - pad, kept_high + pad)
    return kept_low > low or kept_high < high


def flop_ratio(variant: VariantResult, baseline: VariantResult) -> float:
    """Expected speed-up if time is proportional to useful FLOPs."""
    return baseline.cost["flops_per_token_useful"] / variant.cost["flops_per_token_useful"]


def _interval(axis: Axes, y: int, estimate: Any, points: list[float], colour: str) -> None:
    if estimate is None:
        return
    if estimate.low is not None:
        axis.plot([estimate.low, estimate.high], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt", alpha=0.55)
    axis.plot(points, [y] * len(points), "o", markerfacecolor="white", markeredgecolor=colour, markersize=5, zorder=3)
    axis.plot(estimate.mean, y, "o", color=colour, markersize=7, zorder=4)
