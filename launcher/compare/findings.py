"""Findings of a study in words, and their limits. Every sentence is computed from the numbers of the study."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from headway.launcher.base.text import short_number
from headway.launcher.compare.analyse import StudyResult, VariantResult
from headway.launcher.compare.context import validation_noise
from headway.launcher.compare.effective import SpeedUp
from headway.launcher.compare.simultaneous import Simultaneous
from headway.launcher.compare.stats import paired_difference, sd_factor
from headway.launcher.compare.verdicts import Verdict, chance_of_difference, seeds_to_decide
from headway.launcher.match.matching import quantity_words

RESOLUTION_NATS = 0.01
"""A relevant difference in loss, in nats per token. The report states the number of seeds that detect it."""

LISTED = 4
"""Most undecided variants that the headline lists with their numbers."""

OWN_SEEDS = 3
"""Least seeds of a difference whose own standard error is shown: that of two seeds says too little."""

COMPUTE_OPTIMAL = 20
"""Training tokens per parameter of compute-optimal dense decoders (Hoffmann et al. 2022)."""


def headline(result: StudyResult) -> list[str]:
    """The main findings: one sentence for each verdict on losses, then the confounds."""
    name = result.baseline.name
    if result.tokens is None or result.baseline.loss is None:
        return [f"No finding: no finished run of the baseline {name} has a validation loss to compare with."]
    compared = [v for v in result.others if v.difference is not None]
    if not compared:
        return [f"No finding: no finished run of another variant can be compared with {name}."]
    sentences = [_setting(result)]
    warn = "" if result.pairing.status == "PAIRED" else f"{result.pairing.status} data: "
    if all(v.difference is not None and v.difference.low is None for v in compared):
        return [
            *sentences,
            f"{warn}with one seed there is no interval, so the loss differences to {name} ("
            + ", ".join(f"{v.name} {v.difference.mean:+.4f}" for v in compared if v.difference is not None)
            + f" {result.unit}) may be noise.",
        ]
    by_verdict: dict[Verdict, list[VariantResult]] = {}
    for v in compared:
        by_verdict.setdefault(result.verdict(v), []).append(v)
    words_of: dict[Verdict, str] = {
        "better": f"a lower validation loss than {name}",
        "worse": f"a higher validation loss than {name}",
        "equivalent": f"the validation loss of {name} within {result.margin} {result.unit}",
    }
    for verdict, words in words_of.items():
        if found := by_verdict.get(verdict):
            sentences.append(f"{warn}{_have(found)} {words}: {_listed(found)}.")
    if found := by_verdict.get("undecided"):
        listed = _listed(found) if len(found) <= LISTED else f"{len(found)} variants, which the table lists"
        sentences.append(f"{warn}Undecided against {name}: {listed}.")
    return [*sentences, *confounded_starts(result)]


def verdict_rows(result: StudyResult) -> list[tuple[str, ...]]:
    """Rows of the table of verdicts, header first."""
    header = (
        "variant",
        "verdict",
        "difference in loss [95 %, all at once]",
        "effective speed-up, FLOPs",
        "effective speed-up, seconds",
        "tokens/s",
        "KV bytes/token",
        "start: attention",
        "start: MLP",
    )
    rows: list[tuple[str, ...]] = [header]
    for v in result.variants:
        base = v is result.baseline
        marked = " CONFOUNDED" if v.start.confounded else ""
        rows.append(
            (
                v.name,
                "baseline" if base else result.verdict(v) + marked,
                "baseline" if base else signed_interval(v.difference),
                "1.00x" if base else speed_up(v.effective and v.effective.flops),
                "1.00x" if base else speed_up(v.effective and v.effective.seconds),
                "1.00x" if base else _speed_ratio(result, v),
                f"{round(v.cost['kv_bytes_per_token'], 1):,.12g}",
                _ratio(v.start.attention),
                _ratio(v.start.mlp),
            )
        )
    return rows


def _speed_ratio(result: StudyResult, v: VariantResult) -> str:
    if v.speed_ratio is None:
        return "not measured" if result.speeds.source == "missing" else "-"
    return f"{v.speed_ratio.mean:.2f}x"


def limits(result: StudyResult) -> list[tuple[str, str]]:
    """Limits of the findings: (subject, statement), computed from the numbers; header first."""
    return [("limit", "here"), *_seed_limits(result), *_other_limits(result)]


def matched_words(result: StudyResult) -> str:
    """Text such as `at parameters matched within 0.08 %`, or a statement that nothing was matched."""
    match = result.record["match"]
    if not match:
        return "with sizes as written (nothing was matched)"
    worst = max((abs(v.planned["matched"]["residual"]) for v in result.others if v.planned["matched"]), default=0.0)
    return f"at {quantity_words(match)} matched within {worst:.2%}"


def signed_interval(e: Simultaneous | None, digits: int = 4) -> str:
    """Text such as `-0.0123 [-0.0200, -0.0046]`, or only the mean if there is no interval."""
    if e is None:
        return "-"
    if e.low is None:
        return f"{e.mean:+.{digits}f} (no interval)"
    return f"{e.mean:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"


def speed_up(found: SpeedUp | None) -> str:
    """Text such as `1.42x [1.20, 1.71]`, or "not measured"."""
    return "not measured" if found is None else str(found)


def why_not_measured(result: StudyResult) -> list[str]:
    """Why effective speed-ups are not measured: one reason for the study, or one for each variant without them."""
    if result.effective.why:
        return [result.effective.why]
    return [f"{v.name}: {v.effective.why}" for v in result.others if v.effective is not None and v.effective.why]


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Compression of the validation text: nats per token / (ln 2 x bytes per token)."""
    return nats_per_token / (math.log(2) * bytes_per_token)


