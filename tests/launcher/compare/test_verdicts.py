"""Verdicts say no more than the intervals do, and name the seeds that would decide."""

import numpy as np
import pytest

from headway.launcher.compare.simultaneous import Simultaneous, compare_paired, sidak
from headway.launcher.compare.stats import power_of_paired_test
from headway.launcher.compare.verdicts import (
    Seeds,
    cautious_spread,
    chance_of_difference,
    chance_of_equivalence,
    not_worse_by,
    seeds_to_decide,
    verdict,
)


def interval(low, high, narrow=0.8):
    middle, half = (low + high) / 2, (high - low) / 2
    inside = (middle - narrow * half, middle + narrow * half)
    return Simultaneous(n=3, mean=middle, low=low, high=high, equivalence=inside)


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [
        (-0.05, -0.01, None, "better"),
        (0.01, 0.05, None, "worse"),
        (-0.01, 0.02, None, "undecided"),
        (-0.01, 0.008, 0.01, "equivalent"),
        (0.001, 0.005, 0.01, "equivalent"),  # shown, and shown not to matter
        (0.005, 0.02, 0.01, "worse"),
        (-0.02, 0.012, 0.01, "undecided"),
        (-0.05, -0.02, 0.01, "better"),
    ],
)
def test_a_verdict_follows_from_the_interval_and_the_margin(low, high, margin, expected):
    assert verdict(interval(low, high), margin) == expected


def test_without_an_interval_nothing_is_decided():
    alone = Simultaneous(n=1, mean=-3.0)
    assert verdict(alone) == verdict(alone, 0.01) == "undecided" and not_worse_by(alone, 0.01) is None


def test_a_question_is_answered_yes_no_or_not_at_all():
    assert not_worse_by(interval(-0.02, 0.005), 0.01) is True
    assert not_worse_by(interval(0.02, 0.05), 0.01) is False
    assert not_worse_by(interval(-0.02, 0.05), 0.01) is None
    assert not_worse_by(interval(-0.02, -0.01), 0.0) is True  # is better


def table(rng, variants, seeds, difference, spread=0.02):
    y = rng.normal(0, spread, (variants, seeds)) + rng.normal(0, 0.05, seeds)
    y[1] += difference
    return {f"v{i}": dict(enumerate(y[i])) for i in range(variants)}


@pytest.mark.parametrize(("n", "difference"), [(2, 0.1), (3, 0.06), (6, 0.04)])
def test_the_promised_chance_of_a_difference_is_that_of_simulated_studies(n, difference):
    rng = np.random.default_rng(n)
    found = [compare_paired(table(rng, 5, n, difference), "v0").differences["v1"] for _ in range(1500)]
    share = np.mean([(d.low or 0) > 0 for d in found])
    assert share == pytest.approx(chance_of_difference(n, 4, 0.02, difference), abs=0.04)


def test_the_promised_chance_of_equivalence_is_that_of_simulated_studies():
    rng = np.random.default_rng(5)
    found = [compare_paired(table(rng, 5, 6, 0.005), "v0").differences["v1"] for _ in range(1500)]
    share = np.mean([verdict(d, 0.04) == "equivalent" for d in found])
    assert share == pytest.approx(chance_of_equivalence(6, 4, 0.02, 0.005, 0.04), abs=0.05)


def test_a_false_equivalence_is_rarer_than_5_percent():
    rng = np.random.default_rng(6)
    found = [compare_paired(table(rng, 5, 6, 0.04), "v0").differences["v1"] for _ in range(1500)]
    assert np.mean([verdict(d, 0.04) == "equivalent" for d in found]) <= 0.05


def test_the_seeds_that_decide_do_decide():
    rng = np.random.default_rng(8)
    pilot = compare_paired(table(rng, 5, 3, 0.03), "v0")
    need = seeds_to_decide(pilot, "v1")
    assert need is not None and need.shows == "a difference"
    mean, spread = pilot.differences["v1"].mean, pilot.spread
    assert spread is not None
    assert chance_of_difference(need.count, 4, spread, mean) >= 0.8
    assert need.count == 2 or chance_of_difference(need.count - 1, 4, spread, mean) < 0.8


def test_a_wide_margin_is_decided_sooner_than_a_small_difference():
    rng = np.random.default_rng(9)
    pilot = compare_paired(table(rng, 5, 4, 0.0), "v0")
    equal = min(pilot.differences, key=lambda name: abs(pilot.differences[name].mean))
    need = seeds_to_decide(pilot, equal, margin=0.05)
    assert need is not None and need.shows == "equivalence" and need.count < 30


def test_a_pilot_s_spread_is_used_with_its_uncertainty():
    pilot = compare_paired(table(np.random.default_rng(10), 5, 3, 0.0), "v0")
    cautious = cautious_spread(pilot)
    assert cautious is not None and pilot.spread is not None and cautious > 1.3 * pilot.spread


def test_the_seeds_that_decide_about_a_loud_variant_follow_from_its_own_spread():
    losses = table(np.random.default_rng(11), 6, 5, 0.0)
    for seed, step in enumerate([1, -1, 2, -2, 0.5]):
        losses["v1"][seed] += step
    pilot = compare_paired(losses, "v0")
    assert pilot.own_spread == ("v1",) and pilot.spread is not None
    d, need = pilot.differences["v1"], seeds_to_decide(pilot, "v1")
    assert verdict(d) == "undecided" and d.half_width is not None and d.half_width > abs(d.mean)
    # The pooled spread of the others is a hundredth of it, and says that two seeds decide what five did not.
    assert chance_of_difference(2, 5, pilot.spread, d.mean) >= 0.8
    assert need is None or need.count > d.n
    sd = np.std([losses["v1"][s] - losses["v0"][s] for s in range(5)], ddof=1)
    assert need == seeds_of_t_test(float(sd), d.mean, sidak(5))


def seeds_of_t_test(sd, mean, level):
    enough = (n for n in range(2, 1001) if power_of_paired_test(n, sd, mean, confidence=level) >= 0.8)
    count = next(enough, None)
    return None if count is None else Seeds(count=count, shows="a difference")
