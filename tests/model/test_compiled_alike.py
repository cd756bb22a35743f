"""Routed slots are rotated by the same function as dense queries, so that `speed.compile` treats mechanisms alike."""

from dataclasses import replace

import pytest
import torch

from headway.kernels.operations import Operations
from headway.kernels.rope import apply_rope
from headway.kernels.routing import select_rope, top_k
from headway.model.layers import use_operations


@pytest.mark.parametrize("name", ["gqa", "rgqa", "rgqa-k1", "rgqa-always-on", "gqe", "gqe-k1-group0", "hybrid", "moh"])
def test_queries_or_slots_and_keys_are_rotated_by_the_operations_of_speed(name, mechanisms, layer, context, x):
    rotated = []

    def rope(heads, tables):
        rotated.append(heads.shape[2])
        return apply_rope(heads, tables)

    config = mechanisms[name]
    module = layer(config)
    plain = module(x, context(config)).y
    use_operations(module, replace(Operations(), rope=rope))
    assert torch.equal(module(x, context(config)).y, plain)
    assert sum(rotated) >= config.score_maps + config.attended_heads()[0], rotated


def test_selection_then_rotation_has_the_bits_of_the_operation_that_does_both(mechanisms, layer, context):
    rotation = layer(mechanisms["rgqa"]).q_rope
    pool = torch.randn(2, 7, 2, 3, 10)
    idx, rope = top_k(torch.randn(2, 7, 2, 3), 2), context(mechanisms["rgqa"]).rope
    rope = tuple(table[:7].float() for table in rope)
    assert torch.equal(rotation.of_chosen(pool, idx, rope), select_rope(pool, idx, rope).flatten(2, 3))
