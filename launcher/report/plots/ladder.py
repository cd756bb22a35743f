"""Figures of a ladder: loss and difference against parameters.

Imports matplotlib only to draw a figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from headway.launcher.base.text import short_number
from headway.launcher.compare.ladder.curve import Law
from headway.launcher.compare.ladder.read import LadderStudy
from headway.launcher.compare.ladder.slope import Lines
from headway.launcher.compare.ladder.table import Refusal
from headway.launcher.report.charts import Axis, Chart, Drawing, Panel, Rule, Series
from headway.launcher.report.plots.bounds import draw_bounds
from headway.launcher.report.plots.chart import draw
from headway.launcher.report.plots.study import Plot, save
from headway.launcher.report.plots.style import STYLE, styles_of
from headway.launcher.report.plots.tuning import draw_tuning

_POINTS = 60


def draw_ladder(study: LadderStudy) -> dict[str, Plot]:
    """Draw all figures that have data into the folder of the ladder. Name -> figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = styles_of(study.result.baseline, study.result.others)
    drawn = {}
    with plt.rc_context({**STYLE, "svg.hashsalt": study.name}):
        made = {"loss": _loss(study, looks), "difference": _difference(study, looks)}
        made |= draw_tuning(study.tuning, looks, study.unit)
        made["bounds"] = draw_bounds(study.record, study.differences(), looks, study.unit)
        for name, drawing in made.items():
            if drawing is not None:
                figure, title, caption, chart = drawing
                drawn[name] = save(figure, study.out, name, title=title, caption=caption, chart=chart)
    return drawn


# ---------------------------------------------------------------- loss


def _loss(study: LadderStudy, looks: Mapping[str, Any]) -> Drawing | None:
    result = study.result
    if len(result.sizes) < 2:
        return None
    law = result.by_params if isinstance(result.by_params, Law) else None
    x_axis = _params_axis(study)
    panels = [Panel(x=x_axis, y=Axis(label=f"validation loss ({study.unit})"), series=_losses(study, law, 0.0))]
    caption = "Filled: mean over seeds; hollow: single seeds."
    if law is not None:
        caption += " Lines: the joint law."
        if study.record.get("extrapolate"):
            caption += " Bars: 95 % prediction intervals of the expected loss at the named size."
        offset = float(law.linear[0])
        axis = Axis(label=f"loss minus E = {offset:.3f} ({study.unit})", log=True)
        panels.append(Panel(x=x_axis, y=axis, series=_losses(study, law, offset)))
        caption += " Right: the reducible part, on logarithmic axes; a power law is a straight line."
    chart = Chart(styles=looks, panels=panels)
    return Drawing(draw(chart, height_in=4.2), "Loss against parameters", caption, chart)


def _losses(study: LadderStudy, law: Law | None, offset: float) -> list[Series]:
    result, series = study.result, list[Series]()
    for v in result.variants:
        own = [(s.params[v], by_seed) for s in result.sizes if (by_seed := s.losses.get(v))]
        if not own:
            continue
        runs = [(n, seed, loss - offset) for n, by_seed in own for seed, loss in by_seed.items() if loss > offset]
        x, y = [n for n, _, _ in runs], [loss for _, _, loss in runs]
        texts = [f"seed {seed}" for _, seed, _ in runs]
        series.append(Series(variant=v, name="one seed", x=x, y=y, mark="ring", texts=texts))
        means = [(n, math.fsum(by_seed.values()) / len(by_seed) - offset) for n, by_seed in own]
        kept = [(n, y) for n, y in means if y > 0]
        series.append(Series(variant=v, name="mean", x=[n for n, _ in kept], y=[y for _, y in kept], mark="dot"))
        if law is not None:
            series += _fitted(study, law, v, offset)
    return series


def _fitted(study: LadderStudy, law: Law, variant: str, offset: float) -> list[Series]:
    v, target = study.result.index(variant), study.record.get("extrapolate")
    if v not in law.names:
        return []
    end = max(float(law.x.max()), math.log(target) if target else -math.inf)
    predicted = []
    if target:
        try:
            found = law.loss(v, math.log(target))
        except Refusal:
            end = float(law.x.max())
        else:
            shown = not offset or found.low > offset  # a logarithmic axis cannot show what lies below E
            low, high = ([found.low - offset], [found.high - offset]) if shown else (None, None)
            y = [found.value - offset]
            predicted = [Series(variant=variant, name="predicted", x=[target], y=y, mark="dot", low=low, high=high)]
    x = np.linspace(float(law.x.min()), end, _POINTS)
    line = Series(variant=variant, name="law", x=np.exp(x), y=law.curve(v, x) - offset, mark="line")
    return [line, *predicted]


def _params_axis(study: LadderStudy, *, named: bool = True) -> Axis:
    """With ticks at the sizes, and at the named one."""
    values = {s.params[study.result.baseline] for s in study.result.sizes}
    if named and study.record.get("extrapolate") and isinstance(study.result.by_params, Law):
        values.add(float(study.record["extrapolate"]))
    return Axis(label="parameters", log=True, ticks=[(x, short_number(x)) for x in sorted(values)])


# ---------------------------------------------------------------- difference


def _difference(study: LadderStudy, looks: Mapping[str, Any]) -> Drawing | None:
    result, series = study.result, list[Series]()
    lines = result.lines.by_variant if isinstance(result.lines, Lines) else {}
    for v in result.others:
        points = []
        for size in result.sizes:
            found = study.begun(size).study
            difference = None if found is None else found.comparison.differences.get(v)
            if difference is not None:
                points.append((size.params[result.baseline], difference))
        if not points:
            continue
        x, y = [n for n, _ in points], [d.mean for _, d in points]
        low = [d.mean if d.low is None else d.low for _, d in points]
        high = [d.mean if d.high is None else d.high for _, d in points]
        series.append(Series(variant=v, name="one size", x=x, y=y, low=low, high=high, mark="dot"))
        if v in lines:
            along = np.linspace(math.log(min(x)), math.log(max(x)), _POINTS)
            mean, half = lines[v].at(along)
            series.append(Series(variant=v, name="line", x=np.exp(along), y=mean, low=mean - half, high=mean + half))
    if not series:
        return None
    base = result.baseline
    y_axis = Axis(label=f"loss minus {base}'s ({study.unit})\n\u2190 better          worse \u2192")
    chart = Chart(
        styles=looks,
        panels=[Panel(x=_params_axis(study, named=False), y=y_axis, series=series, rules=[Rule(axis="y", at=0.0)])],
    )
    caption = (
        "Dots: paired difference at one size with its 95 % interval (for all variants of this size at once; no bar "
        "with one seed). "
    )
    if lines:
        caption += (
            "Lines: fitted over the logarithm of parameters, with a 95 % band that holds for all variants at once."
        )
    return Drawing(draw(chart, height_in=4.4), f"Difference to {base} against parameters", caption.strip(), chart)
