"""Differences over the course of training: at every validation, and the change between the middle and the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from headway.launcher.compare.simultaneous import Comparison, Simultaneous, compare_paired
from headway.launcher.run.records import Curve


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Differences to the baseline at each token count at which all finished runs were validated.

    `change`: change of each difference between `middle` and the last of `tokens`, paired by seed; None with fewer than
    three validations.
    """

    tokens: tuple[int, ...]
    comparisons: tuple[Comparison, ...]
    middle: int | None
    change: Comparison | None

    def of(self, variant: str) -> list[tuple[int, Simultaneous]]:
        """(tokens, difference) of one variant, in order."""
        pairs = zip(self.tokens, self.comparisons, strict=True)
        return [(tokens, c.differences[variant]) for tokens, c in pairs if variant in c.differences]


def trend_of(curves: Mapping[str, Mapping[int, Curve]], baseline: str) -> Trend | None:
    """The trend. `curves`: variant -> seed -> validation curve of a finished run. None if the baseline has none.

    Use it only for paired studies: it assumes that all runs saw the same data.
    """
    if not curves.get(baseline):
        return None
    each = [c for by_seed in curves.values() for c in by_seed.values()]
    # Without a validation before the first step (`train.validate_first`), where no difference has been trained yet.
    common = set.intersection(*({int(t) for t in c.tokens if math.isfinite(t) and t > 0} for c in each))
    tokens = sorted(common)
    if not tokens:
        return None

    def at(count: int) -> dict[str, dict[int, float]]:
        found = {
            v: {seed: curve.loss_at_tokens(count) for seed, curve in by_seed.items()} for v, by_seed in curves.items()
        }
        return {
            v: {s: x for s, x in by_seed.items() if x is not None and math.isfinite(x)} for v, by_seed in found.items()
        }

    comparisons = tuple(compare_paired(at(count), baseline) for count in tokens)
    if len(tokens) < 3:
        return Trend(tokens=tuple(tokens), comparisons=comparisons, middle=None, change=None)
    middle = min(tokens[:-1], key=lambda count: abs(count - tokens[-1] / 2))
    early, late = at(middle), at(tokens[-1])
    change = {v: {s: late[v][s] - early[v][s] for s in late[v].keys() & early[v].keys()} for v in late}
    return Trend(tokens=tuple(tokens), comparisons=comparisons, middle=middle, change=compare_paired(change, baseline))


def not_pooled(trend: Trend, baseline: str) -> str | None:
    """Which changes since the middle have a spread that is not pooled, and what that means; None if all are pooled.

    A change that is "shown" by a pool without them may not be shown by a pool with them.
    """
    if trend.change is None or not (names := trend.change.own_spread):
        return None
    whose = "all intervals" if baseline in names else "intervals of such variants"
    others = "" if baseline in names else ", and those of the others do not contain it"
    return (
        f"The spread of the changes since {trend.middle:,} tokens is too large to be pooled for {', '.join(names)}: "
        f"{whose} rest on own seeds alone{others}."
    )


def sentence(trend: Trend, variant: str) -> str | None:
    """Text such as `-0.530 at 25,600 tokens, -0.200 at 204,800, shrinking`; None with fewer than two points."""
    points = trend.of(variant)
    if len(points) < 2:
        return None
    (first, early), (last, late) = points[0], points[-1]
    text = f"{early.mean:+.3f} at {first:,} tokens, {late.mean:+.3f} at {last:,}"
    change = trend.change.differences.get(variant) if trend.change else None
    if change is None or change.low is None:
        return text
    if not change.excludes(0):
        return f"{text}; no change shown since {trend.middle:,} tokens"
    towards_zero = change.mean * late.mean < 0 or (late.mean == 0)
    crossed = (late.mean - change.mean) * late.mean < 0
    word = "changing sign" if crossed else ("still shrinking" if towards_zero else "still growing")
    return f"{text}; {word} ({change.mean:+.3f} since {trend.middle:,} tokens)"
