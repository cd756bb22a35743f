"""Simultaneous intervals: they hold for all variants at once, and tell more apart than one test per variant."""

import math
from functools import partial

import numpy as np
import pytest
from scipy import stats as scipy_stats

from headway.launcher.base.intervals import t_critical
from headway.launcher.compare.simultaneous import compare_paired, compare_unpaired, dunnett_critical, holm, sidak
from headway.launcher.compare.stats import paired_difference

SPREAD, SEED_SPREAD = 0.02, 0.05
between = partial(pytest.param, marks=pytest.mark.slow)  # sizes between two others


@pytest.mark.parametrize(
    ("comparisons", "df", "expected"),
    # Two-sided 5 % points of Dunnett's test, Dunnett (1964), table II, equal group sizes
    [(2, 5, 3.03), (3, 5, 3.29), (4, 10, 2.89), (5, 20, 2.73), (9, 20, 2.95), (2, 60, 2.27), (4, 60, 2.51)],
)
def test_critical_values_are_those_of_the_published_table(comparisons, df, expected):
    assert dunnett_critical(comparisons, df) == pytest.approx(expected, abs=0.006)


def test_the_critical_value_agrees_with_scipy_s_test():
    rng = np.random.default_rng(0)
    control, *groups = rng.normal(size=(6, 4))
    found = scipy_stats.dunnett(*groups, control=control)
    interval = found.confidence_interval(0.95)
    spread = math.sqrt(np.mean([np.var(g, ddof=1) for g in (control, *groups)]))
    half = (interval.high - interval.low) / 2
    np.testing.assert_allclose(half, dunnett_critical(5, 18) * spread * math.sqrt(2 / 4), rtol=5e-3)


def test_one_comparison_is_the_paired_t_test():
    losses = {"gqa": {1: 3.0, 2: 3.1, 3: 2.9}, "rgqa": {1: 2.9, 2: 3.05, 3: 2.88}}
    found = compare_paired(losses, "gqa").differences["rgqa"]
    old = paired_difference(losses["rgqa"], losses["gqa"])
    assert old is not None
    assert (found.mean, found.low, found.high) == pytest.approx((old.mean, old.low, old.high))
    assert found.p_value == found.p_holm == pytest.approx(old.p_value)
    assert dunnett_critical(1, 2) == t_critical(2)


def simulated(rng, variants, seeds, difference=0.0, odd=1.0):
    y = rng.normal(0, SPREAD, (variants, seeds)) + rng.normal(0, SEED_SPREAD, seeds)
    y[1:] += difference
    y[-1] += rng.normal(0, SPREAD, seeds) * math.sqrt(odd**2 - 1)
    return {f"v{i}": dict(enumerate(y[i])) for i in range(variants)}


def within(share, low, high, repeats):
    """Whether a simulated share is compatible with [low, high]: three standard errors of the simulation are allowed."""
    error = 3 * math.sqrt(max(share * (1 - share), 0.01) / repeats)
    return low - error <= share <= high + error


@pytest.mark.parametrize(
    ("variants", "seeds"), [(4, 2), between(4, 3), (4, 5), between(9, 2), between(9, 4), (24, 2), between(24, 5)]
)
def test_under_the_null_a_study_claims_a_difference_in_about_5_percent_of_cases(variants, seeds):
    rng, repeats = np.random.default_rng(seeds * 100 + variants), 1200
    claims = sum(
        any(d.excludes(0) for d in compare_paired(simulated(rng, variants, seeds), "v0").differences.values())
        for _ in range(repeats)
    )
    # At most 6 %: the standard error of the simulation is 0.65 %.
    assert claims / repeats <= 0.06 + 2 * 0.0065
    # One test per variant, as before, claims more the more variants there are; 61 % at 24 variants and 2 seeds.


def test_one_test_per_variant_claims_a_difference_in_most_studies_of_many_equal_variants():
    rng, repeats, claims = np.random.default_rng(3), 300, 0
    for _ in range(repeats):
        losses = simulated(rng, 24, 2)
        alone = [paired_difference(losses[f"v{i}"], losses["v0"]) for i in range(1, 24)]
        claims += any(d is not None and d.excludes(0) for d in alone)
    assert claims / repeats > 0.4


