"""What a study's numbers say in words, and what they cannot say. Every sentence is computed; none is a fixed claim."""

from __future__ import annotations

import math

from headway.launcher.base.text import short_number
from headway.launcher.compare.analyse import StudyResult, VariantResult
from headway.launcher.compare.stats import CONFIDENCE, Estimate, sd_factor, seeds_needed, t_critical
from headway.launcher.match.matching import quantity_words

RESOLUTION_NATS = 0.01
"""A difference in loss that would matter to a reader; the seeds needed to see it are reported."""

COMPUTE_OPTIMAL = 20
"""Training tokens per parameter of compute-optimal dense decoders (Hoffmann et al. 2022)."""


def headline(result: StudyResult) -> list[str]:
    """The finding, one sentence per kind: loss, then speed."""
    name = result.baseline.name
    if result.tokens is None or result.baseline.loss is None:
        return [f"No finding: no finished run of the baseline {name} has a validation loss to compare with."]
    compared = [v for v in result.others if v.difference is not None]
    if not compared:
        return [f"No finding: no finished run of another variant can be compared with {name}."]
    sentences = [_setting(result)]
    warn = "" if result.pairing.status == "PAIRED" else f"{result.pairing.status} data: "
    told_apart = [v for v in compared if v.difference is not None and v.difference.excludes(0)]
    sentences += [warn + _told_apart(v, name) for v in told_apart]
    unsure = [v for v in compared if v not in told_apart and v.difference is not None and v.difference.low is not None]
    if unsure:
        shown = ", ".join(f"{v.name} ({_interval(v.difference)})" for v in unsure)
        sentences.append(
            f"{warn}{name} cannot be distinguished by its loss from {shown}: the 95 % interval of the difference "
            "contains 0."
        )
    alone = [v for v in compared if v.difference is not None and v.difference.low is None]
    if alone:
        shown = ", ".join(f"{v.name} {v.difference.mean:+.4f}" for v in alone if v.difference is not None)
        sentences.append(
            f"{warn}With one seed there is no interval, so the loss differences to {name} ({shown} nats per token) "
            "may be noise."
        )
    return sentences + _speed_sentences(result)


def limits(result: StudyResult) -> list[str]:
    """What the numbers cannot support, each line from the numbers."""
    lines = [*_seed_lines(result), *_scale_lines(result)]
    k = len([v for v in result.others if v.difference is not None and v.difference.low is not None])
    if k > 1:
        lines.append(
            f"{k} differences are shown with 95 % intervals each; the chance that at least one of them misses the "
            f"truth can be up to {min(100, 100 * k * (1 - CONFIDENCE)):.0f} %."
        )
    fingerprint = result.card("data_fingerprint")
    corpus = f"corpus (fingerprint {str(fingerprint)[:16]})" if fingerprint else "source of data"
    lines.append(f"Only one {corpus} was used; on other text the order of the variants can be another one.")
    if any(d.key.split(".")[0] in ("optimizer", "schedule") for d in result.differences):
        lines.append(
            "Optimizer settings differ between variants (see the list of differences): part of a difference may be "
            "theirs."
        )
    else:
        lines.append(
            "All variants share one set of optimizer settings, which may suit some of them better than others."
        )
    if not result.tokens_are_final and result.tokens is not None:
        lines.append(
            f"The runs do not all end at {result.tokens:,} tokens, where losses are compared: some are still in the "
            "middle of their learning-rate schedule there."
        )
    machine = result.card("machine") or {}
    lines.append(
        "Speeds hold for this implementation on this machine "
        f"({machine.get('gpu') or machine.get('cpu') or 'unknown'}, {machine.get('cores', '?')} cores); runs ran one "
        "after another, so other load on the machine shows in them."
    )
    return lines


def matched_words(result: StudyResult) -> str:
    """`at parameters matched within 0.08 %`, or that nothing was matched."""
    match = result.record["match"]
    if not match:
        return "with sizes as written (nothing was matched)"
    worst = max((abs(v.planned["matched"]["residual"]) for v in result.others if v.planned["matched"]), default=0.0)
    return f"at {quantity_words(match)} matched within {worst:.2%}"


