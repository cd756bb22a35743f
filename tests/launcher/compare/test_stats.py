"""Intervals and tests of a few seeds, against closed forms and tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from headway.launcher.base.intervals import t_critical
from headway.launcher.compare.stats import (
    estimate,
    paired_difference,
    paired_ratio,
    power_of_paired_test,
    sd_factor,
    seeds_needed,
    steady_speed,
    unpaired_difference,
)


def test_the_spread_of_two_seeds_says_almost_nothing_about_the_true_one():
    # quantiles 0.025 of chi-square with 1 and 2 degrees of freedom: 0.00098207 (tables) and -2 ln 0.975
    assert sd_factor(1) == pytest.approx(math.sqrt(1 / 0.00098207), rel=1e-4)
    assert sd_factor(2) == pytest.approx(math.sqrt(-1 / math.log(0.975)), rel=1e-9)


def test_t_critical_has_the_closed_forms_of_one_and_two_degrees_of_freedom():
    # one degree: Cauchy quantile tan(pi (p - 1/2)); two degrees: a sqrt(2 / (1 - a^2)) with a = 2p - 1
    assert t_critical(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-9)
    assert t_critical(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-9)


def test_interval_of_two_values_is_the_cauchy_interval():
    e = estimate([1.0, 2.0])
    assert (e.n, e.mean, e.sd) == (2, 1.5, pytest.approx(math.sqrt(0.5)))
    half = math.tan(math.pi * 0.475) * 0.5  # standard error of two values 1 apart is 1/2
    assert e.low == pytest.approx(1.5 - half)
    assert e.high == pytest.approx(1.5 + half)
    # t = 3 with one degree: p = 1 - 2 atan(3) / pi
    assert e.p_value == pytest.approx(1 - 2 * math.atan(3) / math.pi)
    assert not e.excludes(0)


def test_one_value_has_a_mean_and_no_interval():
    e = estimate([3.0])
    assert (e.n, e.mean) == (1, 3.0)
    assert e.sd is e.low is e.high is e.p_value is e.half_width is None
    assert not e.excludes(0)


def test_no_values_is_an_error():
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_equal_values_have_an_interval_of_width_zero():
    e = estimate([2.0, 2.0, 2.0])
    assert (e.low, e.high, e.p_value) == (2.0, 2.0, 0.0)
    assert estimate([0.0, 0.0]).p_value == 1.0


def test_interval_covers_the_true_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        e = estimate(generator.normal(0.7, 2.0, size=3).tolist())
        hits += not e.excludes(0.7)
    # binomial: sd of the share is 0.005, so four of them
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)


def test_pairing_takes_out_what_the_seeds_have_in_common():
    baseline = {1: 3.0, 2: 4.0, 3: 5.0}
    variant = {1: 2.9, 2: 3.9, 3: 4.91}
    paired = paired_difference(variant, baseline)
    unpaired = unpaired_difference(list(variant.values()), list(baseline.values()))
    assert paired is not None and unpaired is not None
    assert paired.mean == pytest.approx(unpaired.mean)
    assert paired.excludes(0)
    assert not unpaired.excludes(0)


def test_only_common_seeds_are_paired():
    d = paired_difference({1: 1.0, 2: 5.0}, {2: 4.0, 3: 9.0})
    assert d is not None and (d.n, d.mean) == (1, 1.0)
    assert paired_difference({1: 1.0}, {2: 1.0}) is None


def test_unpaired_difference_is_welchs():
    from scipy import stats as reference

    a, b = [3.1, 3.4, 3.3, 3.8], [3.0, 2.9, 3.05]
    d = unpaired_difference(a, b)
    want: Any = reference.ttest_ind(a, b, equal_var=False)
    interval = want.confidence_interval(0.95)
    assert d is not None
    assert (d.low, d.high, d.p_value) == pytest.approx((interval.low, interval.high, want.pvalue))


def test_unpaired_difference_of_single_runs_has_no_interval():
    d = unpaired_difference([2.0], [1.5, 1.6])
    assert d is not None and d.mean == pytest.approx(0.45) and d.low is None
    assert unpaired_difference([], [1.0]) is None


def test_ratio_is_geometric_and_its_interval_is_inverse_for_the_inverse_ratio():
    a, b = {1: 100.0, 2: 130.0, 3: 90.0}, {1: 50.0, 2: 40.0, 3: 60.0}
    r, inverse = paired_ratio(a, b), paired_ratio(b, a)
    assert r is not None and inverse is not None and r.low is not None and inverse.high is not None
    assert r.mean == pytest.approx((2 * 3.25 * 1.5) ** (1 / 3))
    assert r.mean * inverse.mean == pytest.approx(1)
    assert r.low * inverse.high == pytest.approx(1)


@pytest.mark.parametrize(("effect", "want"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_are_those_of_the_published_tables(effect, want):
    # paired t-test, two-sided 5 %, power 80 % (Cohen 1988; G*Power 3 gives the same)
    assert seeds_needed(1.0, effect) == want
    assert power_of_paired_test(want, 1.0, effect) >= 0.8 > power_of_paired_test(want - 1, 1.0, effect)


def test_seeds_needed_at_the_ends():
    assert seeds_needed(0.0, 0.1) == 2
    assert seeds_needed(1.0, 0.0) is None
    assert seeds_needed(1.0, 1e-4) is None
    assert seeds_needed(0.001, 1.0) == 2


def test_power_agrees_with_simulation():
    generator = np.random.default_rng(1)
    samples = generator.normal(1.0, 1.0, size=(4000, 5))
    t = samples.mean(1) / (samples.std(1, ddof=1) / math.sqrt(5))
    # binomial: sd of the share is 0.008, so four of them
    assert power_of_paired_test(5, 1.0, 1.0) == pytest.approx((t > t_critical(4)).mean(), abs=0.032)


def test_speed_leaves_the_first_steps_out_and_takes_the_median():
    step_s = [9.0, 9.0, 9.0] + [0.5] * 24 + [8.0] * 3  # 30 steps: three are dropped, three were disturbed
    speed = steady_speed(step_s, 1000)
    assert speed is not None
    assert (speed.tokens_per_s, speed.low, speed.high, speed.steps) == (2000.0, 2000.0, 2000.0, 27)


def test_speed_quartiles_enclose_the_median():
    speed = steady_speed([1, 1, 1.0, 2.0, 3.0, 4.0, 5.0], 60)
    assert speed is not None
    assert (speed.low, speed.tokens_per_s, speed.high) == (15.0, 20.0, 30.0)


def test_speed_of_two_steps_is_not_known():
    assert steady_speed([1.0, 1.0], 100) is None
    assert steady_speed([], 100) is None