@pytest.mark.parametrize(("variants", "seeds"), [(4, 2), between(9, 3), (24, 2)])
def test_all_intervals_hold_together_in_94_to_97_percent_of_studies(variants, seeds):
    rng, repeats, held = np.random.default_rng(variants + seeds), 1500, 0
    for _ in range(repeats):
        found = compare_paired(simulated(rng, variants, seeds, difference=0.03), "v0").differences
        held += not any(d.excludes(0.03) for d in found.values())
    assert within(held / repeats, 0.94, 0.97, repeats)


@pytest.mark.parametrize(("variants", "seeds", "least"), [(4, 2, 1.3), between(9, 2, 1.5), (24, 2, 1.5), (24, 3, 1.1)])
def test_real_differences_are_found_more_often_than_by_one_test_per_variant(variants, seeds, least):
    rng, now, before = np.random.default_rng(7), 0, 0
    for _ in range(400):
        losses = simulated(rng, variants, seeds, difference=0.05)
        now += sum(d.excludes(0) for d in compare_paired(losses, "v0").differences.values())
        alone = [paired_difference(losses[v], losses["v0"]) for v in losses if v != "v0"]
        before += sum(d is not None and d.excludes(0) for d in alone)
    assert now >= least * before


def test_a_variant_with_a_spread_of_its_own_keeps_its_wider_interval():
    rng = np.random.default_rng(11)
    calm, loud = simulated(rng, 6, 5), simulated(rng, 6, 5, odd=20.0)
    found = compare_paired(loud, "v0")
    assert found.own_spread == ("v5",) and found.spread is not None
    own, other = found.differences["v5"], found.differences["v1"]
    assert not own.pooled and other.pooled
    alone = paired_difference(loud["v5"], loud["v0"], confidence=sidak(5))
    assert alone is not None and own.half_width == pytest.approx(alone.half_width)
    assert found.spread < 3 * SPREAD  # the loud one is not in the pool
    assert compare_paired(calm, "v0").own_spread == ()


def test_two_variants_with_large_spreads_do_not_hide_each_other():
    # Without the second look, 0.63 of them were found in a study, and the median half width of the others was 0.19.
    rng, repeats = np.random.default_rng(13), 300
    found, widths = 0, []
    for _ in range(repeats):
        table = simulated(rng, 8, 2, odd=20.0)
        table["v6"] = {s: 20 * SPREAD * rng.normal() for s in table["v6"]}
        result = compare_paired(table, "v0")
        found += len({"v6", "v7"} & set(result.own_spread))
        widths.append(np.median([result.differences[f"v{i}"].half_width or 0.0 for i in range(1, 6)]))
    assert found / repeats > 1.2
    assert np.median(widths) < 5 * SPREAD


def test_random_merges_do_not_widen_the_intervals_of_learned_ones():
    # Losses of yaml/studies/wgqa-summaries-base.yaml: merges that start as the mean train almost alike.
    losses = {
        "gqa": (3.64421, 3.65966),
        "mha": (3.58602, 3.5965),
        "mqa": (3.9817, 3.98457),
        "wgqa": (3.64236, 3.65766),
        "rowwgqa": (3.64355, 3.65856),
        "colwgqa": (3.64326, 3.65831),
        "randwgqa": (3.90236, 4.00571),
        "randcolwmqa": (5.02311, 4.85301),
    }
    found = compare_paired({v: {1: a, 2: b} for v, (a, b) in losses.items()}, "gqa")
    assert set(found.own_spread) == {"randwgqa", "randcolwmqa"}
    assert (found.differences["wgqa"].half_width or 1) < 0.02


def test_a_baseline_with_a_spread_of_its_own_is_pooled_with_nobody():
    rng = np.random.default_rng(12)
    table = simulated(rng, 6, 5)
    table["v0"] = {s: value + step for (s, value), step in zip(table["v0"].items(), [1, -1, 2, -2, 0.5], strict=True)}
    found = compare_paired(table, "v0")
    assert found.own_spread == ("v0",) and not any(d.pooled for d in found.differences.values())
    assert all((d.half_width or 0) > 1 for d in found.differences.values())


