"""Format numbers and times for people."""

from __future__ import annotations


def duration(seconds: float | None) -> str:
    """1h02m, 3m07s, 12s; a dash when unknown."""
    if seconds is None:
        return "-"
    s = max(0, round(seconds))
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


def age(seconds: float) -> str:
    """2.5 d, 1.0 h, 3.2 m, 12 s."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def disk_size(count: int) -> str:
    """Bytes as 3.2 GB, 12.5 MB, 0.4 kB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


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
