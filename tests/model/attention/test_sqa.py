"""SQA equals GQA with the kept query heads, also in the published variants."""

import pytest
import torch
from pydantic import ValidationError

from headway.model.attention.gqa import GqaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.sqa import SqaConfig


@pytest.mark.parametrize(("kv_heads", "kept"), [(4, 2), (8, 1), (4, 1), (16, 1), (2, 3)])
def test_equals_gqa_of_the_kept_heads(decoder, tokens, kv_heads, kept):
    """SQA, sSQA and xSQA of 16 heads, then kv_heads = heads, then another."""
    sqa = SqaConfig(heads=16, kv_heads=kv_heads, kept=kept, head_dim=6, windows=5, gate="headwise")
    gqa = GqaConfig(heads=kept * kv_heads, kv_heads=kv_heads, head_dim=6, windows=5, gate="headwise")
    assert torch.equal(decoder(sqa).logits(tokens), decoder(gqa).logits(tokens))
    assert sqa.num_params(width=20) == gqa.num_params(width=20)
    assert sqa.flops_per_token(width=20, seq_len=33) == gqa.flops_per_token(width=20, seq_len=33)
    assert sqa.shards() == gqa.shards()
    assert sqa.score_maps == kept * kv_heads


def test_keeping_all_heads_is_the_baseline(decoder, tokens):
    sqa, gqa = SqaConfig(heads=8, kv_heads=2, kept=4, head_dim=6), GqaConfig(heads=8, kv_heads=2, head_dim=6)
    assert torch.equal(decoder(sqa).logits(tokens), decoder(gqa).logits(tokens))


def test_costs_are_the_published_formulas():
    d, g, k, head_dim, s = 64, 4, 2, 16, 128
    sqa = SqaConfig(heads=16, kv_heads=g, kept=k, head_dim=head_dim)
    assert sqa.num_params(width=d) == 2 * d * k * g * head_dim + 2 * d * g * head_dim
    core = 4 * head_dim * k * g * (s + 1) / 2
    flops = sqa.flops_per_token(width=d, seq_len=s)
    assert flops.useful == flops.executed == 4 * d * k * g * head_dim + 4 * d * g * head_dim + core
    assert sqa.kv_bytes_per_token(seq_len=s, bytes_per_element=2) == 2 * 2 * g * head_dim


def test_costs_what_the_chosen_heads_of_routed_gqa_cost():
    """The static control: equal useful FLOPs but for the router, equal core and cache."""
    sqa = SqaConfig(heads=16, kv_heads=4, kept=2, head_dim=16)
    rgqa = RgqaConfig(heads=16, kv_heads=4, top_k=2, head_dim=16)
    assert sqa.core_flops_per_token(seq_len=64) == rgqa.core_flops_per_token(seq_len=64)
    useful = [config.flops_per_token(width=64, seq_len=64).useful for config in (rgqa, sqa)]
    assert useful[0] - useful[1] == 2 * 64 * 16


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kept": 5}, ["kept: ", "5 is more than the 4 query heads", "kept 4", "heads 10"]),
        ({"kv_heads": 3}, ["kv_heads: ", "kv_heads 2 or 4"]),
        ({"windows": [3]}, ["windows: ", "1 windows for 2 KV heads", "list of 2", "one integer"]),
        ({"kept": 1, "orthogonality": 1.0}, ["orthogonality: ", "one query head", "0.0", "two or more"]),
    ],
)
def test_impossible_shapes_are_refused_with_the_reason_and_two_ways_out(fields, words):
    with pytest.raises(ValidationError) as refusal:
        SqaConfig.model_validate({"heads": 8, "kv_heads": 2, "kept": 1, "head_dim": 6, **fields})
    message = refusal.value.errors()[0]["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0])
    for word in words[1:]:
        assert word in message
