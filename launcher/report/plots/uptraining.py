"""Figure: loss over alpha, one line per method."""

from __future__ import annotations

from headway.launcher.compare.analyse import StudyResult
from headway.launcher.compare.uptraining import uptraining_of
from headway.launcher.report.charts import Axis, Chart, Drawing, Panel, Rule, Series
from headway.launcher.report.plots.chart import draw
from headway.launcher.report.plots.style import styles_of


def draw_uptraining(result: StudyResult) -> Drawing | None:
    """Losses of all methods over alpha, with intervals; None for a study without uptraining."""
    found = uptraining_of(result)
    if found is None or not any(len(method.points) > 1 for method in found.methods):
        return None
    series = []
    for method in found.methods:
        x, y = [p.alpha for p in method.points], [p.loss.mean for p in method.points]
        bars = all(p.loss.low is not None for p in method.points)
        low, high = ([getattr(p.loss, end) for p in method.points] if bars else None for end in ("low", "high"))
        texts = [f"{p.tokens:,} tokens, {p.loss.n} seeds" for p in method.points]
        series.append(Series(variant=method.name, name="over alpha", x=x, y=y, mark="thin"))
        series.append(
            Series(variant=method.name, name="mean over seeds", x=x, y=y, mark="dot", low=low, high=high, texts=texts)
        )
    rules = [Rule(axis="y", at=loss.mean, label=f"{name}, the teacher") for name, loss in found.teachers.items()]
    alphas = sorted({p.alpha for method in found.methods for p in method.points})
    x = Axis(
        label="alpha: tokens of the uptraining / tokens of the teacher",
        low=-0.03 * alphas[-1],
        high=1.03 * alphas[-1],
        ticks=[(alpha, f"{alpha:g}") for alpha in alphas],
    )
    panel = Panel(x=x, y=Axis(label=f"validation loss ({result.unit})"), series=series, rules=rules)
    chart = Chart(styles=styles_of("", [method.name for method in found.methods]), panels=[panel])
    caption = (
        "Validation loss at the end of the uptraining, mean over seeds; bars: 95 % intervals, each of its own. At "
        "alpha 0, the converted model is not trained."
    )
    return Drawing(draw(chart, height_in=3.7), "Loss over alpha", caption, chart)
