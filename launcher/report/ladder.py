"""The report of a ladder of sizes: report.md, report.html, tables as CSV and figures, from the studies of its sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.text import short_number
from headway.launcher.compare.findings import confounded_starts, signed_interval
from headway.launcher.compare.ladder.curve import Law, Range
from headway.launcher.compare.ladder.read import LadderStudy, SizeStudy, read_ladder
from headway.launcher.compare.ladder.slope import DOUBLING, LEAST_SIZES, Line, Lines
from headway.launcher.compare.ladder.table import Refusal
from headway.launcher.report.answers import ladder_answers
from headway.launcher.report.bounds import bound_blocks
from headway.launcher.report.limits import ladder_limits
from headway.launcher.report.page import Block, Heading, Image, Items, Links, Table, Text, to_html, to_markdown
from headway.launcher.report.plots.ladder import draw_ladder
from headway.launcher.report.plots.study import Plot
from headway.launcher.report.plots.style import styles_of
from headway.launcher.report.scaling import (
    NOT_MEASURED,
    interval,
    law_blocks,
    missing_words,
    prediction_blocks,
    predictions,
    speed_up_blocks,
)
from headway.launcher.report.tables import p_text, write_csv, write_text
from headway.launcher.report.tuning import tuning_blocks


def ladder_report(out: Path) -> Path:
    """Write the report of a folder with ladder.json and return the path of report.html.

    Reads the study of every size as it is; what is not finished is named and is in no number. Raises SpecError if the
    folder does not contain a ladder, or no size was begun.
    """
    study = read_ladder(Path(out))
    for size in study.sizes:
        if size.left_out:
            console.alert(f"size {size.name} is not in the statistics of the ladder: {size.left_out}")
    plots = draw_ladder(study)
    title = f"Ladder {study.name}"
    looks = styles_of(study.result.baseline, study.result.others)
    write_text(study.out / "report.md", to_markdown(list(_blocks(study, plots, "report.md"))))
    page = to_html(list(_blocks(study, plots, "report.html")), title=title, folder=study.out, styles=looks)
    write_text(study.out / "report.html", page)
    write_csv(study.out / "report.csv", size_rows(study))
    write_csv(study.out / "cells.csv", cell_rows(study))
    write_csv(study.out / "fit.csv", fit_rows(study))
    return study.out / "report.html"


def _blocks(study: LadderStudy, plots: Mapping[str, Plot], page: str) -> Iterator[Block]:
    yield Heading(f"Ladder {study.name}", 1)
    yield from _not_done(study)
    yield from _confounds(study)
    yield Text(" ".join(headline(study)), "lead")
    yield from _verdicts(study)
    yield from ladder_answers(study)
    yield from (Image(plots[name]) for name in ("difference", "loss") if name in plots)
    yield Heading("What these numbers cannot say", 3)
    yield Table([("limit", "here"), *ladder_limits(study)], frozenset({0, 1}))
    yield from _losses(study)
    yield from _differences(study)
    yield from speed_up_blocks(study)
    yield from law_blocks(study)
    yield from prediction_blocks(study)
    studies = [size.study.record for size in study.sizes if size.study is not None]
    yield from bound_blocks(study.record, study.differences(), plots.get("bounds"), studies=studies)
    yield from tuning_blocks(study.tuning, plots)
    yield from _sizes(study, page)
    yield from _provenance(study)


# ---------------------------------------------------------------- top of the page


def _not_done(study: LadderStudy) -> Iterator[Block]:
    for size in study.sizes:
        if size.left_out:
            yield Text(f"Size {size.name} is not in the statistics of the ladder: {size.left_out}.", "warn")
    rows = []
    for size in study.sizes:
        if size.study is None:
            rows.append((size.name, "-", "not begun"))
            continue
        cells = [*size.study.cells, *size.study.short_cells]
        states = [c.state for c in cells if not c.done]
        if states:
            shown = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
            rows.append((size.name, f"{len(cells) - len(states)} of {len(cells)}", shown))
    if rows:
        yield Text(
            "The ladder is not finished. No number below has a cell that is missing. Intervals are right for one look "
            "at the data: to stop a study because of what its report shows now raises the chance of a wrong statement.",
            "warn",
        )
        yield Table([("size", "finished cells", "others"), *rows], frozenset({0, 2}))


def _confounds(study: LadderStudy) -> Iterator[Block]:
    """What the reports of the sizes warn of."""
    begun = [(s.name, s.study) for s in study.sizes if s.study is not None]
    if found := [f"{found.confounds} at {name}" for name, found in begun if found.confounds]:
        yield Text(
            f"Confounds: {', '.join(found)}; the reports of these sizes list them under \u201cIs the comparison "
            "fair?\u201d.",
            "warn",
        )
    for name, size in begun:
        yield from (Text(f"Size {name}: {sentence}", "warn") for sentence in confounded_starts(size))


def headline(study: LadderStudy) -> list[str]:
    """The answer to "does the advantage fall off with size?", and what it rests on."""
    result, base = study.result, study.result.baseline
    question = f"Does the advantage over {base} fall off with size?"
    if isinstance(result.lines, str):
        return [question, f"No answer yet: {result.lines}."]
    params = [s.params[base] for s in result.sizes]
    at = f" at {per_param} tokens per parameter" if (per_param := _tokens_per_param(study)) else ""
    opening = (
        f"Over {len(params)} sizes from {short_number(min(params))} to {short_number(max(params))} parameters{at}, "
        "in nats per doubling of parameters, with 95 % intervals that hold for all variants at once:"
    )
    groups: dict[str, list[str]] = {words: [] for words in VERDICTS}
    for v, line in result.lines.by_variant.items():
        groups[verdict_words(line)].append(f"{v} ({_per_doubling(line)})")
    found = [f"{words}: {', '.join(listed)}." for words, listed in groups.items() if listed]
    later = [f"{text[0].upper()}{text[1:]}" for text in found[1:]]
    refused = list(result.lines.refused)
    few = f"finished runs at fewer than {LEAST_SIZES} sizes"
    no_line = [f"No trend is measured for {', '.join(refused)}, with {few}."] if refused else []
    return [question, opening, *found[:1], *later, *no_line]


def _tokens_per_param(study: LadderStudy) -> str:
    """Such as `10`, or `6.1 to 10` where losses are not compared at the ratio of the rule; empty without a rule."""
    rule = study.record.get("tokens_per_param")
    used = [s for s in study.sizes if s.study is not None and not s.left_out]
    ratios = sorted((s.study.tokens or 0) / s.params for s in used if s.study is not None and s.params)
    if not rule or not ratios:
        return ""
    if ratios[0] > 0.95 * rule and ratios[-1] < 1.05 * rule:
        return f"{rule:g}"
    return " to ".join(dict.fromkeys(f"{ratio:.2g}" for ratio in (ratios[0], ratios[-1])))


VERDICTS = {
    "advantage shrinks": ("shrinks", -1),
    "disadvantage grows": ("shrinks", 1),
    "loses ground": ("shrinks", 0),
    "advantage grows": ("grows", -1),
    "disadvantage shrinks": ("grows", 1),
    "gains ground": ("grows", 0),
    "undecided": ("undecided", 0),
}
"""Words -> direction of the advantage, and the sign of the difference in the middle of the ladder (0: not clear)."""


def verdict_words(line: Line) -> str:
    """A key of `VERDICTS`."""
    middle, half = line.at(line.center)
    sign = 0 if abs(middle) <= half or line.verdict == "undecided" else int(math.copysign(1, middle))
    return next(words for words, key in VERDICTS.items() if key == (line.verdict, sign))


def _per_doubling(line: Line) -> str:
    """The change of the advantage, which is minus that of the difference."""
    return interval(_advantage(line))


def _advantage(line: Line) -> Range:
    """Change of the advantage (the baseline's loss minus the variant's) when parameters double."""
    return Range(value=-line.slope * DOUBLING, low=-line.high * DOUBLING, high=-line.low * DOUBLING)


def _verdicts(study: LadderStudy) -> Iterator[Block]:
    result = study.result
    rows: list[tuple[str, ...]] = []
    order = sorted(result.sizes, key=lambda size: size.params[result.baseline])  # the file may list them in any order
    header = (
        "variant",
        "advantage with size",
        "change of the advantage per doubling, in nats [95 %, all at once]",
        "p, all at once",
        f"difference at {order[0].name if order else 'the smallest size'}",
        f"at {order[-1].name if order[1:] else 'the largest size'}",
        "change relative to the reducible loss, per doubling",
    )
    rows.append(header)
    for v in result.others:
        line = result.lines.by_variant.get(v) if isinstance(result.lines, Lines) else None
        ends = [_difference_text(study.begun(s), v) for s in order[:1] + order[1:][-1:]]
        relative = result.change_of_ratio(v)
        rows.append(
            (
                v,
                NOT_MEASURED if line is None else verdict_words(line),
                NOT_MEASURED if line is None else _per_doubling(line),
                "-" if line is None else p_text(line.p_adjusted),
                *(*ends, NOT_MEASURED, NOT_MEASURED)[:2],
                NOT_MEASURED if isinstance(relative, str) else interval(_relative(relative), "+.2%"),
            )
        )
    yield Table(rows, frozenset({0, 1}))
    yield Text(
        f"Advantage: the loss of {result.baseline} minus the variant's; below 0 it is a disadvantage. The test: the "
        "paired differences over the logarithm of parameters, sizes weighted by their noise, with the lack of fit of "
        "the line in the interval. Undecided where the interval contains 0. A variant loses or gains ground where it "
        "does not, but which of both is better in the middle of the ladder is not clear. In nats, an advantage that is "
        "worth a constant factor of parameters shrinks as the reducible loss does. The last column tells whether that "
        "factor changes: below 0 it falls, where its interval excludes 0."
    )
    if isinstance(result.lines, Lines) and result.lines.refused:
        yield Items([f"{v}: {why}" for v, why in result.lines.refused.items()])


def _relative(change: Range) -> Range:
    return Range(value=-change.value * DOUBLING, low=-change.high * DOUBLING, high=-change.low * DOUBLING)


def _difference_text(size: SizeStudy, variant: str) -> str:
    found = None if size.study is None else size.study.comparison.differences.get(variant)
    return missing_words(size, variant) if found is None else signed_interval(found)


# ---------------------------------------------------------------- tables of sizes


def _losses(study: LadderStudy) -> Iterator[Block]:
    yield Heading("Loss at each size")
    yield Text(
        f"Mean validation loss in {study.unit} over the finished seeds (their number), at the last token count at "
        "which all finished runs of a size were validated. Lower is better."
    )
    rows = [["variant", *(s.name for s in study.sizes)]]
    rows.append(["parameters", *("-" if s.params is None else short_number(s.params) for s in study.sizes)])
    tokens = ["-" if s.study is None or s.study.tokens is None else short_number(s.study.tokens) for s in study.sizes]
    rows.append(["tokens", *tokens])
    for v in study.result.variants:
        rows.append([v, *(_loss(s, v) for s in study.sizes)])
    yield Table(rows)


def _loss(size: SizeStudy, variant: str) -> str:
    found = None if size.study is None else next((v for v in size.study.variants if v.name == variant), None)
    if found is None or found.loss is None:
        return missing_words(size, variant)
    return f"{found.loss.mean:.4f} ({found.loss.n})"


def _differences(study: LadderStudy) -> Iterator[Block]:
    yield Heading(f"Difference to {study.result.baseline} at each size")
    yield Text(
        "Paired difference in loss with its 95 % interval, which holds for all variants of a size at once, but not "
        "for all sizes at once, and rests on the runs of this size alone. Below 0 is better."
    )
    rows = [["variant", *(s.name for s in study.sizes)]]
    for v in study.result.others:
        rows.append([v, *(_difference_text(s, v) for s in study.sizes)])
    yield Table(rows)


def _sizes(study: LadderStudy, page: str) -> Iterator[Block]:
    yield Heading("Sizes")
    yield Text("Each size is a study of its own; its report has speeds, routers, heads and fairness:")
    begun = [s for s in study.sizes if s.study is not None]
    yield Links([(f"size {s.name}", f"{s.folder}/{page}") for s in begun])
    missing = [s.name for s in study.sizes if s.study is None]
    if missing:
        yield Text(f"Not begun: {', '.join(missing)}.")


def _provenance(study: LadderStudy) -> Iterator[Block]:
    yield Heading("Provenance")
    lines = []
    if command := study.record.get("command"):
        lines.append(f"Command: `{command}`")
    lines.append(f"Study: `{study.record.get('path', 'unknown')}`")
    for s in study.sizes:
        if s.study is not None:
            versions = s.study.card("versions") or {}
            shown = ", ".join(f"{k} {v}" for k, v in versions.items()) or "versions unknown"
            commit = s.study.card("git_commit") or "unknown"
            lines.append(f"Size {s.name}: commit `{commit}`, {shown}")
    lines.append(
        f"Report written {time.strftime('%Y-%m-%dT%H:%M:%S%z')}; numbers per size in `report.csv`, of the fits in "
        "`fit.csv`, losses per cell in `cells.csv`"
    )
    yield Items(lines)


# ---------------------------------------------------------------- CSV


def size_rows(study: LadderStudy) -> Iterator[dict[str, Any]]:
    """One row per size and variant."""
    for s in study.sizes:
        for v in () if s.study is None else s.study.variants:
            found, tokens = v.difference, v.effective.tokens if v.effective else None
            yield {
                "size": s.name,
                "variant": v.name,
                "num_params": v.cost["num_params"],
                "tokens": s.study.tokens if s.study else None,
                "flops_per_token_useful": v.cost["flops_per_token_useful"],
                "seeds": len(v.losses),
                "mean_loss_nats": v.loss and v.loss.mean,
                "sd_over_seeds": v.loss and v.loss.sd,
                "difference_nats": found and found.mean,
                "difference_low": found and found.low,
                "difference_high": found and found.high,
                "difference_p_holm": found and found.p_holm,
                "speed_up_tokens": tokens and tokens.value,
                "speed_up_tokens_low": tokens and tokens.low,
                "speed_up_tokens_high": tokens and tokens.high,
                "left_out": s.left_out,
            }


def cell_rows(study: LadderStudy) -> Iterator[dict[str, Any]]:
    """One row per cell of the full budget, in any state."""
    for s in study.sizes:
        for c in () if s.study is None else s.study.cells:
            yield {
                "size": s.name,
                "variant": c.variant,
                "seed": c.seed,
                "state": c.state,
                "validation_loss_nats": c.loss,
            }


def fit_rows(study: LadderStudy) -> Iterator[dict[str, Any]]:
    """One row per number of the lines and of the laws."""
    result = study.result

    def row(quantity: str, over: str, variant: str, found: Range | None) -> dict[str, Any]:
        ends = (None, None, None) if found is None else (found.value, found.low, found.high)
        return {"quantity": quantity, "over": over, "variant": variant} | dict(
            zip(("value", "low", "high"), ends, strict=True)
        )

    for v, line in result.lines.by_variant.items() if isinstance(result.lines, Lines) else ():
        slope = Range(value=line.slope, low=line.low, high=line.high)
        yield row("slope of the difference, nats per unit of ln N", "parameters", v, slope)
        if not isinstance(change := result.change_of_ratio(v), str):
            yield row("slope of the difference over the reducible loss", "parameters", v, change)
    for over, law in (("parameters", result.by_params), ("training FLOPs", result.by_flops)):
        if not isinstance(law, Law):
            continue
        yield row("exponent", over, "", law.a)
        yield row("irreducible loss, nats", over, "", law.e)
        yield row("lack of fit, nats", over, "", Range(value=law.lack.sd, low=0.0, high=law.lack.upper))
        for v in law.names:
            name = result.variants[v]
            base = result.index(result.baseline)
            if v in law.covered:
                yield row(f"reducible loss at {math.exp(law.center):.6g}, nats", over, name, law.coefficient(v))
            if v != base and {v, base} <= law.covered:
                yield row("effective speed-up", over, name, law.speed_up(v, base))
            if v != base and base in law.names:
                for size in law.means.sizes:
                    found = result.speed_up_at(law, name, size.name)
                    yield row(f"effective speed-up at {size.name}", over, name, found)
    target, law = study.record.get("extrapolate"), result.by_params
    if not target or isinstance(law, str):
        return
    for name in result.variants:
        for what, compute in predictions(study, law, name, float(target)).items():
            try:
                found = compute()
            except Refusal:
                continue
            yield row(f"{what} at {target:.6g}", "parameters", name, found)
