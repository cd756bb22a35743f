"""Numbers and times as people read them."""

from __future__ import annotations


def duration(seconds: float | None) -> str:
    """1h02m, 3m07s, 12s; a dash when unknown."""
    if seconds is None:
        return "-"
    s = max(0, round(seconds))
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


def short_number(value: float) -> str:
    """1500000 -> 1.5M; 3e15 -> 3e15; at most three digits."""
    if value == 0:
        return "0"
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 1e15:
            mantissa, exponent = f"{value:.2e}".split("e")
            return f"{float(mantissa):g}e{int(exponent)}"
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"
