"""Effective cost: the ratio of tokens at equal loss, with intervals that hold for all variants and for noisy curves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from headway.launcher.compare.effective import EffectiveCosts, SpeedUp, effective_costs
from headway.launcher.compare.equal_loss import Axis, Pool
from headway.launcher.compare.simultaneous import compare_paired

TOKENS = {0.25: 250_000, 0.5: 500_000, 1.0: 1_000_000}
X = np.log(list(TOKENS))


def power_law(exponent: float, offset: float = 0.0, start: float = 3.0) -> Any:
    return lambda x: start + offset + np.exp(-exponent * np.asarray(x))


def losses_of(curves: list[Any], seeds: int, noise: Any = lambda v, b, s: 0.0) -> dict[str, Any]:
    return {
        f"v{v}": {
            budget: {s: float(curve(math.log(budget))) + noise(v, b, s) for s in range(seeds)}
            for b, budget in enumerate(TOKENS)
        }
        for v, curve in enumerate(curves)
    }


def costs(losses: dict[str, Any], **keys: Any) -> EffectiveCosts:
    flops = keys.pop("flops", dict.fromkeys(losses, 1.0))
    speeds = keys.pop("speeds", {v: dict.fromkeys(range(9), 100.0) for v in losses})
    return effective_costs(losses, TOKENS, "v0", flops=flops, speeds=speeds, **keys)


def tokens_of(found: EffectiveCosts, name: str = "v1") -> SpeedUp:
    speed_up = found.by_variant[name].tokens
    assert speed_up is not None
    return speed_up


def true_ratio(baseline: Any, variant: Any) -> float:
    """ln of the speed-up in tokens of two curves, by bisection on the better one."""
    ahead = variant(0.0) <= baseline(0.0)
    better, target = (variant, baseline(0.0)) if ahead else (baseline, variant(0.0))
    low, high = -math.log(4), 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if better(middle) > target else (low, middle)
    return -low if ahead else low


# ---------------------------------------------------------------- the estimate


@pytest.mark.parametrize("exponent", [0.05, 0.3, 0.7, 1.5])
@pytest.mark.parametrize("ratio", [0.4, 0.8, 1.0, 1.3, 2.5])
def test_a_variant_that_needs_fewer_tokens_at_every_loss_has_that_ratio(exponent, ratio):
    base = power_law(exponent)
    found = costs(losses_of([base, lambda x: base(x + math.log(ratio))], 1))
    assert tokens_of(found).value == pytest.approx(ratio, rel=2e-3)
    assert found.by_variant["v1"].curve_of == ("v1" if ratio >= 1 else "v0")


def test_two_budgets_are_interpolated_in_log_tokens():
    axis = Axis.of([250, 1000], [[4.0, 3.0]])
    assert (axis.weights(np.array([-math.log(2)])) @ np.array([4.0, 3.0]))[0] == pytest.approx(3.5)
    assert axis.where([4.0, 3.0], 3.5) == pytest.approx(-math.log(2), abs=1e-3)


@pytest.mark.parametrize("exponent", [0.1, 0.7])
def test_the_interpolation_is_exact_for_a_power_law_and_straight_lines_are_not(exponent):
    law, x = power_law(exponent), np.linspace(X[0], 0.0, 50)
    axis = Axis.of(list(TOKENS.values()), [law(X)])
    assert axis.exponent == pytest.approx(exponent, abs=0.02)
    np.testing.assert_allclose(axis.weights(x) @ law(X), law(x), atol=2e-5)
    # What a straight line in log tokens would be off, as a factor of tokens: up to 4 % for 0.7.
    off = np.max((np.interp(x, X, law(X)) - law(x)) / (exponent * np.exp(-exponent * x)))
    assert off == pytest.approx(0.058 * exponent, rel=0.15)


def test_more_than_three_budgets_use_the_nearest_three():
    knots, law = [125, 250, 500, 1000], power_law(0.5)
    axis = Axis.of(knots, [law(np.log(np.array(knots) / 1000))])
    x = np.linspace(axis.knots[0], 0, 40)
    weights = axis.weights(x)
    assert (np.count_nonzero(np.abs(weights) > 1e-12, axis=1) <= 3).all()
    np.testing.assert_allclose(weights @ law(axis.knots), law(x), atol=1e-4)


def test_a_loss_outside_of_the_budgets_is_a_bound_and_not_extrapolated():
    base = power_law(0.3)
    found = costs(losses_of([base, lambda x: base(x + math.log(8)), lambda x: base(x - math.log(8))], 3))
    up, down = tokens_of(found, "v1"), tokens_of(found, "v2")
    assert str(up) == "> 4x [4.00, > 4]" and str(down) == "< 0.25x [< 0.25, 0.25]"
    assert up.excludes(1) and down.excludes(1)
    # by FLOPs the bound moves with the ratio of FLOPs per token
    half = costs(losses_of([base, lambda x: base(x + math.log(8))], 3), flops={"v0": 2.0, "v1": 1.0})
    assert str(half.by_variant["v1"].flops) == "> 8x [8.00, > 8]"


def test_a_curve_that_does_not_fall_is_not_measured_and_says_so():
    found = costs(losses_of([power_law(0.3), lambda x: 3.5 + 0.1 * np.asarray(x)], 2))
    assert found.by_variant["v1"].tokens is None
    assert "the loss of v1 does not fall from budget to budget (3.3614, 3.4307, 3.5000)" in found.by_variant["v1"].why


def test_a_variant_without_a_seed_that_finished_all_budgets_is_not_measured():
    losses = losses_of([power_law(0.3), power_law(0.3)], 2)
    del losses["v1"][0.5][0], losses["v1"][0.25][1]
    assert costs(losses).by_variant["v1"].why == "no seed has finished all budgets of both"


def test_the_reverse_is_read_from_the_curve_of_the_worse_one():
    base = power_law(0.5)
    found = costs(losses_of([base, lambda x: base(x + math.log(1.5))], 2)).by_variant["v1"]
    assert [share for share, _ in found.earlier] == pytest.approx([0.25, 0.5])
    assert [ratio for _, ratio in found.earlier] == pytest.approx([1.5, 1.5], rel=5e-3)
    # the loss that a much better variant has after a quarter lies below the baseline's curve
    far = costs(losses_of([base, lambda x: base(x + math.log(8))], 2)).by_variant["v1"]
    assert [ratio for _, ratio in far.earlier] == [None, None]


# ---------------------------------------------------------------- FLOPs and seconds


def test_flops_and_seconds_are_the_ratio_of_tokens_times_that_of_the_costs():
    base = power_law(0.4)
    losses = losses_of(
        [base, lambda x: base(x + math.log(1.5))], 3, lambda v, b, s: 0.001 * math.sin(9 * v + 5 * b + s)
    )
    speeds = {"v0": {0: 100.0, 1: 101.0, 2: 99.0}, "v1": {0: 81.0, 1: 80.0, 2: 79.0}}
    found = costs(losses, flops={"v0": 3.0, "v1": 2.0}, speeds=speeds).by_variant["v1"]
    assert found.tokens is not None and found.flops is not None and found.seconds is not None
    assert found.flops.value == pytest.approx(1.5 * found.tokens.value)
    assert (found.flops.low, found.flops.high) == pytest.approx(
        (1.5 * (found.tokens.low or 0), 1.5 * (found.tokens.high or 0))
    )
    assert found.seconds.value == pytest.approx(found.tokens.value * 0.8, rel=1e-3)
    logs = {v: {s: math.log(x) for s, x in by_seed.items()} for v, by_seed in speeds.items()}
    speed = compare_paired(logs, "v0").differences["v1"].half_width or 0.0
    alone = math.log((found.tokens.high or 0) / found.tokens.value)
    both = math.log((found.seconds.high or 0) / found.seconds.value)
    assert both == pytest.approx(math.hypot(alone, speed))


def test_a_variant_equal_to_the_baseline_on_a_slower_clock_differs_by_the_clock_alone():
    """On a slower clock, losses at equal seconds differ, since the decay is met earlier. That is no effect."""
    losses = losses_of([power_law(0.4)] * 2, 3, lambda v, b, s: 0.01 * math.sin(5 * b + s))
    speeds = {"v0": {0: 100.0, 1: 101.0, 2: 99.0}, "v1": {0: 95.0, 1: 95.95, 2: 94.05}}
    found = costs(losses, speeds=speeds).by_variant["v1"]
    assert str(found.tokens) == str(found.flops) == "1.000x [1.000, 1.000]"
    assert str(found.seconds) == "0.950x [0.950, 0.950]"


def test_one_seed_has_no_interval():
    found = costs(losses_of([power_law(0.4), power_law(0.4, -0.1)], 1)).by_variant["v1"]
    assert found.tokens is not None and found.tokens.low is None and not found.tokens.excludes(1)
    assert str(found.tokens).endswith("x (no interval)") and str(found.seconds).endswith("x (no interval)")


# ---------------------------------------------------------------- the interval


def noisy(rng: Any, variants: int, seeds: int, *, noise: float = 0.01, interaction: float = 0.01) -> Any:
    """Effects of seeds (shared by variants), of seeds at one budget (shared too), of one run, and of one end."""
    seed = rng.normal(0, 5 * noise, seeds)[None, None, :] + rng.normal(0, interaction, (1, len(TOKENS), seeds))
    run = rng.normal(0, noise, (variants, 1, seeds)) + rng.normal(0, noise, (variants, len(TOKENS), seeds))
    table = seed + run / math.sqrt(2)
    return lambda v, b, s: float(table[v, b, s])


def missed(rng: Any, curves: list[Any], seeds: int, repeats: int, **keys: Any) -> float:
    """Share of studies in which an interval does not contain the true speed-up."""
    true = [math.exp(true_ratio(curves[0], curve)) for curve in curves]
    wrong = 0
    for _ in range(repeats):
        found = costs(losses_of(curves, seeds, noisy(rng, len(curves), seeds, **keys)))
        for v in range(1, len(curves)):
            speed_up = found.by_variant[f"v{v}"].tokens
            if speed_up is not None and speed_up.excludes(true[v]):
                wrong += 1
                break
    return wrong / repeats


# The standard error of 300 repeats at 5 % is 1.3 %. Two of them are allowed above the 7 % of a coverage of 93 %.
REPEATS = 300


@pytest.mark.parametrize(("variants", "seeds", "exponent"), [(4, 2, 0.7), (4, 3, 0.1), (9, 2, 0.1), (9, 5, 0.7)])
def test_all_intervals_hold_together(variants, seeds, exponent):
    rng = np.random.default_rng(variants * 10 + seeds)
    effects = [0.0, *np.linspace(-0.4, 0.4, variants - 1) * exponent]
    curves = [power_law(exponent, offset) for offset in effects]
    assert missed(rng, curves, seeds, REPEATS) <= 0.07 + 2 * 0.013


@pytest.mark.parametrize(("variants", "seeds"), [(4, 2), (4, 5), (9, 3)])
def test_of_equal_variants_at_most_6_percent_of_studies_claim_a_speed_up(variants, seeds):
    rng = np.random.default_rng(variants * 10 + seeds)
    assert missed(rng, [power_law(0.4)] * variants, seeds, REPEATS) <= 0.06 + 2 * 0.013


@pytest.mark.parametrize(
    ("variants", "seeds", "exponent", "most"),
    # docs/studies.md names the last case: one degree of freedom for the effects of seeds is little for Satterthwaite's.
    [(4, 3, 0.7, 0.07), (9, 2, 0.1, 0.10)],
)
def test_intervals_if_the_seed_effect_depends_strongly_on_the_budget(variants, seeds, exponent, most):
    rng = np.random.default_rng(5)
    curves = [power_law(exponent, x) for x in (0.0, *np.linspace(-0.4, 0.4, variants - 1) * exponent)]
    assert missed(rng, curves, seeds, REPEATS, interaction=0.03) <= most + 2 * math.sqrt(most * (1 - most) / REPEATS)


def test_at_a_ratio_of_one_the_variance_is_that_of_the_difference_in_loss():
    rng = np.random.default_rng(6)
    losses = losses_of([power_law(0.4)] * 4, 3, noisy(rng, 4, 3))
    final = {v: by_budget[1.0] for v, by_budget in losses.items()}
    comparison = compare_paired(final, "v0")
    tables = [{s: [by_budget[b][s] for b in TOKENS] for s in range(3)} for by_budget in losses.values()]
    pool = Pool.of(tables)
    assert pool is not None and comparison.spread is not None
    variance, df = pool.variance(Axis.of(list(TOKENS.values()), [power_law(0.4)(X)]).weights(np.array([0.0])))
    assert variance[0] == pytest.approx(2 * comparison.spread**2)
    assert df[0] == comparison.degrees_of_freedom


def test_a_variant_with_a_spread_of_its_own_has_a_wider_interval_and_others_do_not():
    rng = np.random.default_rng(7)
    losses = losses_of([power_law(0.4)] * 5, 4, noisy(rng, 5, 4))
    losses["v4"] = {b: {s: x + 0.1 * (-1) ** s for s, x in by_seed.items()} for b, by_seed in losses["v4"].items()}
    found = costs(losses, own_spread=("v4",))
    loud, calm = tokens_of(found, "v4"), tokens_of(found, "v1")
    assert (loud.high or 0) / (loud.low or 1) > 1.2 * (calm.high or 0) / (calm.low or 1)
    assert not loud.excludes(1)


def test_an_end_of_an_interval_beyond_the_budgets_is_open():
    curves = [power_law(0.1), power_law(0.1, -0.1)]
    found = tokens_of(costs(losses_of(curves, 2, noisy(np.random.default_rng(9), 2, 2))))
    assert found.high == math.inf and 0 < (found.low or 0) < found.value < 4 and str(found).endswith(", > 4]")


def test_seconds_hold_together_with_noisy_speeds():
    rng, wrong = np.random.default_rng(8), 0
    curves = [power_law(0.4), power_law(0.4, -0.1), power_law(0.4, 0.1), power_law(0.4, -0.05)]
    true = [math.exp(true_ratio(curves[0], curve)) for curve in curves]
    for _ in range(REPEATS):
        speeds = {f"v{v}": {s: 100.0 * math.exp(rng.normal(0.1 * v, 0.03)) for s in range(3)} for v in range(4)}
        found = costs(losses_of(curves, 3, noisy(rng, 4, 3)), speeds=speeds)
        seconds = [found.by_variant[f"v{v}"].seconds for v in range(1, 4)]
        wrong += any(x is not None and x.excludes(true[v] * math.exp(0.1 * v)) for v, x in enumerate(seconds, 1))
    assert wrong / REPEATS <= 0.07 + 2 * 0.013


@pytest.mark.parametrize(("low", "shown"), [(1.003, "1.003"), (0.997, "0.997"), (0.98, "0.98")])
def test_rounding_does_not_hide_on_which_side_of_1_an_interval_ends(low, shown):
    found = SpeedUp(n=2, value=1.09, low=low, high=1.2, lowest=0.25, highest=4.0)
    assert str(found) == f"1.09x [{shown}, 1.20]"
