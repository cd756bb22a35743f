"""Columns of numbers that grow record by record."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headway.launcher.run.lines import Row

Floats = NDArray[np.float64]
HASH_BYTES = 16


class Table:
    """Rows of numbers, by step. If a step has several, because it was repeated after a kill, the last one counts."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys, self._steps, self._values = tuple(keys), array("q"), array("d")

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, values: Sequence[float]) -> None:
        """`values`: one for each key."""
        self._steps.append(step)
        self._values.extend(values)

    def kept(self) -> NDArray[np.intp]:
        """Places of the rows that count, in the order of their steps."""
        steps = np.frombuffer(self._steps, dtype=np.int64) if self._steps else np.empty(0, dtype=np.int64)
        if (steps[1:] > steps[:-1]).all():
            return np.arange(steps.size)
        order = np.argsort(steps, kind="stable")
        ordered = steps[order]
        return order[np.append(ordered[1:] != ordered[:-1], True)]

    def steps(self, kept: NDArray[np.intp]) -> NDArray[np.int64]:
        return np.array(self._steps, dtype=np.int64)[kept]

    def column(self, key: str, kept: NDArray[np.intp]) -> Floats:
        """The numbers of a key in the rows `kept`."""
        rows = np.array(self._values[self._keys.index(key) :: len(self._keys)], dtype=np.float64)
        return rows[kept]


class TrainTable(Table):
    """Training records: their numbers, hashes of batches, and where in the file the figures of routers are."""

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(keys)
        self._skipped, self._places, self._hashes = bytearray(), array("q"), bytearray()
        self._other_hashes: dict[int, str | None] = {}  # by row: those that are not HASH_BYTES of ASCII
        self.routers = False

    def add_row(self, row: Row, place: int) -> None:
        """`place`: offset of the line in the file, in bytes."""
        hashed = row.hash
        if hashed is not None and len(hashed) == HASH_BYTES and hashed.isascii():
            self._hashes += hashed.encode()
        else:
            self._other_hashes[len(self)] = hashed
            self._hashes += bytes(HASH_BYTES)
        self.add(row.step, row.values)
        self._skipped.append(row.skipped)
        self._places.append(place)
        self.routers |= row.router

    def skipped(self, kept: NDArray[np.intp]) -> int:
        """Number of steps whose update was not applied."""
        return int(np.frombuffer(self._skipped, dtype=np.uint8)[kept].sum()) if self._skipped else 0

    def places(self, kept: NDArray[np.intp]) -> list[int]:
        """Offsets of the lines of the rows `kept`."""
        return [self._places[i] for i in kept.tolist()]

    def hashes(self, kept: NDArray[np.intp]) -> Mapping[int, str]:
        """Step -> hash of its batch, for the rows that have one."""
        if self._other_hashes:
            found = {step: self._hash(row) for step, row in zip(self.steps(kept).tolist(), kept.tolist(), strict=True)}
            return {step: hashed for step, hashed in found.items() if hashed is not None}
        data = np.frombuffer(self._hashes, dtype=f"S{HASH_BYTES}") if self._hashes else np.empty(0, f"S{HASH_BYTES}")
        return StepHashes(self.steps(kept), data[kept].tobytes())

    def _hash(self, row: int) -> str | None:
        if row in self._other_hashes:
            return self._other_hashes[row]
        return self._hashes[row * HASH_BYTES : (row + 1) * HASH_BYTES].decode()


def gaps_between(steps: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """(first, last) of each range of steps that is missing from `steps`, which ascend from 1 or a later step."""
    before = np.concatenate([[0], steps[:-1]]) if steps.size else steps
    return tuple((int(before[i]) + 1, int(steps[i]) - 1) for i in np.flatnonzero(steps - before > 1))


class StepHashes(Mapping[int, str]):
    """Step -> hash of its batch, in 24 bytes a step. `steps`: ascending. `data`: `HASH_BYTES` for each of them."""

    def __init__(self, steps: NDArray[np.int64], data: bytes) -> None:
        self._steps, self._data = array("q", steps.tobytes()), data
        self._first = int(steps[0]) if steps.size else 0
        self._whole = bool(steps.size) and int(steps[-1]) - self._first + 1 == steps.size

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[int]:
        return iter(self._steps)

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and self._place(step) is not None

    def __getitem__(self, step: int) -> str:
        if (place := self._place(step)) is None:
            raise KeyError(step)
        return self._data[place * HASH_BYTES : (place + 1) * HASH_BYTES].decode()

    def _place(self, step: Any) -> int | None:
        place = step - self._first if self._whole else bisect_left(self._steps, step)
        return place if 0 <= place < len(self._steps) and self._steps[place] == step else None
