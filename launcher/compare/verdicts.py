"""What intervals let one say: verdicts, answers to questions asked beforehand, and the seeds that would decide.

Better or worse: the simultaneous interval of the difference excludes 0. Equivalent: two one-sided tests (Schuirmann
1987) at 5 % each show that the difference is inside the margin; as an interval, the one at 90 % lies inside it. All of
them for every variant at once (`headway.launcher.compare.simultaneous`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from headway.launcher.compare.simultaneous import Comparison, Simultaneous, dunnett_critical
from headway.launcher.compare.stats import CONFIDENCE, sd_factor

Verdict = Literal["better", "worse", "equivalent", "undecided"]

MOST_SEEDS = 1000
"""No larger number of seeds is looked at."""


def verdict(difference: Simultaneous, margin: float | None = None) -> Verdict:
    """Of a difference in loss (variant - baseline, nats per token). `margin`: differences below it do not matter.

    A difference that is shown, and shown to be smaller than the margin, is "equivalent".
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
    """Whether the variant is worse than the baseline by less than `margin` (0: is better). None where undecided.

    Yes where the one-sided test shows it, no where the opposite is shown; both at 5 %, for all variants at once.
    """
    if difference.equivalence is None:
        return None
    low, high = difference.equivalence
    if high < margin:
        return True
    return False if low > margin else None


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """A number of seeds, and what it would show ("a difference" or "equivalence") with the chance asked for."""

    count: int
    shows: Literal["a difference", "equivalence"]


def seeds_to_decide(
    comparison: Comparison, name: str, margin: float | None = None, *, power: float = 0.8
) -> Seeds | None:
    """Seeds per variant that decide about one variant if its mean difference and the pooled spread are the true ones.

    None where more than `MOST_SEEDS` would be needed, or no spread is known.
    """
    found, spread, count = comparison.differences[name], comparison.spread, len(comparison.differences)
    if spread is None:
        return None
    for n in range(2, MOST_SEEDS + 1):
        if chance_of_difference(n, count, spread, found.mean) >= power:
            return Seeds(count=n, shows="a difference")
        if margin is not None and chance_of_equivalence(n, count, spread, found.mean, margin) >= power:
            return Seeds(count=n, shows="equivalence")
    return None


def chance_of_difference(
    n: int, comparisons: int, spread: float, difference: float, *, confidence: float = CONFIDENCE
) -> float:
    """Chance that a paired study of n seeds shows a true `difference` of one of its variants, with the right sign.

    Noncentral t of the pooled model; `spread` is the sd of one run given its variant and seed.
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
    """Chance that a paired study of n seeds shows a true `difference` to lie within +-`margin`.

    The spread is taken as known, which is a good approximation from about 10 degrees of freedom on.
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
    """The upper end of the 95 % interval of the pooled spread: a pilot's own estimate may be too small by chance."""
    if comparison.spread is None:
        return None
    return comparison.spread * sd_factor(comparison.degrees_of_freedom)
