"""Names of the ways to convert attention. Imports nothing, so that specs and the command line can name them."""

from __future__ import annotations

from typing import Literal, get_args

How = Literal["mean", "first", "random", "align", "cluster", "cluster_align"]
"""How KV heads of a group become one.

mean           their mean, in groups of consecutive heads
first          the first of them
random         random keys and values, a control
align          rotated towards each other, then their mean
cluster        grouped by the similarity of their keys and values, then their mean
cluster_align  grouped by their similarity after alignment, rotated towards each other, then their mean
"""

HOWS: tuple[How, ...] = get_args(How)
CALIBRATED: tuple[How, ...] = ("align", "cluster", "cluster_align")
"""Those that need calibration tokens."""

TARGETS = ("gqa", "mqa", "wgqa", "rgqa", "moh", "switchhead")
SOURCES = ("mha", "gqa", "mqa")
