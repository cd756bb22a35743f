"""The picture of expert loads: one row per layer, one cell per expert, with axes and a key to its colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

CELL_PX = 12
"""Edge length of one expert's square in pixels. Viewers blur enlarged single pixels."""

LEFT_PX, TOP_PX = 64, 22
"""Position of the first cell: room for the numbers of layers, and for the title."""

NONE, EVEN, TWICE = (230, 97, 1), (247, 247, 247), (94, 60, 153)
"""Colours of a load of 0, of an even share, and of twice an even share or more: orange, white, violet."""

ABSENT = (160, 160, 160)
"""Colour of cells without an expert, in layers with fewer experts than others."""

_INK, _PAPER = (40, 40, 40), (255, 255, 255)
_FONT_PX, _BELOW_PX, _NARROWEST_PX = 10, 58, 340
_KEY = (("0", NONE), ("even share", EVEN), ("twice or more", TWICE), ("no expert", ABSENT))

Groups = tuple[int, ...]
"""Number of experts of each group of a layer."""


def load_picture(loads: Mapping[str, Sequence[Sequence[float]]]) -> NDArray[np.uint8]:
    """Loads of the experts of each group of each layer, relative to an even share -> image [height, width, RGB].

    Groups of a layer stand side by side. `loads`: by the name of the layer, which ends with its number.
    """
    rows = [[share for group in groups for share in group] for groups in loads.values()]
    labels = tuple(name.rpartition("_")[2].lstrip("0") or "0" for name in loads)
    picture = _frame(labels, tuple(tuple(map(len, groups)) for groups in loads.values())).copy()
    cells = _cells(rows)
    picture[TOP_PX : TOP_PX + cells.shape[0], LEFT_PX : LEFT_PX + cells.shape[1]] = cells
    return picture


def _cells(rows: list[list[float]]) -> NDArray[np.uint8]:
    loads = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for i, row in enumerate(rows):
        loads[i, : len(row)] = row
    points = np.array([NONE, EVEN, TWICE], dtype=np.float64)
    channels = [np.interp(np.clip(loads, 0, 2), [0, 1, 2], points[:, c]) for c in range(3)]
    picture = np.where(np.isnan(loads)[..., None], ABSENT, np.stack(channels, -1)).round().astype(np.uint8)
    return picture.repeat(CELL_PX, 0).repeat(CELL_PX, 1)


@lru_cache(maxsize=8)  # the same in every record of a run
def _frame(labels: tuple[str, ...], groups: tuple[Groups, ...]) -> NDArray[np.uint8]:
    """The picture without its cells. `labels`: of the rows."""
    from PIL import Image, ImageDraw

    wide, high = CELL_PX * max(map(sum, groups)), CELL_PX * len(labels)
    image = Image.new("RGB", (max(LEFT_PX + wide + 12, _NARROWEST_PX), TOP_PX + high + _BELOW_PX), _PAPER)
    draw = ImageDraw.Draw(image)
    right, bottom = LEFT_PX + wide, TOP_PX + high
    draw.rectangle((LEFT_PX - 1, TOP_PX - 1, right, bottom), outline=_INK)
    _text(draw, (LEFT_PX, 4), "tokens that chose an expert / an even share", "la")
    _text(draw, (4, TOP_PX + high // 2), "layer", "lm")
    for i, label in enumerate(labels):
        _text(draw, (LEFT_PX - 6, TOP_PX + CELL_PX * i + CELL_PX // 2), label, "rm")
    _experts(draw, bottom, max(groups, key=sum))
    _text(draw, (LEFT_PX, bottom + 21), "expert, groups side by side", "la")
    x = LEFT_PX
    for text, colour in _KEY:
        draw.rectangle((x, bottom + 40, x + CELL_PX - 2, bottom + 40 + CELL_PX - 2), fill=colour, outline=_INK)
        _text(draw, (x + CELL_PX + 3, bottom + 39), text, "la")
        x += CELL_PX + 14 + round(draw.textlength(text, font_size=_FONT_PX))
    return np.asarray(image)


def _experts(draw: ImageDraw, top: int, groups: Groups) -> None:
    """Numbers of experts below the cells, as many as there is room for, and a mark where a group begins."""
    widest = draw.textlength(str(sum(groups)), font_size=_FONT_PX) + 6
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10_000) if n * CELL_PX >= widest)
    for number in range(0, sum(groups), every):
        _text(draw, (LEFT_PX + CELL_PX * number + CELL_PX // 2, top + 6), str(number), "ma")
    for begin in np.cumsum((0, *groups[:-1])).tolist():
        x = LEFT_PX + CELL_PX * begin
        draw.line((x, top, x, top + 5), fill=_INK)


def _text(draw: ImageDraw, place: tuple[int, int], text: str, anchor: str) -> None:
    """`anchor`: as in Pillow, horizontal then vertical."""
    draw.text(place, text, fill=_INK, anchor=anchor, font_size=_FONT_PX)
