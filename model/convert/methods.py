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

The last three compare the heads by their activations, or by their weights (`By`).
"""

HOWS: tuple[How, ...] = get_args(How)
COMPARED: tuple[How, ...] = ("align", "cluster", "cluster_align")
"""Those that compare heads, by their activations or by their weights."""

ALIGNED: tuple[How, ...] = ("align", "cluster_align")
CHOSEN: tuple[How, ...] = ("cluster", "cluster_align")
"""Those that choose the heads of each group."""

By = Literal["activations", "weights"]
"""What heads are compared by: their keys and values of calibration tokens, or the matrices W_K and W_V."""

BYS: tuple[By, ...] = get_args(By)


def is_calibrated(how: How, by: By) -> bool:
    """Whether the method needs calibration tokens."""
    return how in COMPARED and by == "activations"


TARGETS = ("gqa", "mqa", "wgqa", "rgqa", "moh", "switchhead", "block_sparse")
SOURCES = ("mha", "gqa", "mqa")
