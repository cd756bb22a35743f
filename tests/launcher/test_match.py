"""Matching solves a dimension so that a variant costs what the baseline costs, or says why it cannot."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from headway.launcher.errors import SpecError
from headway.launcher.match import MatchConfig, match_variant, nearest_multiple, spec_cost, spec_with
from headway.launcher.spec import Spec

VOCAB = 64


def spec(**attention) -> Spec:
    return Spec.model_validate(
        {
            "model": {"width": 64, "layers": 2, "ffn_width": 160},
            "attention": {"type": "gqa", "heads": 8, "kv_heads": 2, "head_dim": 8} | attention,
            "data": {"seq_len": 64, "source": {"type": "synthetic", "task": "copy", "vocab_size": VOCAB}},
            "optimizer": {"lr": 1e-3},
            "train": {"tokens": 1000, "global_batch": 1, "micro_batch": 1},
        }
    )


@pytest.mark.parametrize(("target", "want"), [(100, 10), (124, 10), (125, 10), (126, 15), (1, 5), (50, 5), (5000, 500)])
def test_the_multiple_with_the_nearest_cost_is_found_and_the_smaller_one_on_a_tie(target, want):
    assert nearest_multiple(lambda n: 10.0 * n, target=target, multiple=5) == want


def test_nearest_multiple_agrees_with_trying_all():
    def cost(n: int) -> float:
        return 7.0 * n + 0.01 * n * n

    for target in range(5, 4000, 37):
        best = min(range(3, 600, 3), key=lambda n: abs(cost(n) - target))
        assert nearest_multiple(cost, target=target, multiple=3) == best


@pytest.mark.parametrize(
    "attention",
    [
        {"type": "rgqa", "top_k": 1},
        {"type": "gqa", "kv_heads": 8},
        {"type": "switchhead", "kv_heads": 2, "experts": 4, "top_k": 2},
    ],
)
def test_the_residual_is_that_of_the_built_sizes_and_no_neighbour_is_nearer(attention):
    if attention["type"] == "switchhead":
        variant = Spec.model_validate({**spec().model_dump(), "attention": {**attention, "head_dim": 8}})
    else:
        variant = spec(**attention)
    target = spec_cost(spec(), VOCAB).num_params
    match = MatchConfig(multiple=4, tolerance=0.05)
    found = match_variant("v", variant, match, target=target, vocab_size=VOCAB)

    def params(ffn_width: int) -> int:
        return spec_cost(spec_with(variant, "model.ffn_width", ffn_width), VOCAB).num_params

    assert found.value % 4 == 0
    assert found.cost == params(found.value)
    assert found.residual == pytest.approx(params(found.value) / target - 1, abs=1e-12)
    misses = {n: abs(params(n) - target) for n in (found.value - 4, found.value, found.value + 4)}
    assert min(misses.values()) == misses[found.value]


def test_an_equal_variant_keeps_its_size_with_no_residual():
    target = spec_cost(spec(), VOCAB).num_params
    found = match_variant("same", spec(), MatchConfig(multiple=16), target=target, vocab_size=VOCAB)
    assert (found.value, found.residual) == (160, 0.0)


def test_useful_flops_can_be_matched_instead_of_parameters():
    target = spec_cost(spec(), VOCAB).flops_per_token.useful
    variant = spec(type="rgqa", top_k=1)
    found = match_variant("v", variant, MatchConfig(quantity="flops", multiple=1), target=target, vocab_size=VOCAB)
    assert found.value > 160  # a routed variant computes less, so its MLP may grow
    assert abs(found.residual) < 0.005


def test_beyond_the_tolerance_the_error_says_by_how_much_and_what_to_do():
    target = spec_cost(spec(), VOCAB).num_params
    variant = spec(type="rgqa", top_k=1)
    with pytest.raises(SpecError) as error:
        match_variant("rgqa", variant, MatchConfig(multiple=128, tolerance=0.001), target=target, vocab_size=VOCAB)
    text = str(error.value)
    assert "variant rgqa: match.free model.ffn_width" in text
    assert "beyond the tolerance of 0.10%" in text
    assert "use a smaller match.multiple, or match.tolerance:" in text


def test_the_tolerance_named_in_the_error_is_enough():
    target = spec_cost(spec(), VOCAB).num_params
    variant = spec(type="rgqa", top_k=1)
    with pytest.raises(SpecError) as error:
        match_variant("v", variant, MatchConfig(multiple=128, tolerance=0.001), target=target, vocab_size=VOCAB)
    percent = str(error.value).split("match.tolerance: ")[1].split(" ")[0]
    match = MatchConfig.model_validate({"multiple": 128, "tolerance": percent})
    match_variant("v", variant, match, target=target, vocab_size=VOCAB)


def test_too_large_even_at_the_smallest_value():
    with pytest.raises(SpecError, match="even its smallest value 16 is too much"):
        match_variant("v", spec(), MatchConfig(), target=1000.0, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("free", "reason"),
    [
        ("model.ffn_wdth", "no such key"),
        ("optimizer.lr", "not an integer"),
        ("attention.type", "not an integer"),
        ("train.tokens", "do not depend on it"),
        ("attention.heads", r"heads: 3 on the way|3 on the way to the match is not legal \(.*kv_heads"),
    ],
)
def test_a_dimension_that_cannot_be_solved_is_refused_with_the_reason(free, reason):
    with pytest.raises(SpecError, match=reason):
        match_variant("v", spec(), MatchConfig(free=free, multiple=3), target=90_000.0, vocab_size=VOCAB)


@pytest.mark.parametrize(("written", "want"), [("0.25%", 0.0025), ("1%", 0.01), (0.02, 0.02), (0, 0.0)])
def test_tolerance_is_a_percentage_or_a_share(written, want):
    assert MatchConfig.model_validate({"tolerance": written}).tolerance == pytest.approx(want)


@pytest.mark.parametrize("written", ["one%", "0.01", 1.5, -0.1, "200%"])
def test_other_tolerances_are_refused(written):
    with pytest.raises(ValidationError):
        MatchConfig.model_validate({"tolerance": written})
