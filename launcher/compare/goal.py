"""Whether variants can reach the goal of a study: a better loss than the baseline, and a speed at long sequences.

The loss is measured at the study's sizes. The speed is only bounded, by the FLOPs of a larger model
(`headway.launcher.match.bounds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headway.launcher.compare.simultaneous import Simultaneous


@dataclass(frozen=True, kw_only=True)
class AtSize:
    """Difference of a variant to the baseline at one size; `size` is empty in a study without sizes."""

    size: str
    difference: Simultaneous


def largest_known(sizes: Sequence[tuple[str, Mapping[str, Simultaneous]]]) -> dict[str, AtSize]:
    """Variant -> its difference at the largest size with an interval, or at the largest one if none has an interval.

    `sizes`: (name, variant -> difference) by increasing size.
    """
    found: dict[str, AtSize] = {}
    for name, differences in sizes:
        for variant, own in differences.items():
            if own.low is not None or variant not in found or found[variant].difference.low is None:
                found[variant] = AtSize(size=name, difference=own)
    return found


def short_of(bounds: Mapping[str, Any], variant: str) -> list[int]:
    """Lengths of the goal at which FLOPs do not allow the variant the speed that it needs."""
    speed_up = bounds["variants"][variant]["speed_up"]
    return [int(n) for n, ratio in bounds.get("goal", {}).items() if speed_up[n] < ratio]


def goal_words(bounds: Mapping[str, Any], variant: str, found: AtSize | None) -> str:
    """What is known about the goal, such as `open: loss undecided`."""
    if lengths := short_of(bounds, variant):
        return f"out of reach: too many FLOPs at {' and '.join(f'{n:,}' for n in lengths)} tokens"
    if found is None:
        return "open: loss not measured"
    low, high = found.difference.low, found.difference.high
    if low is None or high is None:
        return "open: loss without an interval"
    if low > 0:
        return "refuted here: the loss is worse"
    if high < 0:
        return "open: the loss is better, the speed is not measured"
    return "open: loss undecided"
