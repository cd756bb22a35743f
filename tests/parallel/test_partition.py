"""Stages hold consecutive layers, and no other partition has a lower maximum cost."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from random import Random

import pytest

from headway.model.attention.gqa import GqaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.parallel.partition import balanced, imbalance, layer_costs, stage_bounds


def every_partition(n: int, parts: int) -> list[list[int]]:
    return [[0, *inner, n] for inner in combinations(range(1, n), parts - 1)]


def stages(costs: Sequence[float], bounds: list[int]) -> list[float]:
    return [sum(costs[first:end]) for first, end in pairwise(bounds)]


def rank(costs: list[int], bounds: list[int]) -> tuple[float, float, list[int]]:
    """Sort key of partitions, smallest first: slowest stage, sum of squares, bounds."""
    cost = stages(costs, bounds)
    return max(cost), sum(c * c for c in cost), bounds


@pytest.mark.parametrize("seed", range(60))
def test_no_other_partition_is_better(seed):
    draw = Random(seed)
    n = draw.randint(1, 10)
    costs = [draw.choice([0, 1, 2, 3, 7, 50]) for _ in range(n)]
    for parts in range(1, n + 1):
        best = min(every_partition(n, parts), key=lambda bounds: rank(costs, bounds))
        assert balanced([float(c) for c in costs], parts) == best


def test_equal_costs_in_a_unit_without_an_exact_binary_value_are_still_equal():
    """Sums of 0.1 differ in the last bit, and would decide where a tie is."""
    for parts in range(1, 12):
        assert balanced([0.1] * 11, parts) == balanced([1.0] * 11, parts)


def test_how_ties_are_broken():
    assert balanced([1.0] * 5, 2) == [0, 2, 5]  # the earliest of two equal ones
    assert balanced([9.0, 1.0, 1.0, 1.0, 1.0], 3) == [0, 1, 3, 5]  # the rest evenly: 9, 2, 2, not 9, 1, 3


@pytest.mark.parametrize("parts", [0, 4])
def test_more_stages_than_layers_are_refused(parts):
    with pytest.raises(ValueError, match=f"parts: 3 layers cannot be split into {parts} stages; use 1 to 3"):
        balanced([1.0, 1.0, 1.0], parts)


# ---------------------------------------------------------------- layers of a model


MODEL = ModelConfig(width=64, layers=6, ffn_width=160)
DENSE = GqaConfig(heads=8, kv_heads=2, head_dim=8)
ROUTED = RgqaConfig(heads=8, kv_heads=2, head_dim=8, top_k=[4, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("attention", [DENSE, ROUTED], ids=lambda attention: attention.type)
def test_layers_cost_three_forward_passes_of_the_model(attention):
    costs = layer_costs(MODEL, attention, vocab_size=500, seq_len=32)
    assert len(costs) == 9 and costs[0] == costs[-2] == 0 and costs[-1] == 6 * 64 * 500
    forward = account(MODEL, attention, vocab_size=500, seq_len=32).flops_per_token.executed
    assert sum(costs) == pytest.approx(3 * forward, rel=1e-12)


def test_a_layer_that_picks_more_heads_costs_more():
    costs = layer_costs(MODEL, ROUTED, vocab_size=500, seq_len=32)
    assert costs[1] > costs[2] == costs[6]


def test_recomputed_blocks_cost_four_passes_and_the_head_three():
    once = layer_costs(MODEL, DENSE, vocab_size=500, seq_len=32)
    twice = layer_costs(MODEL, DENSE, vocab_size=500, seq_len=32, recompute=True)
    assert [b / a for a, b in zip(once[1:7], twice[1:7], strict=True)] == pytest.approx([4 / 3] * 6)
    assert twice[-1] == once[-1]


@pytest.mark.parametrize("vocab_size", [64, 2000, 50_000])
@pytest.mark.parametrize("parts", range(1, 7))
def test_every_stage_holds_a_block_with_embedding_first_and_head_last(vocab_size, parts):
    costs = layer_costs(MODEL, DENSE, vocab_size=vocab_size, seq_len=32)
    bounds = stage_bounds(costs, parts)
    assert bounds[0] == 0 and bounds[-1] == 9 and len(bounds) == parts + 1
    blocks = [len(set(range(first, end)) & set(range(1, 7))) for first, end in pairwise(bounds)]
    assert min(blocks) >= 1 and sum(blocks) == 6
    between_blocks = range(2, 7)
    legal = [[0, *cut, 9] for cut in combinations(between_blocks, parts - 1)]
    assert max(stages(costs, bounds)) == min(max(stages(costs, other)) for other in legal)


def test_an_expensive_head_leaves_fewer_blocks_to_the_last_stage():
    costs = layer_costs(MODEL, DENSE, vocab_size=2000, seq_len=32)
    bounds = stage_bounds(costs, 3)
    by_count = [0, 3, 5, 9]
    assert bounds[-2] > by_count[-2]
    assert 1 <= imbalance(costs, bounds) < imbalance(costs, by_count)


def test_a_model_of_one_layer_is_one_stage():
    assert stage_bounds([0.0, 5.0, 0.0, 3.0], 1) == [0, 4]
    with pytest.raises(ValueError, match="1 layers cannot be split into 2 stages"):
        stage_bounds([0.0, 5.0, 0.0, 3.0], 2)


def test_imbalance_is_the_largest_stage_over_the_mean():
    assert imbalance([1.0, 2.0, 3.0], [0, 2, 3]) == 1
    assert imbalance([1.0, 2.0, 3.0], [0, 1, 3]) == pytest.approx(5 / 3)
