"""MoA: routed GQA with one group, its published gates and losses."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from headway.model.attention.gqa import MqaConfig
from headway.model.attention.moa import MoaConfig
from headway.model.attention.registry import AnyMechanism
from headway.model.attention.rgqa import RgqaConfig
from headway.model.balance import BalanceConfig

SHAPE: dict[str, Any] = {"heads": 5, "head_dim": 6}
BALANCE: dict[str, Any] = {"balance": BalanceConfig(f_p=0.1, cv2=0.2, z=0.3)}


def silence(module):
    """All logits 0."""
    with torch.no_grad():
        module.router.w.zero_()
    return module


@pytest.mark.parametrize("gate", ["detached_renorm", "softmax"])
@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_it_is_routed_gqa_with_one_group(decoder, tokens, gate, top_k):
    fields = {**SHAPE, **BALANCE, "gate": gate, "top_k": top_k, "qk_norm": True, "orthogonality": 0.1}
    moa, rgqa = MoaConfig(**fields), RgqaConfig(**fields, kv_heads=1)
    models = [decoder(config) for config in (moa, rgqa)]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    outs = [model(tokens, tokens.roll(-1, 1)) for model in models]
    for out in outs:
        (out.loss_sum + out.aux_loss).backward()
    torch.testing.assert_close(outs[0].loss_sum, outs[1].loss_sum, rtol=0, atol=0)
    torch.testing.assert_close(outs[0].aux_loss, outs[1].aux_loss, rtol=0, atol=0)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)
    sizes = {"width": 20, "seq_len": 11}
    assert moa.flops_per_token(**sizes) == rgqa.flops_per_token(**sizes)
    assert moa.core_flops_per_token(seq_len=11) == rgqa.core_flops_per_token(seq_len=11)
    assert moa.shards() == rgqa.shards()


@pytest.mark.parametrize("gate", ["detached_renorm", "softmax"])
def test_a_token_gets_its_weighted_experts(layer, context, x, gate):
    config = MoaConfig(**SHAPE, top_k=2, gate=gate, rope_fraction=0.0)
    module = layer(config)
    y = module(x, context(config)).y
    q, k, v = ((x @ w.T).unflatten(-1, (-1, 6)) for w in (module.w_q, module.w_k, module.w_v))
    p = (x @ module.router.w.T).softmax(-1)
    for b, t in ((0, 0), (1, 4), (2, 10)):
        picked = p[b, t].sort(descending=True).indices[:2]
        expected = torch.zeros(20, dtype=x.dtype)
        for e in picked.tolist():
            scores = q[b, t, e] @ k[b, : t + 1, 0].T / math.sqrt(6)
            out = module.w_o[:, 6 * e : 6 * e + 6] @ (scores.softmax(-1) @ v[b, : t + 1, 0])
            weight = p[b, t, e] / p[b, t, picked].sum() if gate == "detached_renorm" else p[b, t, e]
            expected += weight * out
        torch.testing.assert_close(y[b, t], expected, rtol=0, atol=1e-12)


def test_all_experts_at_equal_logits_are_mqa_divided_by_their_number(layer, context, x):
    moa, mqa = MoaConfig(**SHAPE, top_k=5, **BALANCE), MqaConfig(**SHAPE)
    layers = [silence(layer(moa)), layer(mqa)]
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    ys = [module(z, context(moa)).y for module, z in zip(layers, inputs, strict=True)]
    upstream = torch.randn_like(x)
    for y in ys:
        (y * upstream).sum().backward()
    torch.testing.assert_close(5 * ys[0], ys[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(5 * inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-11)
    for name in ("w_q", "w_k", "w_v", "w_o"):
        got, want = (module.get_parameter(name).grad for module in layers)
        torch.testing.assert_close(5 * got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("gate", ["detached_renorm", "softmax"])
def test_the_task_teaches_the_router_even_of_one_expert(layer, context, x, gate):
    config = MoaConfig(**SHAPE, top_k=1, gate=gate, balance=BalanceConfig())
    module = layer(config)
    (module(x, context(config)).y ** 2).sum().backward()
    assert module.router.w.grad.abs().max() > 1e-3


def test_published_losses_at_equal_logits(layer, context, x):
    """f.P is 1 however the ties fall, as P is uniform; logsumexp of 5 zeros is log 5."""
    config = MoaConfig(**SHAPE, top_k=2)
    aux_loss = silence(layer(config))(x, context(config)).aux_loss
    assert aux_loss.item() == pytest.approx(0.01 + 0.001 * math.log(5) ** 2, rel=1e-12)


def test_experts_are_one_pool_of_interchangeable_members(layer, context, x):
    config = MoaConfig(**SHAPE, top_k=2)
    pool = layer(config).pool(x, context(config))
    assert pool.weights.shape == (1, 5, 120) and pool.outputs.shape == (3, 11, 1, 5, 6)


def test_cost_is_that_of_the_formulas():
    config = MoaConfig(heads=8, head_dim=128, top_k=2)
    assert config.num_params(width=512) == 2 * 512 * 8 * 128 + 2 * 512 * 128 + 512 * 8
    flops = config.flops_per_token(width=512, seq_len=1023)
    rest = 4 * 512 * 128 + 2 * 512 * 8 + 4 * 128 * 2 * 512
    assert flops.useful == 4 * 512 * 2 * 128 + rest
    assert flops.executed == 4 * 512 * 8 * 128 + rest
    assert config.kv_bytes_per_token(seq_len=1023, bytes_per_element=2) == 2 * 128 * 2


def test_a_single_group_is_not_sharded():
    assert {shard.units for shard in MoaConfig(**SHAPE, top_k=2).shards().values()} == {1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": 6}, ["top_k: ", "6 experts selected of 5", "top_k 1 to 5", "heads 6"]),
        ({"heads": 1, "top_k": 1}, ["heads: ", "nothing to choose", "heads 2", "type mqa"]),
        ({"top_k": 0}, ["Input should be greater than or equal to 1"]),
        ({"top_k": 2, "gate": "sigmoid2"}, ["Input should be 'detached_renorm' or 'softmax'"]),
        ({"top_k": 2, "kv_heads": 2}, ["Extra inputs are not permitted"]),
    ],
)
def test_impossible_experts_are_refused_with_the_reason_and_two_ways_out(fields, words):
    with pytest.raises(ValidationError) as refusal:
        TypeAdapter(AnyMechanism).validate_python({"type": "moa", **SHAPE, **fields})
    (error,) = refusal.value.errors()
    message = error["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0])
    for word in words[1:]:
        assert word in message
