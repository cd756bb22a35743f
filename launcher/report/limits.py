"""What the numbers of a ladder of sizes cannot say, computed from them."""

from __future__ import annotations

from collections.abc import Iterator

from headway.launcher.compare.context import validation_noise
from headway.launcher.compare.findings import matched_words, shape_words
from headway.launcher.compare.ladder.noise import Means
from headway.launcher.compare.ladder.read import LadderStudy
from headway.launcher.compare.ladder.slope import DOUBLING, Lines
from headway.launcher.compare.stats import sd_factor
from headway.launcher.report.scaling import lack_words


def ladder_limits(study: LadderStudy) -> Iterator[tuple[str, str]]:
    """(subject, statement), computed from the numbers."""
    result = study.result
    if isinstance(result.means, Means):
        noise = result.means.noise
        factor = sd_factor(noise.sigma_df)
        yield (
            "noise of a run",
            f"{noise.sigma:.4f} nats (standard deviation given its variant and seed), from {noise.sigma_df} degrees "
            f"of freedom over all sizes; the true one can be up to {factor:.1f} times as large. It is taken to be the "
            f"same at all sizes and for all variants. {_noise_by_size(study)}",
        )
        yield (
            "effect of a seed",
            f"{noise.omega:.4f} nats on all variants of a size, from {noise.seed_df} degrees of freedom",
        )
    if isinstance(result.lines, Lines):
        widths = [line.critical * line.standard_error * DOUBLING for line in result.lines.by_variant.values()]
        low, high = f"{min(widths):.4f}", f"{max(widths):.4f}"
        span = low if low == high else f"{low} to {high}"
        yield (
            "smallest visible trend",
            f"about {span} nats per doubling of parameters, half the width of the intervals; a true trend of this size "
            "is found in about half of such ladders",
        )
        yield "lack of fit of the lines", lack_words(result.lines.lack)
    odd = [f"{s.name}: {', '.join(own)}" for s in study.sizes if s.study and (own := s.study.comparison.own_spread)]
    if odd:
        yield (
            "spreads that differ",
            f"{'; '.join(odd)}: their noise is larger than that of the others, but is pooled here; their intervals are "
            "too narrow",
        )
    if matched := [f"{s.name}: {matched_words(s.study).removeprefix('at ')}" for s in study.sizes if s.study]:
        yield "matching", f"{'; '.join(matched)}. What is left of a difference in parameters is in no interval"
    if early := [s.name for s in study.sizes if s.study and s.study.tokens and not s.study.tokens_are_final]:
        yield (
            "end of training",
            f"{', '.join(early)}: not all runs end where losses are compared; some are still in the middle of their "
            "learning-rate schedule there",
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
    noises = ((s.name, validation_noise(s.study)) for s in study.sizes if s.study is not None)
    if (text := next((found for found in noises if found[1] is not None), None)) and text[1] is not None:
        yield (
            "validation text",
            f"{text[1].tokens:,} predicted tokens at {text[0]} ({text[1].groups}), the same in all its runs: the "
            f"standard error of a loss is {text[1].standard_error:.4f} nats. What of it does not cancel in a "
            "difference is in no interval",
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
    if edges := study.tuning.on_edge(key):
        text += f". On an edge of the values tried, beyond which a better one may lie: {', '.join(edges)}"
    carried = [size for size in dict.fromkeys(s.size for s in searches) if size not in at]
    if not carried:
        return text
    checked = ", ".join(
        f"that of {c.variant} at {c.size}" + ("" if c.holds else f" (no: {c.best:.4g} is better)")
        for c in study.tuning.checks
        if c.key == key
    )
    return (
        f"{text}. Carried to {', '.join(carried)} by a rule; checked: {checked or 'none yet'}. A rule that suits one "
        "variant less looks like a trend"
    )


def _noise_by_size(study: LadderStudy) -> str:
    """The spread that each size gives alone, and which sizes give none."""
    used = [(s.name, s.study.comparison) for s in study.sizes if s.study is not None and not s.left_out]
    known = [f"{name} {c.spread:.4f} ({c.degrees_of_freedom})" for name, c in used if c.spread is not None]
    unknown = [name for name, c in used if c.spread is None]
    text = f"By size, with degrees of freedom: {', '.join(known) or 'none'}"
    if not unknown:
        return text
    have = "has" if len(unknown) == 1 else "have"
    return f"{text}; {', '.join(unknown)} {have} no second seed to estimate it from, and {have} that of the others"
