"""Intervals of measures contain the true value as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from headway.launcher.evaluate.measure import Measure, bootstrapped, ratio, share


def coverage(found: list[Measure], true: float) -> float:
    return float(np.mean([m.low is not None and m.high is not None and m.low <= true <= m.high for m in found]))


def test_the_interval_of_a_loss_over_documents_of_unequal_length() -> None:
    numbers = np.random.default_rng(1)
    found = []
    for _ in range(1000):
        tokens = numbers.integers(20, 400, 60)
        level = numbers.normal(3.0, 0.4, 60)  # a document is easy or hard as a whole
        found.append(ratio("x", (tokens * level).tolist(), tokens.tolist(), unit=""))
    assert 0.93 <= coverage(found, 3.0) <= 0.97


@pytest.mark.parametrize("p", [0.25, 0.5, 0.95])
def test_the_interval_of_a_share(p: float) -> None:
    numbers = np.random.default_rng(2)
    found = [share("x", (numbers.random(100) < p).tolist(), chance=None) for _ in range(2000)]
    assert 0.93 <= coverage(found, p) <= 0.98  # counts are whole: the coverage goes up and down with p
    none, every = share("x", [False] * 10, chance=None), share("x", [True] * 10, chance=None)
    assert none.low == 0 and none.high is not None and 0.2 < none.high < 0.4
    assert every.high == 1 and every.low == pytest.approx(1 - none.high)


def test_one_document_has_no_interval_and_units_scale() -> None:
    one = ratio("x", [6.0], [2.0], unit="nats")
    assert (one.value, one.low, one.high) == (3.0, None, None)
    two = ratio("x", [6.0, 5.0], [2.0, 3.0], unit="nats").scaled("y", 2.0, "half-nats")
    assert two.value == pytest.approx(4.4) and two.unit == "half-nats" and two.name == "y"
    assert two.low is not None and two.high is not None and two.low + two.high == pytest.approx(8.8)


def test_the_bootstrap_interval_of_a_mean() -> None:
    numbers = np.random.default_rng(3)
    found = [bootstrapped("x", numbers.beta(0.5, 2.0, 60), unit="F1") for _ in range(200)]  # skewed, as ROUGE is
    assert 0.9 <= coverage(found, 0.2) <= 0.98
    again = bootstrapped("x", np.array([0.1, 0.5, 0.9]), unit="F1")
    assert again == bootstrapped("x", np.array([0.1, 0.5, 0.9]), unit="F1") and again.value == pytest.approx(0.5)
    assert again.low is not None and again.high is not None and 0.1 <= again.low < 0.5 < again.high <= 0.9
    one = bootstrapped("x", np.array([0.3]), unit="F1")
    assert (one.value, one.low, one.high, one.n) == (0.3, None, None, 1)
