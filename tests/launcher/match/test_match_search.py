"""The search finds the legal multiple with the nearest cost without trying all values."""

from __future__ import annotations

import pytest

from headway.launcher.match.search import LARGEST, Candidates, Illegal


def candidates(cost, *, legal=lambda n: True, multiple: int = 1) -> Candidates:
    def checked(n: int) -> float:
        if not legal(n):
            raise Illegal(f"{n} is odd")
        return cost(n)

    return Candidates(checked, multiple=multiple)


@pytest.mark.parametrize(("target", "want"), [(100, 10), (124, 10), (125, 10), (126, 15), (1, 5), (50, 5), (5000, 500)])
def test_the_smaller_of_two_equally_near_values_is_taken(target, want):
    assert candidates(lambda n: 10.0 * n, multiple=5).nearest_cost(target) == want


@pytest.mark.parametrize(
    ("cost", "legal"),
    [
        (lambda n: 7.0 * n + 0.01 * n * n, lambda n: True),
        (lambda n: 7.0 * n, lambda n: 720 % n == 0),  # like groups of 720 heads
        (lambda n: 7.0 * n, lambda n: n % 5 == 0),  # like heads of 5 groups
        (lambda n: 7.0 * n, lambda n: n == 77),
        (lambda n: 5000.0 - 7.0 * n, lambda n: n <= 700),  # falls
        (
            lambda n: 7.0 * n - (900 if n >= 300 else 0),
            lambda n: n % 2 == 0,
        ),  # jumps back, like k with a rule that depends on the size
    ],
    ids=["grows", "divisors", "multiples", "one value", "falls", "jumps"],
)
def test_the_search_agrees_with_trying_all_values(cost, legal):
    for target in range(5, 4000, 97):
        best = min((n for n in range(1, 1500) if legal(n)), key=lambda n: (abs(cost(n) - target), n))
        assert candidates(cost, legal=legal).nearest_cost(target) == best


def test_a_search_to_the_end_tries_few_values():
    search = candidates(lambda n: float(n), multiple=1)
    assert search.nearest_cost(12_345_678.0) == 12_345_678
    assert len(search.costs) < 600


def test_values_beyond_the_largest_are_not_tried():
    search = candidates(lambda n: float(n), multiple=128)
    assert search.nearest_cost(1e12) == LARGEST


def test_if_nothing_is_legal_nothing_is_found_and_the_reasons_are_kept():
    search = candidates(float, legal=lambda n: False)
    assert search.nearest_cost(10.0) is None
    assert search.reasons[1] == "1 is odd"


@pytest.mark.parametrize(
    ("value", "bounds", "but", "want"),
    [
        (10.4, {}, (), 10),
        (11.2, {}, (), 12),
        (11.2, {"high": 12}, (), 10),
        (9.0, {"low": 8}, (), 10),
        (10.0, {}, (10,), 8),
        (-5.0, {}, (), 2),
        (5.0, {"low": 4, "high": 6}, (), None),
    ],
)
def test_the_nearest_legal_value_lies_between_the_bounds(value, bounds, but, want):
    search = candidates(float, legal=lambda n: n % 2 == 0)
    assert search.nearest_legal(value, but=but, **bounds) == want