# ---------------------------------------------------------------- sentences of the headline


def _setting(result: StudyResult) -> str:
    counts = sorted({v.difference.n for v in result.others if v.difference is not None})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return (
        f"{result.when[0].upper()}{result.when[1:]}, {matched_words(result)}, over {seeds} "
        f"{'seed' if seeds == '1' else 'seeds'}, with 95 % intervals that hold for all comparisons at once:"
    )


def _have(variants: Sequence[VariantResult]) -> str:
    return f"{len(variants)} {'variant has' if len(variants) == 1 else 'variants have'}"


def _listed(variants: Sequence[VariantResult]) -> str:
    def key(v: VariantResult) -> float:
        return v.difference.mean if v.difference is not None else 0.0

    return ", ".join(f"{v.name} {_interval(v.difference)}" for v in sorted(variants, key=key))


def _interval(d: Simultaneous | None) -> str:
    if d is None or d.half_width is None:
        return "-" if d is None else f"{d.mean:+.4f}"
    return f"{d.mean:+.4f} \u00b1 {d.half_width:.4f}"


def confounded_starts(result: StudyResult) -> Iterator[str]:
    """A sentence on variants whose attention starts more weakly or more strongly than the baseline's, if any does."""
    found = [v for v in result.others if v.difference is not None and v.start.confounded]
    if found:
        shown = ", ".join(f"{v.name} ({_start(v)})" for v in found)
        yield (
            f"CONFOUNDED by how strongly attention starts: {shown}. A branch that starts more weakly or more strongly "
            "than the baseline's trains differently for that reason alone; give all variants one model.branch_start."
        )


def _start(v: VariantResult) -> str:
    assert v.start.largest is not None
    layer, ratio = v.start.largest
    return f"attention of layer {int(layer.removeprefix('layer_'))} at {ratio:.2f} of the baseline's"


def _ratio(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.3f}"


# ---------------------------------------------------------------- limits of the findings


