"""Report section on effective cost: how much less of a cost a variant needs for the same loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from headway.launcher.compare.analyse import StudyResult
from headway.launcher.compare.findings import signed_interval, speed_up, why_not_measured
from headway.launcher.report.page import Block, Heading, Image, Items, Table, Text
from headway.launcher.report.plots.study import Plot


def effective_blocks(result: StudyResult, plots: Mapping[str, Plot]) -> Iterator[Block]:
    """The tables of the section, and the figure `pareto`."""
    yield Heading("Effective cost")
    costs, base = result.effective, result.baseline.name
    if costs.why:
        yield Text(f"Not measured: {costs.why}.")
    else:
        yield Text(_explanation(result))
        if result.short_deviations:
            yield Text("CONFOUND: cells of smaller budgets that are not what the study planned:", "warn")
            yield Items(result.short_deviations)
        yield Table(list(_curve_rows(result)))
        yield Text(
            f"Differences in loss to {base} at the same ends. Intervals (95 %) hold for all variants of one budget, "
            "but not for all budgets at once."
        )
        yield Table(list(_difference_rows(result)))
        yield Table(list(_speed_up_rows(result)), frozenset({0, 1}))
        if reasons := why_not_measured(result):
            yield Text("Not measured:")
            yield Items(reasons)
        rows = list(_earlier_rows(result))
        if len(rows) > 1:
            yield Text(
                "The reverse: the speed-up in tokens at the losses that the better one reached with the smaller "
                f"budgets, read from the curve of the other one (of the variant and {base}). It shows whether the "
                "speed-up grows or shrinks with training. Estimates without interval; a dash: the other one's curve "
                "does not reach down or up to that loss."
            )
            yield Table(rows, frozenset({0, 1}))
    yield Text(
        "KV bytes per token belong to the variant and do not change with the budget. One study of one size therefore "
        "cannot say how many KV bytes the baseline needs for a variant's loss: compare them with the loss itself"
        + (", in the last panel of the figure." if "pareto" in plots else ".")
    )
    if "pareto" in plots:
        yield Image(plots["pareto"])


def _explanation(result: StudyResult) -> str:
    costs, base = result.effective, result.baseline.name
    low, high = 1 / _range(result), _range(result)
    return (
        f"Validation loss at the end of {len(costs.tokens)} budgets, each with a learning rate that has decayed at its "
        f"end. Speed-up in tokens: tokens of {base} over tokens of the variant at equal loss; the better of the two is "
        "read at the final loss of the other one, so that only measured parts of curves are used. By FLOPs: times the "
        f"ratio of useful FLOPs per token. By seconds: times the ratio of measured tokens per second. Budgets measure "
        f"ratios from {low:.2g} to {high:.2g} in tokens; what lies outside is shown as < or >. Intervals (95 %) hold "
        "for all variants at once. Between budgets, losses are interpolated by a power law with an offset (exponent "
        f"{costs.exponent:.2f}, fit to the mean of all curves)."
    )


def _range(result: StudyResult) -> float:
    tokens = list(result.effective.tokens.values())
    return tokens[-1] / tokens[0]


def _curve_rows(result: StudyResult) -> Iterator[list[str]]:
    costs = result.effective
    yield ["mean loss after", *(f"{tokens:,} tokens" for tokens in costs.tokens.values())]
    for v in result.variants:
        curve = costs.curves.get(v.name)
        yield [v.name, *(["-"] * len(costs.tokens) if curve is None else [f"{loss:.4f}" for loss in curve])]


def _difference_rows(result: StudyResult) -> Iterator[list[str]]:
    tokens = result.effective.tokens
    yield ["difference after", *(f"{count:,} tokens" for count in tokens.values())]
    found = [result.differences_at(budget) for budget in tokens]
    for v in result.others:
        yield [v.name, *(signed_interval(by_variant.get(v.name)) for by_variant in found)]


def _speed_up_rows(result: StudyResult) -> Iterator[list[str]]:
    yield ["variant", "curve of", "n", "speed-up in tokens", "by useful FLOPs", "by seconds"]
    for v in result.others:
        found = v.effective
        if found is not None:
            n = "-" if found.tokens is None else str(found.tokens.n)
            shown = [speed_up(x) for x in (found.tokens, found.flops, found.seconds)]
            yield [v.name, found.curve_of or "-", n, *shown]


def _earlier_rows(result: StudyResult) -> Iterator[list[str]]:
    shares = list(result.effective.tokens)[:-1]
    yield ["variant", "loss of", *(f"at {result.effective.tokens[b]:,} tokens" for b in shares)]
    for v in result.others:
        if v.effective is not None and any(ratio is not None for _, ratio in v.effective.earlier):
            shown = ["-" if ratio is None else f"{ratio:.2f}x" for _, ratio in v.effective.earlier]
            yield [v.name, v.effective.curve_of, *shown]
