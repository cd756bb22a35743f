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
        f"small, the choice matters little. Shift: the chosen value over that of {baseline}."
    )
    for key in dict.fromkeys(s.key for s in searches):
        yield Table(
            [_HEADER, *(_row(s, searches, baseline) for s in searches if s.key == key)], frozenset({0, 1, 2, 7})
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
    curve = [loss for _, loss in search.curve()]
    if len(curve) < 2:
        return "not measured"
    best = curve.index(min(curve))
    return f"{max(curve[max(best - 1, 0) : best + 2]) - curve[best]:+.4f}"