def signed_interval(e: Estimate | None, digits: int = 4) -> str:
    """`-0.0123 [-0.0200, -0.0046]`, or the mean alone where there is no interval."""
    if e is None:
        return "-"
    if e.low is None:
        return f"{e.mean:+.{digits}f} (no interval)"
    return f"{e.mean:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"


def _setting(result: StudyResult) -> str:
    seeds = sorted({c.seed for c in result.cells if c.done})
    return (
        f"After {result.tokens:,} training tokens, {matched_words(result)}, over {len(seeds)} "
        f"{'seed' if len(seeds) == 1 else 'seeds'}:"
    )


def _told_apart(v: VariantResult, baseline: str) -> str:
    d = v.difference
    assert d is not None and d.half_width is not None
    word = "lower (better)" if d.mean < 0 else "higher (worse)"
    return (
        f"{v.name}'s validation loss is {word} than {baseline}'s by {abs(d.mean):.4f} \u00b1 {d.half_width:.4f} nats "
        f"per token (95 % interval, n = {d.n})."
    )


def _interval(d: Estimate | None) -> str:
    assert d is not None and d.half_width is not None
    return f"{d.mean:+.4f} \u00b1 {d.half_width:.4f}, n = {d.n}"


def _speed_sentences(result: StudyResult) -> list[str]:
    parts = []
    for v in result.others:
        r = v.speed_ratio
        if r is None:
            continue
        span = "one seed" if r.low is None else f"{r.low:.2f} to {r.high:.2f}"
        parts.append(f"{v.name} {r.mean:.2f}\u00d7 ({span})")
    if not parts:
        return []
    unsure = [v.name for v in result.others if v.speed_ratio is not None and not v.speed_ratio.excludes(1)]
    tail = f"; no difference in speed is shown for {', '.join(unsure)}" if unsure else ""
    return [f"Training speed against {result.baseline.name} in tokens/s: {', '.join(parts)}{tail}."]


def _seed_lines(result: StudyResult) -> list[str]:
    lines = []
    n = max((v.difference.n for v in result.others if v.difference is not None), default=0)
    if n == 1:
        lines.append(
            "One seed per variant: chance cannot be told from effect at all. Add seeds to the study and run it again."
        )
    if 2 <= n <= 5:
        lines.append(
            f"Few seeds: with n = {n} an interval is {t_critical(n - 1):.1f} standard errors to each side (2.0 with "
            f"many seeds), and a true spread can be up to {sd_factor(n - 1):.1f} times the one seen (95 % interval)."
        )
    for v in result.others:
        d = v.difference
        if d is None or d.sd is None or d.half_width is None or result.pairing.status == "UNPAIRED":
            continue
        need = seeds_needed(d.sd, RESOLUTION_NATS)
        text = f"{need:,}" if need is not None else "more than 10,000"
        line = (
            f"{v.name}: differences below about {d.half_width:.4f} nats per token are invisible here. If the spread "
            f"seen here ({d.sd:.4f}) is the true one, {text} seeds show a difference of {RESOLUTION_NATS} nats with "
            "80 % power"
        )
        if not d.excludes(0) and d.mean != 0:
            own = seeds_needed(d.sd, d.mean)
            line += f", and {f'{own:,}' if own is not None else 'more than 10,000'} seeds one as large as the one seen"
        lines.append(line + ".")
    return lines


def _scale_lines(result: StudyResult) -> list[str]:
    params, tokens = result.baseline.cost["num_params"], result.tokens
    if tokens is None:
        return []
    per_param = tokens / params
    line = (
        f"Small scale: {short_number(params)} parameters and {short_number(tokens)} tokens, {per_param:.2g} tokens per "
        "parameter"
    )
    if per_param < COMPUTE_OPTIMAL / 2:
        line += f" (compute-optimal training uses about {COMPUTE_OPTIMAL})"
    line += "; an order of the variants at this size is no evidence about larger ones." if params < 1e9 else "."
    return [line if params < 1e9 else line.removeprefix("Small scale: ")]


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Compression of the validation text: nats per token / (ln 2 x bytes per token)."""
    return nats_per_token / (math.log(2) * bytes_per_token)
