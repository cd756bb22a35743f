"""GQA equals attention written out; its limits MHA and MQA, gates, and groups of different sizes."""

import pytest
import torch
from pydantic import ValidationError

from headway.model.attention.gqa import GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.grouped import orthogonality_loss, uneven_orthogonality_loss
from headway.model.attention.rgqa import RgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.base import Shard


def written_out(module, x, sizes, gate=None):
    """No rotation; the first sizes[0] heads read KV head 0, and so on. `gate` [B, S, H, 1 or D]."""
    q, k, v = ((x @ w.T).unflatten(-1, (-1, 10)) for w in (module.w_q, module.w_k, module.w_v))
    out = torch.zeros_like(x)
    causal = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    for h, g in enumerate(g for g, size in enumerate(sizes) for _ in range(size)):
        scores = torch.einsum("bsd,btd->bst", q[:, :, h], k[:, :, g]) / 10**0.5
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        o = weights @ v[:, :, g]
        out = out + (o if gate is None else o * gate[:, :, h]) @ module.w_o[:, h * 10 : (h + 1) * 10].T
    return out


def assert_same_function(module, x, y, expected):
    """Outputs, and gradients with respect to the input and every parameter."""
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    wrt = [x, *module.parameters()]
    for mine, written in zip(
        torch.autograd.grad(y.square().sum(), wrt, retain_graph=True),
        torch.autograd.grad(expected.square().sum(), wrt),
        strict=True,
    ):
        torch.testing.assert_close(mine, written, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_equals_attention_written_out(layer, context, x, groups):
    config = GqaConfig(heads=6, kv_heads=groups, head_dim=10, rope_fraction=0.0)
    module = layer(config)
    x.requires_grad_()
    assert_same_function(module, x, module(x, context(config)).y, written_out(module, x, [6 // groups] * groups))


@pytest.mark.parametrize(
    ("end", "kv_heads"), [(MhaConfig(heads=6, head_dim=10), 6), (MqaConfig(heads=6, head_dim=10), 1)]
)
def test_mha_and_mqa_are_the_limits_of_gqa(decoder, tokens, end, kv_heads):
    gqa = GqaConfig(heads=6, kv_heads=kv_heads, head_dim=10)
    assert torch.equal(decoder(end).logits(tokens), decoder(gqa).logits(tokens))
    assert end.num_params(width=20) == gqa.num_params(width=20)
    assert end.kv_bytes_per_token(seq_len=64, bytes_per_element=2) == gqa.kv_bytes_per_token(
        seq_len=64, bytes_per_element=2
    )


def test_qk_norm_makes_scores_independent_of_the_scale_of_queries(layer, context, x):
    config = GqaConfig(heads=6, kv_heads=2, head_dim=10, qk_norm=True)
    module = layer(config)
    before = module(x, context(config)).y
    with torch.no_grad():
        module.w_q.mul_(3.0)
    after = module(x, context(config)).y
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)  # up to eps inside the norm
    with torch.no_grad():
        module.q_rope.norm.gain.mul_(3.0)
    assert (module(x, context(config)).y - before).abs().max() > 1e-2


@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_a_gate_multiplies_head_outputs_by_a_sigmoid_of_the_input(layer, context, x, gate):
    config = GqaConfig(heads=6, kv_heads=2, head_dim=10, rope_fraction=0.0, gate=gate)
    module = layer(config)
    assert module.w_gate.shape == (6 if gate == "headwise" else 60, 20)
    x.requires_grad_()
    factor = torch.sigmoid(x @ module.w_gate.T).unflatten(-1, (6, -1))
    assert_same_function(module, x, module(x, context(config)).y, written_out(module, x, [3, 3], factor))


@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_gates_of_zero_weights_halve_the_layer(layer, context, x, gate):
    config = GqaConfig(heads=6, kv_heads=2, head_dim=10, gate=gate)
    module, plain = layer(config), layer(config.model_copy(update={"gate": "none"}))
    with torch.no_grad():
        module.w_gate.zero_()
    torch.testing.assert_close(module(x, context(config)).y, plain(x, context(config)).y / 2, rtol=0, atol=1e-12)


def test_a_headwise_gate_is_routed_gqa_that_uses_all_heads(layer, context, x):
    """Up to the factor 2 of the gate sigmoid2: gating and sparsity can be told apart."""
    config = GqaConfig(heads=6, kv_heads=2, head_dim=10, gate="headwise")
    all_on = RgqaConfig(heads=6, kv_heads=2, head_dim=10, top_k=3, gate="sigmoid2", balance=BalanceConfig())
    module, routed = layer(config), layer(all_on)
    with torch.no_grad():
        routed.router.w.copy_(module.w_gate)
    x.requires_grad_()
    y, expected = 2 * module(x, context(config)).y, routed(x, context(all_on)).y
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    names = ("w_q", "w_k", "w_v", "w_o")
    ours = torch.autograd.grad(y.square().sum(), [x, module.w_gate, *(getattr(module, n) for n in names)])
    theirs = torch.autograd.grad(expected.square().sum(), [x, routed.router.w, *(getattr(routed, n) for n in names)])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", [[1, 5], [4, 1, 1], [2, 3, 1]])
def test_groups_of_different_size(layer, context, x, sizes):
    config = GqaConfig(heads=6, kv_heads=len(sizes), head_dim=10, rope_fraction=0.0, group_sizes=sizes)
    module = layer(config)
    x.requires_grad_()
    assert_same_function(module, x, module(x, context(config)).y, written_out(module, x, sizes))


def test_equal_group_sizes_are_plain_gqa(decoder, tokens):
    plain = GqaConfig(heads=6, kv_heads=2, head_dim=10, qk_norm=True)
    listed = plain.model_copy(update={"group_sizes": [3, 3]})
    assert torch.equal(decoder(listed).logits(tokens), decoder(plain).logits(tokens))


def test_costs_do_not_depend_on_group_sizes():
    plain = GqaConfig(heads=6, kv_heads=2, head_dim=10)
    uneven = plain.model_copy(update={"group_sizes": [1, 5]})
    assert uneven.num_params(width=20) == plain.num_params(width=20)
    assert uneven.flops_per_token(width=20, seq_len=33) == plain.flops_per_token(width=20, seq_len=33)
    assert uneven.kv_bytes_per_token(seq_len=33, bytes_per_element=2) == 2 * 2 * 10 * 2


def test_gates_cost_what_their_rows_cost():
    plain = GqaConfig(heads=6, kv_heads=2, head_dim=10)
    for gate, rows in (("headwise", 6), ("elementwise", 60)):
        gated = plain.model_copy(update={"gate": gate})
        assert gated.num_params(width=20) - plain.num_params(width=20) == 20 * rows
        flops = [c.flops_per_token(width=20, seq_len=33) for c in (gated, plain)]
        assert flops[0].executed - flops[1].executed == flops[0].useful - flops[1].useful == 2 * 20 * rows


@pytest.mark.parametrize(
    ("fields", "units"),
    [
        ({"kv_heads": 4}, 4),
        ({"kv_heads": 4, "group_sizes": [1, 3, 1, 3]}, 2),
        ({"kv_heads": 4, "group_sizes": [1, 3, 3, 1]}, 1),
        ({"kv_heads": 4, "windows": [None, 8, None, 8]}, 2),
        ({"kv_heads": 4, "windows": [None, 8, 8, 8]}, 1),
        ({"kv_heads": 4, "windows": [None, 8, None, 8], "group_sizes": [2, 2, 3, 1]}, 1),
    ],
)
def test_ranks_own_whole_repetitions_of_the_pattern_of_groups(fields, units):
    shards = GqaConfig(heads=8, head_dim=10, gate="headwise", **fields).shards()
    assert shards == {"w_o": Shard(1, units), **{n: Shard(0, units) for n in ("w_q", "w_k", "w_v", "w_gate")}}


def test_the_pool_is_the_query_heads_of_equal_groups(layer, context, x):
    config = GqaConfig(heads=6, kv_heads=2, head_dim=10, windows=[None, 4], gate="headwise")
    module = layer(config)
    pool = module.pool(x, context(config))
    assert pool.outputs.shape == (3, 11, 2, 3, 10)
    gate = torch.sigmoid(x @ module.w_gate.T).unflatten(-1, (2, 3, 1))
    y = (pool.outputs * gate).flatten(2) @ module.w_o.T
    torch.testing.assert_close(module(x, context(config)).y, y, rtol=0, atol=1e-12)
    uneven = config.model_copy(update={"group_sizes": [1, 5]})
    assert layer(uneven).pool(x, context(uneven)) is None


def test_orthogonality_of_uneven_groups_is_the_mean_over_groups_that_have_pairs(layer, context, x):
    config = GqaConfig(heads=6, kv_heads=3, head_dim=10, group_sizes=[1, 2, 3], orthogonality=2.0)
    module = layer(config)
    loss = module(x, context(config)).aux_loss
    of_two = orthogonality_loss(module.w_q[10:30], members=2, head_dim=10)
    of_three = orthogonality_loss(module.w_q[30:], members=3, head_dim=10)
    torch.testing.assert_close(loss, 2 * (of_two + of_three) / 2, rtol=1e-12, atol=0)
    even = uneven_orthogonality_loss(module.w_q, torch.tensor([3, 3]), head_dim=10)
    torch.testing.assert_close(even, orthogonality_loss(module.w_q, members=3, head_dim=10), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"group_sizes": [3, 4]}, ["group_sizes: ", "add up to 7 of 6", "add up to 6", "heads 7"]),
        ({"group_sizes": [6]}, ["group_sizes: ", "1 sizes for 2 KV heads", "2 sizes", "kv_heads 1"]),
        ({"kv_heads": 6, "orthogonality": 1.0}, ["orthogonality: ", "one query head", "0.0", "two or more"]),
    ],
)
def test_impossible_options_are_refused_with_the_reason_and_two_ways_out(fields, words):
    with pytest.raises(ValidationError) as refusal:
        GqaConfig.model_validate({"heads": 6, "kv_heads": 2, "head_dim": 10, **fields})
    message = refusal.value.errors()[0]["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0])
    for word in words[1:]:
        assert word in message