def test_missing_cells_widen_their_own_interval_alone():
    rng = np.random.default_rng(13)
    whole = simulated(rng, 5, 4)
    cut = {v: dict(by_seed) for v, by_seed in whole.items()}
    del cut["v2"][3], cut["v2"][1]
    full, less = compare_paired(whole, "v0").differences, compare_paired(cut, "v0").differences
    assert less["v2"].n == 2 and less["v1"].n == 4
    errors = {name: d.standard_error or 0.0 for name, d in less.items()}
    assert errors["v2"] > 1.1 * errors["v1"] > 0
    assert less["v2"].mean == pytest.approx(np.mean([cut["v2"][s] - cut["v0"][s] for s in (0, 2)]))
    assert full["v1"].mean == less["v1"].mean


def test_the_error_of_a_difference_with_missing_cells_is_that_of_its_own_mean():
    rng, deviations, cut = np.random.default_rng(16), [], {"v1": (1, 2), "v2": (0,)}
    for _ in range(1500):
        losses = simulated(rng, 12, 3)
        for name, seeds in cut.items():
            losses[name] = {s: loss for s, loss in losses[name].items() if s not in seeds}
        found = compare_paired(losses, "v0")
        assert found.spread is not None
        for name, d in found.differences.items():
            assert d.standard_error == pytest.approx(found.spread * math.sqrt(2 / (3 - len(cut.get(name, ())))))
        d = found.differences["v1"]
        deviations.append(d.mean / (d.standard_error or 0.0))
    # Student's t with 20 degrees of freedom has this standard deviation; with the error of least squares it is 1.26.
    assert np.std(deviations) == pytest.approx(math.sqrt(20 / 18), rel=0.06)


def test_missing_cells_do_not_break_the_joint_error():
    rng, repeats, claims = np.random.default_rng(14), 400, 0
    for _ in range(repeats):
        losses = simulated(rng, 5, 4)
        del losses["v1"][0], losses["v2"][3]
        claims += any(d.excludes(0) for d in compare_paired(losses, "v0").differences.values())
    assert claims / repeats <= 0.06 + 3 * math.sqrt(0.05 * 0.95 / repeats)


def test_one_seed_has_no_interval_and_no_p_value():
    found = compare_paired({"gqa": {1: 3.0}, "a": {1: 2.9}, "b": {1: 2.8}}, "gqa")
    assert found.spread is None and found.degrees_of_freedom == 0
    for d in found.differences.values():
        assert (d.n, d.low, d.high, d.p_value, d.p_holm, d.equivalence) == (1, None, None, None, None, None)


def test_a_variant_without_a_seed_of_the_baseline_is_not_compared():
    found = compare_paired({"gqa": {1: 3.0, 2: 3.1}, "a": {3: 2.9}, "b": {1: 2.8, 2: 2.7}}, "gqa")
    assert set(found.differences) == {"b"}
    assert compare_paired({"a": {1: 2.0}}, "gqa").differences == {}


def test_holm_s_adjustment():
    # Holm (1979): 0.01 * 3, 0.03 * 2, max(0.06, 0.04 * 1)
    assert holm({"a": 0.01, "b": 0.03, "c": 0.04}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({}) == {} and holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_unpaired_runs_are_compared_by_welch_at_the_sidak_level():
    rng = np.random.default_rng(15)
    studies = [{f"v{i}": list(rng.normal(3, SPREAD, 4)) for i in range(6)} for _ in range(600)]
    repeats, claims = len(studies), 0
    for losses in studies:
        claims += any(d.excludes(0) for d in compare_unpaired(losses, "v0").differences.values())
    losses, found = studies[0], compare_unpaired(studies[0], "v0")
    assert not found.paired and claims / repeats <= 0.06 + 2 * math.sqrt(0.05 * 0.95 / repeats)
    d = found.differences["v1"]
    expected = scipy_stats.ttest_ind(losses["v1"], losses["v0"], equal_var=False)
    interval = expected.confidence_interval(sidak(5))
    assert (d.low, d.high) == pytest.approx((interval.low, interval.high))
