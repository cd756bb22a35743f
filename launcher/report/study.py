"""`headway study report`: report.md, report.html, tables as CSV and figures, from the records of the cells."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles

from headway.launcher.base import console
from headway.launcher.compare.analyse import StudyResult, VariantResult, analyse
from headway.launcher.compare.fairness import ABSENT, Difference, changed_sections
from headway.launcher.compare.findings import (
    bits_per_byte,
    headline,
    limits,
    measured_speed_holds_for,
    signed_interval,
    speed_origin,
    verdict_rows,
)
from headway.launcher.compare.ladder.read import Tuning, read_tuning
from headway.launcher.compare.trend import not_pooled, sentence
from headway.launcher.match.matching import quantity_words
from headway.launcher.match.table import matching_rows
from headway.launcher.report.answers import answer_of, question_heading, question_words
from headway.launcher.report.bounds import bound_blocks
from headway.launcher.report.context import context_blocks
from headway.launcher.report.effective import effective_blocks
from headway.launcher.report.evaluations import evaluation_blocks, set_blocks
from headway.launcher.report.heads import head_rows, router_and_head_blocks, router_rows
from headway.launcher.report.page import Block, Heading, Image, Items, Table, Text, to_html, to_markdown
from headway.launcher.report.plots.study import Plot, draw_all, flop_ratio
from headway.launcher.report.plots.style import styles
from headway.launcher.report.recomputed import recomputation
from headway.launcher.report.tables import cell_rows, curve_rows, p_text, write_csv, write_text
from headway.launcher.report.tuning import tuning_blocks
from headway.launcher.report.uptraining import uptraining_blocks
from headway.launcher.run.record_check import UNCHECKED
from headway.launcher.spec.merge import format_value


def report(study_dir: Path | str) -> Path:
    """Write the report of a study folder and return the path of report.html.

    Failed, missing and unfinished cells are listed at the top and excluded from all means. Raises SpecError if the
    folder does not contain a study.
    """
    out = Path(study_dir)
    result = analyse(out)
    if result.pairing.status == "UNPAIRED":
        console.alert(f"UNPAIRED: the variants of {out} did not read the same data; the report says where they differ")
    every = [*result.cells, *result.short_cells]
    if damaged := [f"{c.key}: {c.detail}" for c in every if c.damaged]:
        console.alert(f"DAMAGED: {len(damaged)} of {len(every)} cells of {out} are in no number of the report:")
        for line in damaged:
            console.alert(f"  {line}")
    tuning = read_tuning({"": out}, result.record["baseline"])
    plots = {plot.svg.removesuffix(".svg"): plot for plot in draw_all(result, tuning)}
    blocks = list(_blocks(result, tuning, plots))
    title = _title(result)
    write_text(out / "report.md", to_markdown(blocks))
    write_text(out / "report.html", to_html(blocks, title=title, folder=out, styles=styles(result)))
    write_csv(out / "report.csv", cell_rows(result))
    write_csv(out / "curves.csv", curve_rows(result))
    write_csv(out / "routers.csv", router_rows(result))
    write_csv(out / "heads.csv", head_rows(result))
    return out / "report.html"


def _title(result: StudyResult) -> str:
    """`Study NAME`, or `Comparison NAME` for runs that no study file planned."""
    return f"{'Comparison' if result.record.get('comparison') else 'Study'} {result.record['study']}"


def _blocks(result: StudyResult, tuning: Tuning, plots: dict[str, Plot]) -> Iterator[Block]:
    yield Heading(_title(result), 1)
    yield from _not_done(result)
    yield from _warnings(result)
    yield Text(" ".join(headline(result)), "lead")
    if result.comparison.differences:
        yield Table(verdict_rows(result), frozenset({0, 1}))
        yield Text(_start_words(result))
        if result.speeds.source == "missing":
            yield Text(speed_origin(result), "warn")
        else:
            yield Text(f"Tokens per second and speed-up by seconds: {measured_speed_holds_for(result)}.")
    yield from _answers(result)
    yield Heading("What these numbers cannot say", 3)
    yield Table(limits(result), frozenset({0, 1}))
    yield from _trend(result)
    yield from (Image(plots[name]) for name in ("loss", "effects", "trend") if name in plots)
    yield from uptraining_blocks(result, plots)
    yield from _compared(result)
    yield from _equal_tokens(result)
    yield from set_blocks(result)
    yield from evaluation_blocks(result)
    yield from _speed(result)
    yield from effective_blocks(result, plots)
    yield from bound_blocks(result.record, [("", result.comparison.differences)], plots.get("bounds"))
    yield from tuning_blocks(tuning, plots)
    yield from router_and_head_blocks(result, plots)
    yield from context_blocks(result)
    yield from _fairness(result)
    yield from _provenance(result)


# ---------------------------------------------------------------- top of the page


def _not_done(result: StudyResult) -> Iterator[Block]:
    every = [*result.cells, *result.short_cells]
    damaged = [c for c in every if c.damaged]
    if damaged:
        yield Text(
            f"DAMAGED: the records of {len(damaged)} of {len(every)} cells are not what their runs wrote. They are in "
            "no mean, interval or test:",
            "warn",
        )
    missing = [c for c in every if not c.done]
    if missing:
        yield Text(f"{len(missing)} of {len(every)} cells are not in the numbers below:", "warn")
        rows = [("cell", "state", "tokens", "why")]
        rows += [(c.key, c.state, f"{c.record.tokens:,}", c.detail or "-") for c in missing]
        yield Table(rows, frozenset({0, 1, 3}))
    if result.leftovers:
        yield Text(
            f"In the folder, but not in the study any more and not in this report: {', '.join(result.leftovers)}."
        )


def _warnings(result: StudyResult) -> Iterator[Block]:
    if result.pairing.status == "UNPAIRED":
        wrong = next(line for line in result.pairing.lines if "different batches" in line)
        yield Text(
            f"UNPAIRED: variants did not read the same data ({wrong}). Intervals below are Welch's for unpaired runs, "
            "and part of every difference may come from the data.",
            "warn",
        )
    every = [c for c in (*result.cells, *result.short_cells) if not c.damaged]
    lost = [f"{c.key}: {c.record.lost}" for c in every if c.record.lost]
    if lost:
        yield Text("Records were lost; what is left of these runs is shown as it is:", "warn")
        yield Items(lost)
    unchecked = [c for c in every if c.done and c.detail == UNCHECKED]
    if unchecked:
        yield Text(
            f"{len(unchecked)} of {len(every)} cells are of an earlier version, whose records are without chained "
            "checksums: only their last step and last validation were compared with their summaries."
        )
    if found := result.confounds:
        what = "1 confound" if found == 1 else f"{found} confounds"
        yield Text(f"{what}: see \u201cIs the comparison fair?\u201d below.", "warn")


def _start_words(result: StudyResult) -> str:
    equivalent = "" if result.margin is None else f"equivalent where it is within {result.margin} {result.unit}, "
    return (
        f"Verdict: {equivalent}better or worse where the interval excludes 0, undecided elsewhere. Start: rms of what "
        "attention or MLP adds over rms of the stream that it is added to, before the first step, geometric mean over "
        "layers and seeds; CONFOUNDED where attention of a layer differs from the baseline's by more than 10 %. "
        "Effective speed-up: how many times less of the cost than the baseline's reaches the same loss; above 1 is "
        "better."
    )


def _answers(result: StudyResult) -> Iterator[Block]:
    asks = result.record.get("asks") or []
    if not asks:
        return
    shows = "difference in loss [95 %, all at once]"
    shows += ", or ratio of sds" if any(" varies more " in text for text in asks) else ""
    later = result.record.get("asked_later") or {}
    rows = [(question_heading(later), "answer", shows)]
    rows += [(question_words(text, later), *answer_of(result, text)) for text in asks]
    yield Table(rows, frozenset({0, 1}))


def _trend(result: StudyResult) -> Iterator[Block]:
    found = [] if result.trend is None else [(v.name, sentence(result.trend, v.name)) for v in result.others]
    rows = [(name, text) for name, text in found if text is not None]
    if rows:
        yield Heading("How differences develop", 3)
        yield Table([("variant", "difference in validation loss over training"), *rows], frozenset({0, 1}))
        if result.trend is not None and (text := not_pooled(result.trend, result.baseline.name)) is not None:
            yield Text(text)


# ---------------------------------------------------------------- sections


def _compared(result: StudyResult) -> Iterator[Block]:
    match, baseline = result.record["match"], result.baseline.name
    yield Heading("What was compared")
    if match:
        yield Text(
            f"`{match['free']}` was solved in multiples of {match['multiple']} so that every variant has the "
            f"{quantity_words(match)} of {baseline}; residuals beyond {match['tolerance']:.2%} are refused. FLOPs are "
            "forward, per token; training costs three times as much. Useful: what the mathematics needs; executed: "
            f"what this implementation computes.{recomputation(result.record)}"
        )
    else:
        yield Text(
            "Sizes are as written; nothing was matched. FLOPs are forward, per token; training costs "
            "three times as much. Useful: what the mathematics needs; executed: what this implementation computes."
            f"{recomputation(result.record)}"
        )
    yield Table(list(matching_rows(result.record)))
    keys = [
        f"{v.name}: "
        + (
            ", ".join(f"`{k}: {format_value(value)}`" for k, value in v.planned["keys"].items())
            or "the base spec itself"
        )
        for v in result.variants
    ]
    yield Items(keys)


def _spec_differences(result: StudyResult) -> Iterator[Block]:
    """A table of intended and unintended differences, and one line per variant with the defaults of its mechanism."""
    base = result.baseline.name
    yield Text(f"Every key in which a resolved spec differs from {base}'s:")
    rows = [("variant", "key", base, "variant's", "class", "why")]
    order = {"CONFOUND": 0, "intervention": 1, "matching": 2}
    brought: dict[str, list[Difference]] = {}
    for d in sorted(result.differences, key=lambda d: (order[d.kind], d.variant, d.key)):
        if d.note.startswith("comes with"):
            brought.setdefault(d.variant, []).append(d)
            continue
        kind = "consequence of matching" if d.kind == "matching" else d.kind
        rows.append((d.variant, f"`{d.key}`", str(d.baseline), str(d.value), kind, d.note))
    yield Table(rows, frozenset({0, 1, 4, 5}))
    if brought:
        yield Text("Defaults that come with a mechanism named in the study, and keys that go with it:")
        yield Items([f"{name}: {_listed(differences)}" for name, differences in brought.items()])


def _listed(differences: Sequence[Difference]) -> str:
    has = [f"`{d.key}: {format_value(d.value)}`" for d in differences if d.value != ABSENT]
    lacks = [f"`{d.key}`" for d in differences if d.value == ABSENT]
    return ", ".join(has) + ("; " if has and lacks else "") + (f"no {', '.join(lacks)}" if lacks else "")


def _equal_tokens(result: StudyResult) -> Iterator[Block]:
    yield Heading("Loss at the end of each run" if result.own_ends else "Loss at equal tokens")
    if result.tokens is None:
        yield Text("No token count at which every finished run was validated.")
        return
    per_byte, unigram = result.card("validation_bytes_per_token"), result.card("unigram_entropy_nats")
    text = f"Validation loss in {result.unit} {result.when}. Lower is better."
    if unigram is not None:
        text += (
            f" A model that knows only token frequencies has {unigram:.4f} (unigram entropy of the validation text)."
        )
    yield Text(text)
    how = "paired" if result.pairing.status != "UNPAIRED" else "UNPAIRED"
    header = ["variant", "n", "mean", "sd over seeds", f"{how} difference [95 %, all at once]", "p", "p (Holm)"]
    rows = [header + (["bits per byte"] if per_byte else [])]
    for v in result.variants:
        if v.loss is None:
            rows.append([v.name, "0", *["-"] * (len(rows[0]) - 2)])
            continue
        sd = "-" if v.loss.sd is None else f"{v.loss.sd:.4f}"
        difference = "baseline" if v is result.baseline else signed_interval(v.difference)
        if v.difference is not None and v.difference.n < v.loss.n and how == "paired":
            difference += f" ({v.difference.n} common {'seed' if v.difference.n == 1 else 'seeds'})"
        ps = [getattr(v.difference, key, None) for key in ("p_value", "p_holm")]
        p = ["-" if value is None else p_text(value) for value in ps]
        row = [v.name, str(v.loss.n), f"{v.loss.mean:.4f}", sd, difference, *p]
        rows.append(row + ([f"{bits_per_byte(v.loss.mean, per_byte):.4f}"] if per_byte else []))
    yield Table(rows)


def _speed(result: StudyResult) -> Iterator[Block]:
    yield Heading("Training speed")
    if result.speeds.source == "missing":
        yield Text(f"Not measured. {speed_origin(result)}")
        return
    how = "median step, first 10 % of the steps left out" if result.speeds.source == "cells" else "median round"
    over = "steps" if result.speeds.source == "cells" else "rounds"
    yield Text(
        f"Tokens per second of the training step ({how}; validation and checkpoints not counted), with the quartiles "
        f"over {over}. {speed_origin(result)} FLOP ratio: the ratio to the baseline if time followed useful FLOPs; "
        "realised: the share of it that was reached."
    )
    rows = [["variant", "tokens/s", "quartiles", "ratio to baseline [95 %]", "FLOP ratio", "realised"]]
    for v in result.variants:
        if not v.speeds:
            rows.append([v.name, *["-"] * 5])
            continue
        low, middle, high = _quartiles(result, v)
        theory, ratio = flop_ratio(v, result.baseline), v.speed_ratio
        if ratio is None:
            shown, realised = "baseline" if v is result.baseline else "-", "-"
        else:
            shown = f"{ratio.mean:.3f}" + ("" if ratio.low is None else f" [{ratio.low:.3f}, {ratio.high:.3f}]")
            realised = f"{ratio.mean / theory:.0%}"
        rows.append([v.name, f"{middle:,.0f}", f"{low:,.0f} \u2013 {high:,.0f}", shown, f"{theory:.3f}", realised])
    yield Table(rows)


def _quartiles(result: StudyResult, v: VariantResult) -> tuple[float, float, float]:
    """Quartiles of tokens per second: over steps, as medians over seeds, or over the rounds of the timing part."""
    found = list(v.speeds.values())
    if result.speeds.source == "timing":
        low, middle, high = quantiles([s.tokens_per_s for s in found], n=4, method="inclusive")
        return low, middle, high
    return median([s.low for s in found]), median([s.tokens_per_s for s in found]), median([s.high for s in found])


def _fairness(result: StudyResult) -> Iterator[Block]:
    yield Heading("Is the comparison fair?")
    yield Text(f"Data: {result.pairing.status}.", "warn" if result.pairing.status == "UNPAIRED" else "plain")
    yield Items(result.pairing.lines)
    for budget, pairing in result.short_pairing.items():
        differ = [line for line in pairing.lines if "different batches" in line]
        yield Text(f"Data of budget {budget:g}: {pairing.status}.", "warn" if differ else "plain")
        if differ:
            yield Items(differ)
    if result.differences:
        yield from _spec_differences(result)
    for v in result.others:
        sections = changed_sections([d for d in result.differences if d.variant == v.name], tuned=result.tuned)
        if len(sections) > 1:
            yield Text(
                f"{v.name} changes {' and '.join(sections)} at once: a difference cannot be put down to one of them "
                "alone."
            )
    if result.circumstances:
        yield Text("CONFOUND: not equal in all finished runs:", "warn")
        yield Items(result.circumstances)
    if result.deviations:
        yield Text("CONFOUND: runs that are not what the study planned:", "warn")
        yield Items(result.deviations)
    yield Text(f"Speed: {speed_origin(result)}", "warn" if result.speeds.source == "missing" else "plain")
    resumed = [f"{c.key} ({c.record.summary['resumes']})" for c in result.cells if c.record.summary.get("resumes")]
    if resumed:
        yield Text(f"Resumed from a checkpoint (times): {', '.join(resumed)}.")


def _from_records(result: StudyResult) -> list[str]:
    every = [*result.cells, *result.short_cells]
    count = sum(c.from_record for c in every)
    if not count:
        return []
    return [
        f"{count} of {len(every)} cells were read from their records, which do not hold every step: `curves.csv` has "
        "running means of their training loss (`train-mean`) instead"
    ]


def _provenance(result: StudyResult) -> Iterator[Block]:
    yield Heading("Provenance")
    machine, versions = result.card("machine") or {}, result.card("versions") or {}
    started = sorted(c.record.run["started_at"] for c in result.cells if c.record.run.get("started_at"))
    lines = [
        f"Command: `{result.record.get('command', 'headway study run ' + str(result.record['path']))}`",
        f"Commit: `{result.card('git_commit') or 'unknown'}`, code version "
        f"{result.card('code_version') or versions.get('headway', 'unknown')}",
        "Versions: " + (", ".join(f"{k} {v}" for k, v in versions.items()) or "unknown"),
        "Machine: " + (", ".join(f"{k} {v}" for k, v in machine.items() if v is not None) or "unknown"),
        f"Data: fingerprint `{result.card('data_fingerprint') or 'none (synthetic)'}`, vocabulary "
        f"{result.card('vocab_size')}",
        *_from_records(result),
        f"Runs started {started[0]} to {started[-1]}" if started else "No run has started",
        f"Report written {time.strftime('%Y-%m-%dT%H:%M:%S%z')}; numbers per cell in `report.csv`, curves in "
        "`curves.csv`",
    ]
    yield Items(lines)