def _seed_limits(result: StudyResult) -> Iterator[tuple[str, str]]:
    n = max((v.difference.n for v in result.others if v.difference is not None), default=0)
    if n == 1:
        yield "seeds", "one per variant: chance cannot be told from effect; add seeds to the study and run it again"
        return
    comparison = result.comparison
    if comparison.spread is not None:
        df = comparison.degrees_of_freedom
        yield (
            "spread of a run",
            f"{comparison.spread:.4f} {result.unit}, pooled over variants with {df} degrees of freedom; the true one "
            f"can be up to {sd_factor(df):.1f} times as large (95 % interval)",
        )
    if comparison.own_spread:
        yield (
            "spreads that differ",
            f"{', '.join(comparison.own_spread)}: too large to be pooled, so intervals rest on own seeds alone",
        )
    if (errors := _own_errors(result)) is not None:
        yield "errors of differences", errors
    widths = sorted(v.difference.half_width for v in result.others if v.difference and v.difference.half_width)
    if widths:
        span = f"{widths[0]:.4f}" if widths[-1] - widths[0] < 5e-5 else f"{widths[0]:.4f} to {widths[-1]:.4f}"
        yield "smallest visible difference", f"about {span} {result.unit} with {n} seeds"
    if comparison.spread:
        yield f"a difference of {RESOLUTION_NATS}", _seeds_for_resolution(result)
    undecided = [v.name for v in result.others if v.difference is not None and result.verdict(v) == "undecided"]
    if undecided and comparison.spread:
        found = "; ".join(_seeds_for(result, name) for name in undecided)
        yield "seeds that would decide", f"{found}; if the means and the spread seen here are the true ones"


def _own_errors(result: StudyResult) -> str | None:
    """Standard errors by the seeds of each pooled difference alone, beside the pooled one; None with few seeds."""
    own, pooled = list[float](), list[float]()
    for v in result.others:
        alone = paired_difference(v.losses, result.baseline.losses)
        d = v.difference
        if d is not None and d.pooled and d.standard_error and alone is not None and alone.sd and d.n >= OWN_SEEDS:
            own.append(alone.sd / math.sqrt(d.n))
            pooled.append(d.standard_error)
    if not own:
        return None
    text = f"{_span(own)} by the seeds of each difference alone, {_span(pooled)} by the pooled spread"
    if min(a / b for a, b in zip(own, pooled, strict=True)) > 1:
        text += ". All of the first are larger: the pooled intervals may be too narrow"
    return text


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4f}", f"{max(values):.4f}"
    return low if low == high else f"{low} to {high}"


def _seeds_for_resolution(result: StudyResult) -> str:
    comparison = result.comparison
    count, spread = len(comparison.differences), comparison.spread
    assert spread is not None
    need = next((k for k in range(2, 1001) if chance_of_difference(k, count, spread, RESOLUTION_NATS) >= 0.8), None)
    return f"{'more than 1,000' if need is None else need} seeds show one with 80 % power at the spread seen here"


def _seeds_for(result: StudyResult, name: str) -> str:
    found = seeds_to_decide(result.comparison, name, result.margin)
    if found is None:
        return f"{name}: more than 1,000"
    return f"{name}: {found.count} ({found.shows})"


def _other_limits(result: StudyResult) -> Iterator[tuple[str, str]]:
    if (scale := _scale(result)) is not None:
        yield "scale", scale
    fingerprint = result.card("data_fingerprint")
    corpus = f"one corpus (fingerprint {str(fingerprint)[:16]})" if fingerprint else "one source of data"
    yield "data", f"{corpus}; on other text the order of the variants can be another one"
    if (noise := validation_noise(result)) is not None:
        yield (
            "validation text",
            f"{noise.tokens:,} predicted tokens ({noise.groups}), the same in all runs: intervals are over seeds, and "
            "do not contain the sampling of this text",
        )
    differing = {d.key for d in result.differences if d.key.split(".")[0] in ("optimizer", "schedule")}
    if differing - result.tuned:
        yield "optimizer", "settings differ between variants: part of a difference may be theirs"
    elif differing:
        yield (
            "optimizer",
            f"{', '.join(sorted(differing))} was tuned for each variant: the error of the search is part of a "
            "difference. All other settings are the same for all, and may suit some better than others",
        )
    else:
        yield "optimizer", "one set of settings for all variants, which may suit some of them better than others"
    if not result.tokens_are_final and result.tokens is not None:
        yield (
            "end of training",
            f"the runs do not all end at {result.tokens:,} tokens, where losses are compared: some are still in the "
            "middle of their learning-rate schedule there",
        )
    if result.own_ends:
        yield (
            "length of runs",
            "the variants are trained on different numbers of tokens, by the design of the study: see the section on "
            "uptraining for what each of them costs",
        )
    if reasons := why_not_measured(result):
        yield "effective speed-up", f"not measured: {'; '.join(reasons)}"


