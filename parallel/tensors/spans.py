"""Spans: what one rank holds of a logical tensor, and copies between the spans of two layouts.

Tensor parallelism cuts a tensor along one dimension into equal parts. ZeRO cuts the flattened part of a rank into
contiguous ranges, one for each data rank. A span is such a range.

To copy from one layout to another, a tensor is seen as a matrix whose rows are the dimensions before the cut one, and
whose columns are the cut dimension and those after it. A part is then a block of columns, and a span consists of at
most three rectangles of its part: the end of a row, whole rows, and the beginning of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Rectangle(NamedTuple):
    """Rows and columns of the matrix, and where in the span's elements the rectangle begins (row by row)."""

    row: int
    rows: int
    column: int
    columns: int
    offset: int

    def place(self, row: int, column: int) -> tuple[int, int]:
        """Where an element of the matrix is in the span, and the number of elements from one row to the next."""
        return self.offset + (row - self.row) * self.columns + column - self.column, self.columns


@dataclass(frozen=True, kw_only=True)
class Span:
    """The elements `start` to `stop` - 1 of the flattened part `rank` of a tensor cut into `ranks` parts.

    shape: Of the whole (logical) tensor.
    dim: The dimension along which it is cut; `ranks` divides its size.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    dim: int = 0
    ranks: int = 1
    rank: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def part_size(self) -> int:
        """Elements of the part."""
        return math.prod(self.shape) // self.ranks

    @property
    def is_whole(self) -> bool:
        """Whether the span is the whole tensor."""
        return self.ranks == 1 and self.size == self.part_size

    def rectangles(self, dim: int) -> Iterator[Rectangle]:
        """The rectangles of the span in the matrix of a cut along `dim`, which must be that of the span if it has one.

        Without a cut, a tensor may be seen as any of its matrices.
        """
        assert self.ranks == 1 or dim == self.dim
        width = math.prod(self.shape[dim:]) // self.ranks
        first, at = self.rank * width, self.start
        while at < self.stop:
            row, column = divmod(at, width)
            if column or self.stop - at < width:
                columns = min(width - column, self.stop - at)
                yield Rectangle(row, 1, first + column, columns, at - self.start)
                at += columns
            else:
                rows = (self.stop - at) // width
                yield Rectangle(row, rows, first, width, at - self.start)
                at += rows * width


def whole(shape: tuple[int, ...]) -> Span:
    """The span of a tensor that is not cut."""
    return Span(shape=shape, start=0, stop=math.prod(shape))


class Shared(NamedTuple):
    """Elements that two spans share, as a block of the matrix. `held`, `wanted`: where it is in each of the spans, as
    (its first element, elements from one row to the next).
    """

    rows: int
    columns: int
    held: tuple[int, int]
    wanted: tuple[int, int]


def shared(held: Span, wanted: Span) -> list[Shared]:
    """The elements that two spans of one tensor share. If both are cut, it must be along the same dimension."""
    dim, found = held.dim if held.ranks > 1 else wanted.dim, []
    for a in held.rectangles(dim):
        for b in wanted.rectangles(dim):
            row, column = max(a.row, b.row), max(a.column, b.column)
            rows = min(a.row + a.rows, b.row + b.rows) - row
            columns = min(a.column + a.columns, b.column + b.columns) - column
            if rows > 0 and columns > 0:
                found.append(Shared(rows, columns, a.place(row, column), b.place(row, column)))
    return found


def copy_shared(source: Tensor, target: Tensor, blocks: Sequence[Shared]) -> None:
    """Copy what two spans share. Both tensors are contiguous, [span.size], on any device and of any dtype."""
    for block in blocks:
        size = (block.rows, block.columns)
        (first, step), (to, to_step) = block.held, block.wanted
        target[to:].as_strided(size, (to_step, 1)).copy_(source[first:].as_strided(size, (step, 1)))
