"""The report of a ladder of sizes: report.md, report.html, tables as CSV and figures, from the studies of its sizes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.text import short_number
from headway.launcher.compare.findings import shape_words, signed_interval
from headway.launcher.compare.ladder.curve import Law, Range
from headway.launcher.compare.ladder.noise import Means
from headway.launcher.compare.ladder.read import LadderStudy, SizeStudy, read_ladder
from headway.launcher.compare.ladder.slope import Line, Lines
from headway.launcher.compare.ladder.table import Refusal
from headway.launcher.compare.simultaneous import Simultaneous
from headway.launcher.compare.stats import sd_factor
from headway.launcher.report.bounds import bound_blocks
from headway.launcher.report.page import Block, Heading, Image, Items, Links, Table, Text, to_html, to_markdown
from headway.launcher.report.plots.ladder import draw_ladder
from headway.launcher.report.plots.study import Plot
from headway.launcher.report.plots.style import styles_of
from headway.launcher.report.scaling import (
    NOT_MEASURED,
    interval,
    lack_words,
    law_blocks,
    prediction_blocks,
    predictions,
    speed_up_blocks,
)
from headway.launcher.report.tables import p_text, write_csv, write_text
from headway.launcher.report.tuning import tuning_blocks

DOUBLING = math.log(2)


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
    yield Text(" ".join(headline(study)), "lead")
    yield from _verdicts(study)
    yield from (Image(plots[name]) for name in ("difference", "loss") if name in plots)
    yield Heading("What these numbers cannot say", 3)
    yield Table([("limit", "here"), *_limits(study)], frozenset({0, 1}))
    yield from _losses(study)
    yield from _differences(study)
    yield from speed_up_blocks(study)
    yield from law_blocks(study)
    yield from prediction_blocks(study)
    yield from bound_blocks(study.record, study.differences(), plots.get("bounds"))
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
            "The ladder is not finished; what is missing is in no number below. Intervals are for one look at the "
            "data: whoever stops at a state because of what it shows errs more often:",
            "warn",
        )
        yield Table([("size", "finished cells", "others"), *rows], frozenset({0, 2}))


def headline(study: LadderStudy) -> list[str]:
    """The answer to "does the advantage fall off with size?", and what it rests on."""
    result, base = study.result, study.result.baseline
    question = f"Does the advantage over {base} fall off with size?"
    if isinstance(result.lines, str):
        return [question, f"No answer yet: {result.lines}."]
    params = [s.params[base] for s in result.sizes]
    per_param = study.record.get("tokens_per_param")
    at = f" at {per_param:g} tokens per parameter" if per_param else ""
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
    no_line = [f"No answer yet for {', '.join(refused)}."] if refused else []
    return [question, opening, *found[:1], *later, *no_line]


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
    header = (
        "variant",
        "advantage with size",
        "change of the advantage per doubling, in nats [95 %, all at once]",
        "p, all at once",
        "difference at the smallest size",
        "at the largest size",
        "change relative to the reducible loss, per doubling",
    )
    rows.append(header)
    order = sorted(result.sizes, key=lambda size: size.params[result.baseline])  # the file may list them in any order
    for v in result.others:
        line = result.lines.by_variant.get(v) if isinstance(result.lines, Lines) else None
        ends = [_difference(study.begun(s), v) for s in order[:1] + order[1:][-1:]]
        relative = result.change_of_ratio(v)
        rows.append(
            (
                v,
                NOT_MEASURED if line is None else verdict_words(line),
                NOT_MEASURED if line is None else _per_doubling(line),
                "-" if line is None else p_text(line.p_adjusted),
                *(NOT_MEASURED if d is None else signed_interval(d) for d in (*ends, None, None)[:2]),
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


def _difference(size: SizeStudy, variant: str) -> Simultaneous | None:
    return None if size.study is None else size.study.comparison.differences.get(variant)


def _limits(study: LadderStudy) -> Iterator[tuple[str, str]]:
    result = study.result
    if isinstance(result.means, Means):
        noise = result.means.noise
        factor = sd_factor(noise.sigma_df)
        yield (
            "noise of a run",
            f"{noise.sigma:.4f} nats (standard deviation given its variant and seed), from {noise.sigma_df} degrees "
            f"of freedom over all sizes; the true one can be up to {factor:.1f} times as large. It is taken to be the "
            "same at all sizes and for all variants",
        )
        yield (
            "effect of a seed",
            f"{noise.omega:.4f} nats on all variants of a size, from {noise.seed_df} degrees of freedom",
        )
    if isinstance(result.lines, Lines):
        widths = [line.critical * line.standard_error * DOUBLING for line in result.lines.by_variant.values()]
        low, high = f"{min(widths):.4f}", f"{max(widths):.4f}"
        span = low if low == high else f"{low} to {high}"
        yield "smallest visible trend", f"about {span} nats per doubling of parameters"
        yield "lack of fit of the lines", lack_words(result.lines.lack)
    odd = [f"{s.name}: {', '.join(own)}" for s in study.sizes if s.study and (own := s.study.comparison.own_spread)]
    if odd:
        yield (
            "spreads that differ",
            f"{'; '.join(odd)}: their noise is larger than that of the others, but is pooled here; their intervals are "
            "too narrow",
        )
    if not study.tuning.searches:
        yield (
            "tuning",
            "nothing was tuned: one set of settings may suit some variants better than others, at some sizes",
        )
    for key in dict.fromkeys(s.key for s in study.tuning.searches):
        yield "tuning", _tuning_limit(study, key)
    yield (
        "several statements",
        "intervals of one size, of slopes, or of one column of speed-ups hold for all variants at once, but not for "
        "all sizes, tables and questions at once",
    )
    shape = next((words for s in study.sizes if s.study is not None and (words := shape_words(s.study))), "")
    if shape:
        yield "scale", f"{shape}; mechanisms that save work in the attention core can fare better with longer sequences"
    yield "data", "one corpus and one rule of tokens; on other text or with more tokens the trend can be another one"


def _tuning_limit(study: LadderStudy, key: str) -> str:
    """How values of a tuned key were found, and what was not tried."""
    searches = [s for s in study.tuning.searches if s.key == key]
    tried = [s for s in searches if s.trials]
    at = list(dict.fromkeys(s.size for s in tried))
    seeds = max((len({seed for _, seed, _ in s.trials}) for s in tried), default=0)
    budget = max((s.budget for s in tried), default=1.0)
    text = (
        f"`{key}`: chosen at {', '.join(at) or 'no size'} from trials of {seeds} {'seed' if seeds == 1 else 'seeds'} "
        f"and {budget:.0%} of the tokens, on the validation text of the losses above. Values have the noise of the "
        "trials and no interval"
    )
    carried = [size for size in dict.fromkeys(s.size for s in searches) if size not in at]
    if not carried:
        return text
    checked = ", ".join(f"that of {c.variant} at {c.size}" for c in study.tuning.checks if c.key == key)
    return (
        f"{text}. Carried to {', '.join(carried)} by a rule; checked: {checked or 'none yet'}. A rule that suits one "
        "variant less looks like a trend"
    )


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
        return NOT_MEASURED
    return f"{found.loss.mean:.4f} ({found.loss.n})"


def _differences(study: LadderStudy) -> Iterator[Block]:
    yield Heading(f"Difference to {study.result.baseline} at each size")
    yield Text(
        "Paired difference in loss with its 95 % interval, which holds for all variants of a size at once, but not "
        "for all sizes at once, and rests on the runs of this size alone. Below 0 is better."
    )
    rows = [["variant", *(s.name for s in study.sizes)]]
    for v in study.result.others:
        found = [_difference(s, v) for s in study.sizes]
        rows.append([v, *(NOT_MEASURED if d is None else signed_interval(d) for d in found)])
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
            yield row(f"reducible loss at {math.exp(law.center):.6g}, nats", over, name, law.coefficient(v))
            base = result.index(result.baseline)
            if v != base and base in law.names:
                yield row("effective speed-up", over, name, law.speed_up(v, base))
                for i, size in enumerate(law.means.sizes):
                    yield row(f"effective speed-up at {size.name}", over, name, law.speed_up_at(v, base, i))
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
