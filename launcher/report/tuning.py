"""Report section on tuned keys: what was tried, what was chosen, and how flat the curves are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from headway.launcher.compare.ladder.read import Check, Search, Tuning
from headway.launcher.report.page import Block, Heading, Image, Table, Text
from headway.launcher.report.plots.study import Plot


def tuning_blocks(tuning: Tuning, plots: Mapping[str, Plot]) -> Iterator[Block]:
    """Nothing without searches."""
    searches, baseline = tuning.searches, tuning.baseline
    if not searches:
        return
    yield Heading("Tuning")
    yield Text(
        "Trials have seeds of their own, so the losses above do not choose the value. Cost of a neighbour: how much "
        "higher the mean loss of trials is at the worse of the two values of the grid beside the best one. Where it is "
        "small, the choice matters little; with a neighbour on one side alone, the other side is not known. Shift: the "
        f"chosen value over that of {baseline}."
    )
    for key in dict.fromkeys(s.key for s in searches):
        yield Table(
            [_HEADER, *(_row(s, searches, baseline) for s in searches if s.key == key)], frozenset({0, 1, 2, 7})
        )
        if edges := tuning.on_edge(key):
            yield Text(
                f"The best `{key}` lies on an edge of the values tried: {', '.join(edges)}. A better value may lie "
                "beyond it, so losses with this value, and with values carried from it, may be too high.",
                "warn",
            )
        if (plot := plots.get(f"tuning-{key}")) is not None:
            yield Image(plot)
    for check in tuning.checks:
        yield Text(_checked(check), "plain" if check.holds else "warn")


def _checked(check: Check) -> str:
    what = f"At {check.size}, the carried `{check.key}` of {check.variant} was tried with both neighbours"
    if check.holds:
        return f"{what}: it is the best of the three."
    return f"{what}: {check.best:.4g} is better. Differences at this size may be those of a wrong setting."


_HEADER = ["variant", "size", "key", "chosen", "shift", "trials", "added to the grid", "how", "cost of a neighbour"]


def _row(search: Search, searches: Sequence[Search], baseline: str) -> list[str]:
    base = next((s for s in searches if (s.key, s.size, s.variant) == (search.key, search.size, baseline)), None)
    diverged = sum(loss is None for _, _, loss in search.trials)
    shift = "-"
    if search.chosen is not None and base is not None and base.chosen:
        shift = f"{search.chosen / base.chosen:.2f}x"
    return [
        search.variant,
        search.size,
        f"`{search.key}`",
        "not chosen" if search.chosen is None else f"{search.chosen:.4g}",
        shift,
        f"{len(search.trials)}" + (f" ({diverged} without a loss)" if diverged else ""),
        str(search.extended),
        search.how or "-",
        _flatness(search),
    ]


def _flatness(search: Search) -> str:
    """How much the worse neighbour of the best value on the grid costs, nats per token."""
    curve, values = dict(search.curve()), sorted({value for value, _, _ in search.trials})
    if len(curve) < 2:
        return "not measured"
    best = values.index(min(curve, key=lambda value: curve[value]))
    beside = [values[i] for i in (best - 1, best + 1) if 0 <= i < len(values)]
    if not all(value in curve for value in beside):
        return "a neighbour diverged"
    cost = f"{max(curve[value] for value in beside) - curve[values[best]]:+.4f}"
    return cost if len(beside) == 2 else f"{cost} (one side)"
