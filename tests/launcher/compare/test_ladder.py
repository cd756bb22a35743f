"""The statistics of a ladder: known laws are recovered, intervals hold as often as they say, and refusals name why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ladder_losses import PARAMS, Ladder

from headway.launcher.compare.ladder.curve import Law, law_of, reach
from headway.launcher.compare.ladder.noise import Means, means_of
from headway.launcher.compare.ladder.result import LadderResult, ladder_result
from headway.launcher.compare.ladder.slope import Lines, lines_of
from headway.launcher.compare.ladder.table import Refusal

FIVE = (0.0, 0.02, -0.02, 0.05, -0.05)
DESIGNS = [((6, 4, 2, 1), FIVE), ((4, 2, 2), FIVE[:3]), ((2, 2, 2), FIVE[:3])]


def analysed(ladder: Ladder, rng: Any, **keys: Any) -> LadderResult:
    return ladder_result(ladder.run(rng, **keys), ladder.names, "v0")


def law_over(result: LadderResult, quantity: str = "params") -> Law:
    law = result.by_params if quantity == "params" else result.by_flops
    assert isinstance(law, Law), law
    return law


def lines_over(result: LadderResult) -> Lines:
    assert isinstance(result.lines, Lines), result.lines
    return result.lines


# ---------------------------------------------------------------- estimates


@pytest.mark.parametrize("exponent", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("irreducible", [1.0, 2.5])
def test_a_law_with_little_noise_is_recovered(exponent, irreducible):
    ladder = Ladder(seeds=(2, 2, 2, 2), gain=FIVE, exponent=exponent, irreducible=irreducible, omega=1e-5, sigma=1e-5)
    result = analysed(ladder, np.random.default_rng(1))
    law = law_over(result)
    assert law.exponent == pytest.approx(exponent, rel=0.01)
    assert law.e.value == pytest.approx(irreducible, rel=0.01)
    x = math.log(20e6)
    for v in range(5):
        assert law.loss(v, x).value == pytest.approx(ladder.law([20e6])[v, 0], abs=1e-3)
    for v in range(1, 5):
        # N^-a falls to 1 / (1 + gain) of itself when N grows by (1 + gain)^(1/a)
        assert law.speed_up(v, 0).value == pytest.approx((1 + FIVE[v]) ** (-1 / exponent), rel=0.01)


def test_the_law_over_flops_has_the_exponent_of_flops():
    result = analysed(Ladder(seeds=(2, 2, 2), gain=FIVE, omega=1e-5, sigma=1e-5), np.random.default_rng(1))
    # FLOPs are proportional to N^2 at equal tokens per parameter
    assert law_over(result, "flops").exponent == pytest.approx(0.15, rel=0.02)


def test_the_line_of_a_difference_is_recovered_and_says_whether_the_advantage_grows():
    ladder = Ladder(seeds=(3, 3, 3), gain=(0.0,) * 4, sigma=1e-4)
    x = np.log(PARAMS[:3]) - np.mean(np.log(PARAMS[:3]))
    slopes = np.array([0.0, 0.01, -0.01, 0.0])
    result = analysed(ladder, np.random.default_rng(1), difference=slopes[:, None] * x - 0.03 * (slopes != 0)[:, None])
    lines = lines_over(result).by_variant
    assert [lines[v].slope for v in ("v1", "v2", "v3")] == pytest.approx([0.01, -0.01, 0.0], abs=1e-3)
    assert lines["v1"].middle == pytest.approx(-0.03, abs=1e-3)
    # loss minus the baseline's rises with size: the advantage shrinks
    assert [lines[v].verdict for v in ("v1", "v2", "v3")] == ["shrinks", "grows", "undecided"]
    mean, half = lines["v1"].at(np.log(PARAMS[:3]))
    np.testing.assert_allclose(mean, 0.01 * x - 0.03, atol=2e-3)
    assert (half > 0).all() and half[1] < half[2]


def test_means_and_differences_of_complete_sizes_are_plain_ones():
    ladder = Ladder(seeds=(3, 2, 1), gain=FIVE)
    sizes = ladder.run(np.random.default_rng(2))
    means = means_of(sizes, ladder.names)
    for row, value in enumerate(means.mean):
        losses = sizes[means.size[row]].losses[ladder.names[means.variant[row]]]
        assert value == pytest.approx(np.mean(list(losses.values())))
    contrast = np.zeros(len(means.mean))
    contrast[means.at(1, 0)], contrast[means.at(0, 0)] = 1, -1
    # effects of seeds cancel in a difference within a size
    assert contrast @ means.seed_part @ contrast == pytest.approx(0, abs=1e-12)
    assert contrast @ means.run_part @ contrast == pytest.approx(2 / 3)


def test_with_missing_runs_a_difference_is_that_of_common_seeds_if_seeds_differ_much():
    ladder = Ladder(seeds=(4, 4, 4), gain=(0.0, 0.0, 0.0), omega=1.0, sigma=0.001)
    sizes = ladder.run(np.random.default_rng(3))
    losses = {v: dict(by_seed) for v, by_seed in sizes[0].losses.items()}
    del losses["v1"][0], losses["v1"][3]
    sizes[0] = dataclasses.replace(sizes[0], losses=losses)
    means = means_of(sizes, ladder.names)
    found = means.mean[means.at(1, 0)] - means.mean[means.at(0, 0)]
    assert abs(found) < 0.01  # the plain difference of means is a seed's effect: about 1
    assert abs(np.mean(list(losses["v1"].values())) - np.mean(list(losses["v0"].values()))) > 0.1


def test_variances_are_recovered():
    ladder = Ladder(seeds=(200, 200, 200), gain=FIVE, tau=0.05)
    means = means_of(ladder.run(np.random.default_rng(4)), ladder.names)
    assert means.noise.sigma == pytest.approx(0.015, rel=0.05)
    assert means.noise.omega == pytest.approx(0.02, rel=0.1)
    assert (means.noise.sigma_df, means.noise.seed_df) == (3 * 4 * 199, 3 * 199)
    lack = lines_of(means, np.log(ladder.params), "v0").lack
    assert lack.df == 4 and 0.02 < lack.sd < 0.1 and lack.p_value is not None and lack.p_value < 1e-6


def test_a_variant_of_one_size_is_in_the_law_and_has_no_line():
    ladder = Ladder(seeds=(3, 3, 3), gain=FIVE, sigma=1e-4)
    sizes = ladder.run(np.random.default_rng(5))
    for i in (0, 2):
        sizes[i] = dataclasses.replace(sizes[i], losses={v: x for v, x in sizes[i].losses.items() if v != "v4"})
    result = ladder_result(sizes, ladder.names, "v0")
    assert law_over(result).loss(4, math.log(PARAMS[2])).value == pytest.approx(ladder.law([PARAMS[2]])[4, 0], abs=0.02)
    assert set(lines_over(result).by_variant) == {"v1", "v2", "v3"}
    assert lines_over(result).refused == {
        "v4": "it has finished runs at 1 of the sizes of v0; a trend needs 3",
    }


def test_a_speed_up_at_one_size_rests_on_the_difference_there():
    sides = set()
    for seed in range(8):
        result = analysed(Ladder(seeds=(3, 2, 2, 1), gain=(0.0, 0.02, 0.04, -0.04)), np.random.default_rng(seed))
        law = law_over(result)
        for size in ("s0", "s1", "s2"):
            for v in ("v1", "v2", "v3"):
                difference, found = result.differences[size][v], result.speed_up_at(law, v, size)
                assert found is not None and found.excludes(1.0) == difference.excludes(0.0)
                assert (found.value < 1) == (difference.mean > 0)
                sides.add(found.excludes(1.0))
                half, at = (
                    difference.half_width,
                    float(law.reducible(0, math.log(law.means.sizes[int(size[1])].params[v]))),
                )
                assert half is not None  # the ends at the fitted exponent are inside, those of others can be farther
                for end in (difference.mean - half, difference.mean + half):
                    assert found.low * (1 - 1e-9) <= (1 + end / at) ** (-1 / law.exponent) <= found.high * (1 + 1e-9)
        one = result.speed_up_at(law, "v1", "s3")
        assert one is not None and (one.low, one.high) == (0.0, math.inf)
    assert sides == {True, False}


@pytest.mark.parametrize("seeds", [(3, 3, 3), (2, 2, 2, 2)])
def test_p_of_a_slope_is_below_5_percent_where_its_interval_excludes_0(seeds):
    """With lack of fit of few and of many degrees of freedom."""
    ladder = Ladder(seeds=seeds, gain=FIVE[: 3 if len(seeds) == 3 else 5])
    x, sizes = np.log(ladder.params), ladder.run(np.random.default_rng(12))
    line = lines_of(means_of(sizes, ladder.names), x, "v0").by_variant["v1"]
    for factor in (1.002, 0.998):
        tilt = factor * line.critical * line.standard_error - line.slope
        tilted = [
            dataclasses.replace(
                s, losses=dict(s.losses) | {"v1": {k: y + tilt * x[i] for k, y in s.losses["v1"].items()}}
            )
            for i, s in enumerate(sizes)
        ]
        found = lines_of(means_of(tilted, ladder.names), x, "v0").by_variant["v1"]
        assert found.standard_error == pytest.approx(line.standard_error)
        assert (found.low > 0) == (factor > 1) == (found.p_adjusted < 0.05)
        assert found.p_adjusted == pytest.approx(0.05, abs=1e-3)


def test_the_same_losses_give_the_same_numbers():
    ladder = Ladder(seeds=(2, 2, 2), gain=FIVE)
    found = [lines_over(analysed(ladder, np.random.default_rng(6))).by_variant["v1"] for _ in range(2)]
    assert (found[0].low, found[0].high) == (found[1].low, found[1].high)


# ---------------------------------------------------------------- refusals


def refusal(seeds: tuple[int, ...], **keys: Any) -> LadderResult:
    return analysed(Ladder(seeds=seeds, gain=FIVE, **keys), np.random.default_rng(7))


def test_two_sizes_have_no_trend_and_no_law():
    result = refusal((2, 2))
    assert "v0 has finished runs at 2 sizes; a trend with lack of fit needs 3: train another size" in str(result.lines)
    assert "needs 3 sizes: train another size" in str(result.by_params)


def test_one_seed_everywhere_has_no_noise_to_compare_with():
    result = refusal((1, 1, 1))
    for found in (result.means, result.lines, result.by_params, result.by_flops):
        assert "no size has two variants with two common seeds" in str(found)


def test_close_sizes_have_no_law():
    ladder = Ladder(seeds=(2, 2, 2), gain=FIVE)
    sizes = [
        dataclasses.replace(s, params=dict.fromkeys(ladder.names, 1e6 * 1.5**i))
        for i, s in enumerate(ladder.run(np.random.default_rng(8)))
    ]
    result = ladder_result(sizes, ladder.names, "v0")
    assert "the sizes span a factor of 2.25" in str(result.by_params) and isinstance(result.lines, Lines)


def test_losses_that_rise_or_level_off_have_no_law():
    rising = refusal((2, 2, 2), top=-0.5)
    assert "does not fall with size" in str(rising.by_params)
    level = refusal((2, 2, 2), exponent=6.0, sigma=1e-4, omega=1e-4)
    assert "the loss stops falling after the smallest size" in str(level.by_params)


def test_a_law_that_does_not_fit_is_refused():
    # one size of v1 lies far off, as after another learning rate
    ladder = Ladder(seeds=(3, 3, 3, 3), gain=FIVE)
    sizes = ladder.run(np.random.default_rng(9))
    losses = dict(sizes[2].losses) | {"v1": {s: x + 1.0 for s, x in sizes[2].losses["v1"].items()}}
    sizes[2] = dataclasses.replace(sizes[2], losses=losses)
    result = ladder_result(sizes, ladder.names, "v0")
    assert "the law does not fit" in str(result.by_params) and "learning rate" in str(result.by_params)


def test_a_prediction_far_beyond_the_ladder_is_refused():
    law = law_over(refusal((2, 2, 2)))
    law.loss(0, math.log(PARAMS[2] * 20))
    with pytest.raises(Refusal, match=r"28M? is|a prediction may reach 27 times"):
        law.loss(0, math.log(PARAMS[2] * 40))


def test_the_reach_of_a_ladder_is_the_largest_size_that_is_predicted():
    law = law_over(refusal((2, 2, 2)))
    most = reach([PARAMS[1], PARAMS[2], PARAMS[0]])
    assert most == pytest.approx(PARAMS[2] * (PARAMS[2] / PARAMS[0]) ** 2)
    law.loss(0, math.log(most * 0.999))
    with pytest.raises(Refusal, match="times the largest size"):
        law.loss(0, math.log(most * 1.001))


def test_no_finished_run_says_so():
    ladder = Ladder(seeds=(2, 2, 2), gain=FIVE)
    sizes = [dataclasses.replace(s, losses={}) for s in ladder.run(np.random.default_rng(10))]
    assert ladder_result(sizes, ladder.names, "v0").lines == "no run has finished: train the ladder"


# ---------------------------------------------------------------- coverage

REPEATS, MANY = 240, 1000


def allowed(coverage: float, repeats: int) -> float:
    """Two standard errors of a share over as many simulated ladders."""
    return 2 * math.sqrt(coverage * (1 - coverage) / repeats)


def share(repeats: int, holds: Callable[[Any], bool], seed: int) -> float:
    rng = np.random.default_rng(seed)
    return sum(holds(rng) for _ in range(repeats)) / repeats


def slopes_hold(ladder: Ladder) -> Callable[[Any], bool]:
    """Whether the simultaneous intervals of all slopes hold."""
    x = np.log(ladder.params)
    true = 0.005 * np.arange(len(ladder.gain))

    def holds(rng: Any) -> bool:
        means = means_of(ladder.run(rng, difference=true[:, None] * (x - x.mean())), ladder.names)
        lines = lines_of(means, x, "v0").by_variant
        return all(lines[v].low <= true[k] <= lines[v].high for k, v in enumerate(ladder.names) if k)

    return holds


def law_of_means(means: Means, ladder: Ladder) -> Law:
    return law_of(means, np.log(ladder.params)[means.size])


def losses_hold(ladder: Ladder, factor: float, seeds: int | None) -> Callable[[Any], bool]:
    """Whether the prediction interval of v1 holds at so many times the largest size."""
    params = ladder.params[-1] * factor

    def holds(rng: Any) -> bool:
        law = law_of_means(means_of(ladder.run(rng), ladder.names), ladder)
        true = (ladder.law([params]) + ladder.deviations(rng, 1))[1, 0]
        if seeds:
            true += rng.normal(0, math.hypot(ladder.omega, ladder.sigma) / math.sqrt(seeds))
        found = law.loss(1, math.log(params), seeds=seeds)
        return found.low <= true <= found.high

    return holds


def differences_hold(ladder: Ladder, factor: float, seeds: int | None) -> Callable[[Any], bool]:
    """Whether the prediction intervals of all differences hold at so many times the largest size."""
    params = ladder.params[-1] * factor

    def holds(rng: Any) -> bool:
        law = law_of_means(means_of(ladder.run(rng), ladder.names), ladder)
        true = (ladder.law([params]) + ladder.deviations(rng, 1))[:, 0]
        if seeds:
            true = true + rng.normal(0, ladder.sigma / math.sqrt(seeds), len(true))
        found = [law.difference(v, 0, math.log(params), seeds=seeds) for v in range(1, len(true))]
        return all(r.low <= true[v] - true[0] <= r.high for v, r in enumerate(found, 1))

    return holds


def check(coverage: float, repeats: int, low: float = 0.93, high: float = 0.97) -> None:
    assert low - allowed(low, repeats) <= coverage <= high + allowed(high, repeats)


@pytest.mark.parametrize(
    ("seeds", "gain", "tau"),
    # With 8 degrees of freedom of lack of fit, it may be as large as the noise of a run; with 2 (sizes of three
    # variants), slopes hold if it is small beside that.
    [*((*design, tau) for design in DESIGNS for tau in (0.0, 0.005)), (*DESIGNS[0], 0.015)],
)
def test_slopes_hold_as_often_as_they_say(seeds, gain, tau):
    check(share(REPEATS, slopes_hold(Ladder(seeds=seeds, gain=gain, tau=tau)), 1), REPEATS)


@pytest.mark.parametrize(("seeds", "gain"), DESIGNS)
def test_predicted_losses_hold_as_often_as_they_say(seeds, gain):
    ladder, repeats = Ladder(seeds=seeds, gain=gain, tau=0.005), REPEATS // 2
    check(share(repeats, losses_hold(ladder, 4, None), 2), repeats)


@pytest.mark.parametrize(("seeds", "gain"), DESIGNS[:1])
def test_predicted_differences_hold_as_often_as_they_say(seeds, gain):
    ladder, repeats = Ladder(seeds=seeds, gain=gain, tau=0.005), REPEATS // 2
    check(share(repeats, differences_hold(ladder, 4, 1), 3), repeats)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("tau", "tau_common"), [(0.0, 0.0), (0.005, 0.0), (0.0, 0.005)])
@pytest.mark.parametrize(("seeds", "gain"), DESIGNS)
def test_all_intervals_hold_as_often_as_they_say(seeds, gain, tau, tau_common):
    ladder = Ladder(seeds=seeds, gain=gain, tau=tau, tau_common=tau_common)
    # where there is no lack of fit at all, its allowance makes intervals of slopes wider than they need to be
    check(share(MANY, slopes_hold(ladder), 11), MANY, high=0.97 if tau else 0.98)
    for factor, of in ((4, None), (4, 1), (20, 1)):
        # deviations of whole sizes are allowed for in any case, so losses hold somewhat more often without them
        check(share(MANY, losses_hold(ladder, factor, of), 12), MANY, high=0.98)
    check(share(MANY, differences_hold(ladder, 4, 1), 13), MANY, high=0.985)
    # the expected difference has no noise of a run beside the upper limit of the lack of fit
    check(share(MANY, differences_hold(ladder, 4, None), 14), MANY, high=1.0)
