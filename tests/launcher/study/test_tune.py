"""Tests of the rule that chooses a tuned value (headway.launcher.study.ladder.choice), and of its config."""

from __future__ import annotations

import math

import pytest

from headway.launcher.study.ladder.choice import carried, choose, multiples, next_values, parabola_minimum, together
from headway.launcher.study.sizes import TuneConfig


def search(**more) -> TuneConfig:
    return TuneConfig(**{"grid": [1e-3, 2e-3, 4e-3], "seeds": [101], **more})


def quadratic(best: float, values: list[float], height: float = 0.1) -> dict[float, float]:
    """Losses whose exact minimum in log(value) is `best`."""
    return {v: 3.0 + height * math.log(v / best) ** 2 for v in values}


@pytest.mark.parametrize("best", [1.2e-3, 2e-3, 3.3e-3])
def test_the_parabola_finds_the_minimum_of_a_quadratic_curve(best):
    values = [0.5e-3, 1e-3, 2e-3, 4e-3, 8e-3]
    found = choose(quadratic(best, values))
    assert found.value == pytest.approx(best, rel=0.005)
    assert not found.edge


def test_the_parabola_is_right_for_uneven_spacing():
    x = [0.0, 1.0, 5.0]
    assert parabola_minimum(x, [(v - 1.7) ** 2 for v in x]) == pytest.approx(1.7)


def test_three_equal_losses_give_the_middle_value():
    assert choose({1.0: 2.0, 2.0: 2.0, 4.0: 2.0}).value == 1.0  # the smallest of equals lies on the edge
    assert parabola_minimum([0.0, 1.0, 2.0], [2.0, 2.0, 2.0]) == 1.0


def test_the_grid_grows_beyond_the_edge_on_which_any_variant_is_best():
    grid = [1e-3, 2e-3, 4e-3]
    inside, low, high = (quadratic(best, grid) for best in (2e-3, 1e-4, 1e-1))
    config = search()
    assert next_values(config, grid, {"a": inside, "b": inside}) == []
    assert next_values(config, grid, {"a": inside, "b": low}) == [5e-4]
    assert next_values(config, grid, {"a": high, "b": inside}) == [8e-3]
    assert next_values(config, grid, {"a": high, "b": low}) == [5e-4, 8e-3]


def test_the_grid_stops_growing_and_the_choice_says_that_it_lies_on_the_edge():
    config, grid = search(extend=1), [1e-3, 2e-3, 4e-3, 8e-3]
    curve = quadratic(1.0, grid)
    assert next_values(config, grid, {"a": curve}) == []
    found = choose(curve)
    assert (found.value, found.edge) == (8e-3, True)
    assert "may lie beyond" in found.how


def test_a_diverged_trial_is_never_chosen_but_closes_the_grid():
    curve = {1e-3: 3.2, 2e-3: 3.0, 4e-3: math.inf}
    assert next_values(search(), list(curve), {"a": curve}) == []
    assert choose(curve).value == 2e-3
    assert "diverged" in choose(curve).how
    with pytest.raises(ValueError, match="finite"):
        choose(dict.fromkeys(curve, math.inf))


def test_values_of_a_batch_are_whole_micro_batches_and_one_for_all_variants():
    grid, legal = [8.0, 16.0, 32.0], multiples(8)
    curves = together({"a": quadratic(11.0, grid), "b": quadratic(30.0, grid)})
    assert curves["a"] == curves["b"] and next_values(search(grid=grid), grid, curves, legal) == []
    assert choose(curves["a"]).value == pytest.approx(math.sqrt(330), rel=0.005)
    assert choose(curves["a"], legal).value == 16
    # the value below the edge is that of the edge after rounding: nothing is added
    assert next_values(search(grid=grid), grid, {"a": quadratic(2.0, grid)}, legal) == []
    assert next_values(search(grid=grid), grid, {"a": quadratic(90.0, grid)}, legal) == [64]
    assert math.isinf(together({"a": {1.0: 2.0}, "b": {1.0: math.inf}})["a"][1.0])
    got = carried("width", {"s": {"gqa": 16.0}}, params=PARAMS, widths=WIDTHS, size="m", legal=legal)
    assert got["gqa"].value == 8


PARAMS = {"s": 1e6, "m": 4e6, "l": 16e6}
WIDTHS = {"s": 64.0, "m": 128.0, "l": 256.0}


def test_values_are_carried_by_the_stated_rule():
    chosen = {"s": {"gqa": 8e-3, "rgqa": 4e-3}, "m": {"gqa": 4e-3, "rgqa": 2e-3}}
    got = {rule: carried(rule, chosen, params=PARAMS, widths=WIDTHS, size="l") for rule in ("same", "width", "fit")}
    assert {v: c.value for v, c in got["same"].items()} == {"gqa": 4e-3, "rgqa": 2e-3}
    assert {v: c.value for v, c in got["width"].items()} == {"gqa": 2e-3, "rgqa": 1e-3}
    # both fall by a half where the parameters grow fourfold: exponent -0.5
    assert {v: c.value for v, c in got["fit"].items()} == {"gqa": 2e-3, "rgqa": 1e-3}
    assert "exponent -0.50" in got["fit"]["gqa"].how


def test_the_fit_has_one_exponent_and_uses_a_variant_with_one_point():
    chosen = {"s": {"gqa": 8e-3, "late": 1e-3}, "m": {"gqa": 4e-3}}
    got = carried("fit", chosen, params=PARAMS, widths=WIDTHS, size="l")
    assert got["gqa"].value == 2e-3
    assert got["late"].value == 2.5e-4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"grid": [1e-3]}, "at least 3"),
        ({"grid": [1e-3, 1e-3, 2e-3]}, "given twice"),
        ({"grid": [0.0, 1e-3, 2e-3]}, "above 0"),
        ({"factor": 1}, "greater than 1"),
        ({"budget": 0}, "greater than 0"),
        ({"seeds": [1, 1]}, "given twice"),
    ],
)
def test_a_search_that_is_not_possible_is_refused(more, words):
    with pytest.raises(ValueError, match=words):
        search(**more)


def test_a_value_carried_from_an_edge_says_so():
    chosen, edges = {"s": {"gqa": 1.0, "sqa": 2.0}, "m": {"gqa": 1.0, "sqa": 2.0}}, {"m": {"sqa"}}
    for rule in ("same", "width", "fit"):
        got = carried(rule, chosen, params=PARAMS, widths=WIDTHS, size="l", edges=edges)
        assert {v: c.edge for v, c in got.items()} == {"gqa": False, "sqa": True}, rule
        assert got["sqa"].how == f"{got['gqa'].how}; the optimum there may lie beyond the values tried"
    elsewhere = carried("width", chosen, params=PARAMS, widths=WIDTHS, size="l", edges={"s": {"sqa"}})
    assert not elsewhere["sqa"].edge  # the value is that of m alone
