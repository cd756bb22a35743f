"""Numbers of `headway bench report` as text."""

from __future__ import annotations

from collections.abc import Mapping

NOT_MEASURED = "not measured"


def number(value: float | None, *, missing: str = NOT_MEASURED) -> str:
    return missing if value is None else f"{value:.2f}"


def spread_text(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"


def rate(value: float | None, unit: str) -> str:
    """1.2e12 -> 1.20 TFLOP/s."""
    if not value:
        return NOT_MEASURED
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return (
                f"{value / scale:,.2f} {prefix}{unit}"
                if value < 100 * scale
                else f"{value / scale:,.0f} {prefix}{unit}"
            )
    return f"{value:,.0f} {unit}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOT_MEASURED
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
