"""Search the legal multiples of a number for the one whose cost is nearest to a target."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

LARGEST = 1 << 24
"""Largest value of the free dimension; wider than any transformer's MLP."""

GAP = 1024
"""After this many illegal multiples in a row no legal one is expected, because rules of divisibility are periodic."""

STEPS = 32
"""The search tries each of the first `STEPS` multiples, then increases the value by 1/`STEPS` (3 %) per step."""

FAR = 4.0
"""The search ends if the cost rises and exceeds this many times the target."""


class Illegal(ValueError):
    """A value of the free dimension that gives no legal spec; the message is the reason."""


class Candidates:
    """The multiples of `multiple` up to `LARGEST`, each tried at most once.

    `cost` returns a value's cost or raises Illegal. `costs`: legal value -> cost; `reasons`: illegal value -> reason,
    both of the values tried so far.
    """

    def __init__(self, cost: Callable[[int], float], *, multiple: int) -> None:
        self._cost, self.multiple = cost, multiple
        self.costs: dict[int, float] = {}
        self.reasons: dict[int, str] = {}

    def is_legal(self, value: int) -> bool:
        if value not in self.costs and value not in self.reasons:
            try:
                self.costs[value] = self._cost(value)
            except Illegal as error:
                self.reasons[value] = str(error)
        return value in self.costs

    def first_legal(self, start: int) -> int | None:
        """The smallest legal value from `start` on; None if there is none within `GAP` multiples and `LARGEST`."""
        stop = min(start + GAP * self.multiple, LARGEST + 1)
        return next((v for v in range(start, stop, self.multiple) if self.is_legal(v)), None)

    def nearest_legal(
        self, value: float, *, low: int = 0, high: int = LARGEST + 1, but: Collection[int] = ()
    ) -> int | None:
        """The legal value nearest to `value`, strictly between `low` and `high`, not in `but`; None if none exists."""
        for candidate in self._outward(value, low, min(high, LARGEST + 1)):
            if candidate not in but and self.is_legal(candidate):
                return candidate
        return None

    def nearest_cost(self, target: float) -> int | None:
        """The legal value whose cost is nearest to `target`, the smaller one on a tie; None if nothing is legal.

        Values are tried in steps of 3 % (each of the small ones), and by bisection within a step that crosses the
        target. This is exact for a monotonic cost. If the cost changes direction, it has jumped, for example because of
        a rule that depends on the size, and all values within the step are tried.
        """
        value, before, rising = self.first_legal(self.multiple), None, None
        while value is not None:
            if before is not None:
                rose = self.costs[value] > self.costs[before]
                if rising is not None and rose != rising:
                    self._try_all(before, value)
                rising = rose
                self._bisect(before, value, target)
                if rose and self.costs[value] > FAR * target:
                    break
            before = value
            following = value + max(1, value // self.multiple // STEPS) * self.multiple
            value = self.first_legal(following)
            if value is None:  # the last legal value may lie within the step
                self.nearest_legal(following, low=before, high=following)
        return min(self.costs, key=lambda v: (abs(self.costs[v] - target), v), default=None)

    def _try_all(self, low: int, high: int) -> None:
        for value in range(low + self.multiple, min(high, low + GAP * self.multiple), self.multiple):
            self.is_legal(value)

    def _bisect(self, low: int, high: int, target: float) -> None:
        """Bisect between `low` and `high` until the legal values on both sides of `target` have been tried."""
        below = self.costs[low] < target
        if below == (self.costs[high] < target):
            return
        while (middle := self.nearest_legal((low + high) / 2, low=low, high=high)) is not None:
            if (self.costs[middle] < target) == below:
                low = middle
            else:
                high = middle

    def _outward(self, value: float, low: int, high: int) -> Iterator[int]:
        """Multiples strictly between `low` and `high`, nearest to `value` first, at most `GAP` on each side."""
        centre = min(max(round(value / self.multiple), low // self.multiple + 1), (high - 1) // self.multiple)
        for distance in range(GAP + 1):
            pair = {(centre - distance) * self.multiple, (centre + distance) * self.multiple}
            yield from sorted((v for v in pair if low < v < high), key=lambda v: (abs(v - value), v))
