"""Matching solves a dimension so that a variant's cost equals the baseline's, or states why it cannot."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from headway.launcher.base.errors import SpecError
from headway.launcher.match.matching import MatchConfig, match_variant, spec_cost, spec_with
from headway.launcher.match.table import matching_rows
from headway.launcher.spec.layouts import why_not_cuttable
from headway.launcher.spec.spec import Spec

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
    assert found.value > 160  # a routed variant computes less, so its MLP is larger
    assert abs(found.residual) < 0.005


def test_an_error_beyond_the_tolerance_states_the_residual_and_the_next_step():
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


def test_a_variant_that_is_too_large_at_its_smallest_value_is_refused():
    with pytest.raises(SpecError, match="even its smallest legal value 16 is too much"):
        match_variant("v", spec(), MatchConfig(), target=1000.0, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("free", "reason"),
    [
        ("model.ffn_wdth", "no such key"),
        ("optimizer.lr", "not an integer"),
        ("attention.type", "not an integer"),
        ("train.tokens", "do not depend on it"),
    ],
)
def test_a_dimension_that_cannot_be_solved_is_refused_with_the_reason(free, reason):
    with pytest.raises(SpecError, match=reason):
        match_variant("v", spec(), MatchConfig(free=free, multiple=3), target=90_000.0, vocab_size=VOCAB)


# ---------------------------------------------------------------- other quantities


def test_kv_bytes_are_matched_by_kv_heads_and_illegal_values_are_skipped():
    baseline = spec(heads=12, kv_heads=4)
    variant = spec(heads=12, kv_heads=1, head_dim=4)  # half the bytes per KV head, so twice the heads: 8, illegal of 12
    match = MatchConfig(quantity="kv_bytes", free="attention.kv_heads", multiple=1, tolerance=0.3)
    target = spec_cost(baseline, VOCAB).kv_bytes_per_token
    found = match_variant("v", variant, match, target=target, vocab_size=VOCAB)
    assert (found.value, found.residual) == (6, -0.25)


def test_kv_bytes_are_matched_by_the_head_size():
    target = spec_cost(spec(head_dim=24), VOCAB).kv_bytes_per_token
    match = MatchConfig(quantity="kv_bytes", free="attention.head_dim", multiple=2)
    found = match_variant("v", spec(kv_heads=4, head_dim=16), match, target=target, vocab_size=VOCAB)
    assert (found.value, found.residual) == (12, 0.0)


def test_the_message_names_the_nearest_legal_value_and_why_the_next_is_illegal():
    match = MatchConfig(quantity="kv_bytes", free="attention.kv_heads", multiple=1, tolerance=0.1)
    target = spec_cost(spec(heads=12, kv_heads=6), VOCAB).kv_bytes_per_token * 7 / 6
    with pytest.raises(SpecError) as error:
        match_variant("v", spec(heads=12), match, target=target, vocab_size=VOCAB)
    text = str(error.value)
    assert "the nearest legal multiple of 1 is 6 (7 is not legal: kv_heads: 12 query heads do not divide" in text
    assert "-14.29%, beyond the tolerance of 10.00%" in text
    assert "free another dimension, or match.tolerance: 14.30% if that difference is acceptable" in text


def test_beyond_the_largest_legal_value_the_message_says_so():
    match = MatchConfig(quantity="kv_bytes", free="attention.kv_heads", multiple=1)
    target = 100 * spec_cost(spec(), VOCAB).kv_bytes_per_token
    with pytest.raises(SpecError, match=r"even its largest legal value 8 is too little \(9 is not legal"):
        match_variant("v", spec(), match, target=target, vocab_size=VOCAB)


def test_if_no_multiple_is_legal_the_reason_of_the_first_is_given():
    match = MatchConfig(free="attention.kv_heads", multiple=16)
    with pytest.raises(SpecError, match=r"no multiple of 16 is legal \(16: kv_heads: 8 query heads.*free another"):
        match_variant("v", spec(), match, target=90_000.0, vocab_size=VOCAB)


def test_a_dimension_without_a_cost_in_this_quantity_is_refused():
    match = MatchConfig(quantity="kv_bytes", free="model.ffn_width")
    with pytest.raises(SpecError, match="KV bytes per token do not depend on it"):
        match_variant("v", spec(), match, target=1000.0, vocab_size=VOCAB)


def test_flops_are_matched_at_the_requested_sequence_length():
    """With longer sequences, fewer score maps save more FLOPs, so the MLP is larger."""
    variant = spec(type="rgqa", top_k=1)

    def solved(seq_len: int | None) -> int:
        match = MatchConfig(quantity="flops", multiple=1, seq_len=seq_len)
        target = spec_cost(spec(), VOCAB, seq_len).flops_per_token.useful
        return match_variant("v", variant, match, target=target, vocab_size=VOCAB).value

    assert solved(None) == solved(64) < solved(4096)


def test_a_sequence_length_is_refused_if_parameters_are_matched():
    with pytest.raises(ValidationError, match="seq_len: the number of parameters does not depend on it; leave it out"):
        MatchConfig(seq_len=64)


# ---------------------------------------------------------------- tensor parallelism


def test_the_solved_value_divides_by_the_tensor_parallel_size():
    target = spec_cost(spec(), VOCAB).num_params
    free = match_variant("v", spec(kv_heads=4), MatchConfig(multiple=1), target=target, vocab_size=VOCAB)
    cut = MatchConfig(multiple=1, tensor_parallel=4, tolerance=0.02)
    found = match_variant("v", spec(kv_heads=4), cut, target=target, vocab_size=VOCAB)
    assert free.value % 4 and found.value % 4 == 0 and abs(found.value - free.value) <= 2
    assert why_not_cuttable(spec_with(spec(kv_heads=4), "model.ffn_width", found.value), 4) is None


def test_a_solved_number_of_groups_divides_over_the_ranks():
    """kv_heads 3 would be nearest and is legal for 12 heads, but two ranks cannot share three groups."""
    match = MatchConfig(quantity="kv_bytes", free="attention.kv_heads", multiple=1, tensor_parallel=2, tolerance=0.5)
    target = spec_cost(spec(heads=12, kv_heads=3), VOCAB).kv_bytes_per_token
    found = match_variant("v", spec(heads=12), match, target=target, vocab_size=VOCAB)
    assert found.value == 2


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [(4, "attention.w_q has 2 whole pieces"), (3, "model.ffn_width 160 does not divide over 3"), (2, None)],
)
def test_a_model_that_does_not_divide_has_a_reason(ranks, reason):
    found = why_not_cuttable(spec(), ranks)
    assert found is None if reason is None else found and reason in found


def test_if_the_tensor_parallel_size_makes_all_values_illegal_the_message_says_why():
    with pytest.raises(SpecError) as error:
        match_variant("v", spec(), MatchConfig(tensor_parallel=4), target=90_000.0, vocab_size=VOCAB)
    text = str(error.value)
    assert "no multiple of 16 is legal (16: attention.w_q has 2 whole pieces" in text
    assert "use a smaller match.tensor_parallel or another match.multiple" in text


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize(("written", "want"), [("0.25%", 0.0025), ("1%", 0.01), (0.02, 0.02), (0, 0.0)])
def test_tolerance_is_a_percentage_or_a_share(written, want):
    assert MatchConfig.model_validate({"tolerance": written}).tolerance == pytest.approx(want)


@pytest.mark.parametrize("written", ["one%", "0.01", 1.5, -0.1, "200%"])
def test_other_tolerances_are_refused(written):
    with pytest.raises(ValidationError):
        MatchConfig.model_validate({"tolerance": written})


@pytest.mark.parametrize(("measured", "shown"), [(1472 / 3, "490.7"), (1_024, "1,024"), (10_616.96, "10,617")])
def test_the_table_rounds_kv_bytes_of_layers_that_keep_a_state(measured, shown):
    cost = {
        "num_params": 1,
        "flops_per_token_useful": 1,
        "flops_per_token_executed": 1,
        "kv_bytes_per_token": measured,
    }
    variant = {"name": "gqa", "free_value": None, "matched": None, "cost": cost}
    record = {"match": {"quantity": "params", "free": "model.ffn_width"}, "baseline": "gqa", "variants": [variant]}
    assert list(matching_rows(record))[-1][-1] == shown