def measured_speed_holds_for(result: StudyResult) -> str:
    """What a measured speed holds for: machine, implementation, size, sequence length, layout, other load."""
    timed, attempts = result.speeds.card, result.card("attempts")
    machine, versions = (timed.get(key) or result.card(key) or {} for key in ("machine", "versions"))
    code = ", ".join(f"{name} {versions[name]}" for name in ("headway", "torch", "deepspeed") if versions.get(name))
    layout = attempts[-1].get("layout") if isinstance(attempts, list) and attempts else None
    seq_len = next((c.planned.get("data", {}).get("seq_len") for c in result.cells), None)
    return (
        f"measured on {machine.get('gpu') or machine.get('cpu') or 'an unknown machine'} with "
        f"{machine.get('cores', '?')} cores, by this implementation ({code or 'unknown versions'}), at "
        f"{short_number(result.baseline.cost['num_params'])} parameters and sequences of {seq_len or '?'} tokens, as "
        f"{layout or 'an unknown layout'}; with another of these it can be another one. {_load(result)}"
    )


def speed_origin(result: StudyResult) -> str:
    """How the speeds of the report were taken, or why it has none: one sentence or two."""
    speeds = result.speeds
    if result.record.get("comparison"):
        return "Speeds were taken from the steps of the runs, which may have shared the machine with each other."
    if speeds.source == "cells":
        return "Speeds were taken from the steps of the cells, which trained one after another."
    beside = f"Cells trained beside up to {speeds.beside} other{'' if speeds.beside == 1 else 's'}"
    if speeds.source == "timing":
        return (
            f"{beside}, so their own speeds are not compared. Speeds were taken afterwards from all variants alone, in "
            f"turns in one process, over {speeds.rounds} rounds: intervals are those over rounds."
        )
    advice = "The command of the study, without --no-timing, times the variants of runs of one process alone"
    if str(result.record.get("command", "")).startswith("headway probe"):
        advice = "Probe tasks are not timed; headway probe run --jobs 1 --fresh trains one cell after another"
    return (
        "Speeds were taken beside other cells, which share caches and memory bandwidth, and are not compared: "
        f"{beside[0].lower()}{beside[1:]}, and {speeds.why}. {advice}."
    )


def _load(result: StudyResult) -> str:
    if result.speeds.source == "timing":
        return "Variants took turns step by step, so other load on the machine affects all of them"
    how = "may have shared the machine" if result.record.get("comparison") else "ran one after another"
    return f"Runs {how}, so other load on the machine shows in them"


def shape_words(result: StudyResult) -> str:
    """Sequence length, the share of the attention core there, and vocabulary, as far as the runs recorded them."""
    base = result.baseline.name
    first = next((c for c in result.cells if c.variant == base and c.record.run), None)
    if first is None:
        return ""
    found = []
    seq_len, vocabulary = (first.planned.get("data") or {}).get("seq_len"), first.record.run.get("vocab_size")
    cost = first.record.run.get("cost") or {}
    core, useful = cost.get("flops_per_token_attention_core"), cost.get("flops_per_token_useful")
    if seq_len is not None:
        share = f", where the attention core has {core / useful:.0%} of {base}'s FLOPs" if core and useful else ""
        found.append(f"sequences of {seq_len:,} tokens{share}")
    if vocabulary is not None:
        found.append(f"a vocabulary of {vocabulary:,}")
    return "; ".join(found)


def _scale(result: StudyResult) -> str | None:
    params, tokens = result.baseline.cost["num_params"], result.tokens_of(result.baseline.name)
    if tokens is None:
        return None
    per_param = tokens / params
    line = f"{short_number(params)} parameters, {short_number(tokens)} tokens, {per_param:.2g} tokens per parameter"
    if per_param < 0.9 * COMPUTE_OPTIMAL:
        line += f" (compute-optimal training uses about {COMPUTE_OPTIMAL})"
    if words := shape_words(result):
        line += f"; {words}"
    if params < 1e9:
        line += "; an order of the variants at this size is no evidence about larger ones"
    return line
