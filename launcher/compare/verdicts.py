"""Conclusions from intervals: verdicts, answers to questions stated beforehand, and the number of seeds for a decision.

Better or worse: the simultaneous interval of the difference excludes 0. Equivalent: two one-sided tests (Schuirmann
1987) at 5 % each show that the difference is inside the margin; equivalently, the 90 % interval lies inside the margin.
All tests are simultaneous for all variants (`headway.launcher.compare.simultaneous`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from headway.launcher.base.intervals import CONFIDENCE, t_critical
from headway.launcher.compare.simultaneous import Comparison, Simultaneous, dunnett_critical, sidak
from headway.launcher.compare.stats import power_of_paired_test, sd_factor

Verdict = Literal["better", "worse", "equivalent", "undecided"]

MOST_SEEDS = 1000
"""Maximum number of seeds in a search."""


def verdict(difference: Simultaneous, margin: float | None = None) -> Verdict:
    """Verdict on a difference in loss (variant - baseline, nats per token). Differences below `margin` do not matter.

    A difference that is significant, but shown to be smaller than the margin, is "equivalent".
    """
    inside = difference.equivalence
    if margin is not None and inside is not None and -margin < inside[0] and inside[1] < margin:
        return "equivalent"
    if difference.low is None or difference.high is None:
        return "undecided"
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "undecided"


def not_worse_by(difference: Simultaneous, margin: float) -> bool | None:
    """Whether the variant is worse than the baseline by less than `margin` (0: is better). None if undecided.

    True if the one-sided test shows it, False if a test shows the opposite; both at 5 %, simultaneous for all variants.
    """
    if difference.equivalence is None:
        return None
    low, high = difference.equivalence
    if high < margin:
        return True
    return False if low > margin else None


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """A number of seeds, and the result ("a difference" or "equivalence") that it shows with the requested power."""

    count: int
    shows: Literal["a difference", "equivalence"]


def seeds_to_decide(
    comparison: Comparison, name: str, margin: float | None = None, *, power: float = 0.8
) -> Seeds | None:
    """Seeds per variant that decide about one variant if its mean difference and the spread are the true values.

    The spread is the pooled one, or that of its own differences where it is not pooled. None if more than `MOST_SEEDS`
    are needed or the spread is unknown.
    """
    found, spread, count = comparison.differences[name], comparison.spread, len(comparison.differences)
    if spread is None:
        return None
    if not found.pooled:
        return _own_seeds_to_decide(found, count, margin, power)
    for n in range(2, MOST_SEEDS + 1):
        if chance_of_difference(n, count, spread, found.mean) >= power:
            return Seeds(count=n, shows="a difference")
        if margin is not None and chance_of_equivalence(n, count, spread, found.mean, margin) >= power:
            return Seeds(count=n, shows="equivalence")
    return None


def _own_seeds_to_decide(found: Simultaneous, count: int, margin: float | None, power: float) -> Seeds | None:
    """`seeds_to_decide` by the differences of a variant alone, at the Sidak level for `count` comparisons."""
    from scipy import special

    if found.standard_error is None:
        return None
    sd, level = found.standard_error * math.sqrt(found.n), sidak(count)
    for n in range(2, MOST_SEEDS + 1):
        error = sd / math.sqrt(n)
        if not error or power_of_paired_test(n, sd, found.mean, confidence=level) >= power:
            return Seeds(count=n, shows="a difference")
        if margin is not None:
            room, shift = margin / error - t_critical(n - 1, 2 * level - 1), found.mean / error
            if special.ndtr(room - shift) - special.ndtr(-room - shift) >= power:
                return Seeds(count=n, shows="equivalence")
    return None


def chance_of_difference(
    n: int, comparisons: int, spread: float, difference: float, *, confidence: float = CONFIDENCE
) -> float:
    """Probability that a paired study of n seeds shows a true `difference` of one of its variants with the right sign.

    Uses the noncentral t distribution of the pooled model. `spread`: the sd of one run given its variant and seed.
    """
    from scipy import special

    df = comparisons * (n - 1)
    if df < 1 or not difference:
        return 0.0
    if not spread:
        return 1.0
    critical = dunnett_critical(comparisons, df, confidence=confidence)
    below = float(special.nctdtr(df, abs(difference) / (spread * math.sqrt(2 / n)), critical))
    return 1.0 if math.isnan(below) else 1.0 - below  # far in the tail the series underflows to nan


def chance_of_equivalence(
    n: int, comparisons: int, spread: float, difference: float, margin: float, *, confidence: float = CONFIDENCE
) -> float:
    """Probability that a paired study of n seeds shows that a true `difference` lies within +-`margin`.

    The spread is assumed to be known, which is a good approximation for at least about 10 degrees of freedom.
    """
    from scipy import special

    df = comparisons * (n - 1)
    if df < 1:
        return 0.0
    error = spread * math.sqrt(2 / n)
    if not error:
        return float(abs(difference) < margin)
    room = margin / error - dunnett_critical(comparisons, df, confidence=2 * confidence - 1)
    shift = difference / error
    return max(0.0, float(special.ndtr(room - shift) - special.ndtr(-room - shift)))


def cautious_spread(comparison: Comparison) -> float | None:
    """Upper end of the 95 % interval of the pooled spread. The estimate of a pilot may be too small by chance."""
    if comparison.spread is None:
        return None
    return comparison.spread * sd_factor(comparison.degrees_of_freedom)
