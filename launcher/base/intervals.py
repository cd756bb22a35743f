"""Confidence intervals by Student's t. The statistics of comparisons are in `headway.launcher.compare.stats`."""

from __future__ import annotations

CONFIDENCE = 0.95
"""Of all intervals that are shown."""


def t_critical(degrees_of_freedom: float, confidence: float = CONFIDENCE) -> float:
    """Two-sided critical value of Student's t."""
    from scipy import special

    return float(special.stdtrit(degrees_of_freedom, 0.5 + confidence / 2))


def interval(value: float, standard_error: float, *, groups: int) -> tuple[float, float]:
    """(low, high) of a value whose standard error is from `groups` independent groups, two or more."""
    half = t_critical(groups - 1) * standard_error
    return value - half, value + half
