"""Types of numeric options for argparse: each has a legal range. NaN and infinity are in no range.

A value outside of its range ends the command with the usage of the verb and exit status 64, before anything is read.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from headway.launcher.base.errors import printable

MOST = 10**9
"""Default upper limit of `whole`: above it, an option is a mistake."""

SEEDS = 2**63 - 1
"""Largest seed that torch takes as a signed 64-bit number."""


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Type of an option that takes a whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{printable(text)!r} is not a whole number; use one from {least} to {most}"
            ) from None
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"{printable(text)} is out of range; use a whole number from {least} to {most}"
            )
        return number

    return read


def whole_list(least: int, most: int = MOST) -> Callable[[str], list[int]]:
    """Type of an option that takes whole numbers from `least` to `most`, separated by commas."""
    one = whole(least, most)
    return lambda text: [one(word) for word in text.split(",")]


def real(*, least: float | None = None, above: float = 0.0, most: float) -> Callable[[str], float]:
    """Type of an option that takes a number from `least`, or above `above` if `least` is None, up to `most`."""
    wanted = f"above {above:g} and up to {most:g}" if least is None else f"from {least:g} to {most:g}"

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{printable(text)!r} is not a number; use one {wanted}") from None
        inside = number > above if least is None else number >= least
        if not math.isfinite(number) or not inside or number > most:
            raise argparse.ArgumentTypeError(f"{printable(text)} is out of range; use a number {wanted}")
        return number

    return read
