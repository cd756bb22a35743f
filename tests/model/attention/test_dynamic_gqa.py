"""Dynamic GQA: the allocation of heads, when it changes, and equality with GQA between changes."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from headway.model.attention.dynamic import DynamicGqaConfig, allocate
from headway.model.attention.gqa import GqaConfig

SHAPE: dict[str, Any] = {"heads": 8, "kv_heads": 3, "head_dim": 6}
CONFIG = DynamicGqaConfig(**SHAPE, update_every_steps=2, ema_decay=0.75, freeze_after_tokens=1000)


def train_step(module, x, context, tokens=0):
    """A forward pass, and what follows an optimizer step on one rank."""
    module.train()
    module.before_step(tokens)
    module(x, context)
    module.after_step(module.step_sums())
    module.reset_router_stats()


@pytest.mark.parametrize(
    ("weights", "heads", "sizes"),
    [
        ([1, 1, 1], 9, [3, 3, 3]),
        ([1, 1, 1], 8, [3, 3, 2]),  # equal remainders: the lower index
        ([5, 3, 2], 10, [5, 3, 2]),
        ([0.6, 0.25, 0.15], 8, [5, 2, 1]),  # 4.8, 2, 1.2
        ([0.5, 0.26, 0.24], 6, [3, 2, 1]),  # 3, 1.56, 1.44
        ([98, 1, 1], 8, [6, 1, 1]),
        ([8, 2.1, 1, 1], 8, [5, 1, 1, 1]),  # 5.29, 1.39, then one each; of 6 the others share 4.75 and 1.25
        ([3, 1, 0, 0], 8, [5, 1, 1, 1]),  # two get one; 6 are shared 4.5 to 1.5, equal remainders
        ([0, 0], 4, [2, 2]),
        ([0, 0, 7], 3, [1, 1, 1]),
    ],
)
def test_allocation_is_proportional_with_one_head_at_least(weights, heads, sizes):
    assert allocate(weights, heads) == sizes


def test_allocation_holds_for_any_weights():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        groups = int(torch.randint(1, 9, (), generator=generator))
        heads = groups + int(torch.randint(0, 20, (), generator=generator))
        weights = torch.rand(groups, generator=generator).pow(6).tolist()
        sizes = allocate(weights, heads)
        assert sum(sizes) == heads and min(sizes) >= 1
        by_weight = sorted(range(groups), key=lambda g: weights[g])
        assert sorted(sizes) == [sizes[g] for g in by_weight]  # more weight never means fewer heads


@pytest.mark.parametrize("sizes", [[3, 3, 2], [6, 1, 1], [1, 2, 5]])
@pytest.mark.parametrize("fields", [{}, {"qk_norm": True, "gate": "headwise", "windows": 4, "orthogonality": 0.5}])
def test_equals_gqa_with_the_group_sizes_of_its_allocation(layer, context, x, sizes, fields):
    config = DynamicGqaConfig(**SHAPE, freeze_after_tokens=0, **fields)
    fixed = GqaConfig(**SHAPE, group_sizes=sizes, **fields)
    module, gqa = layer(config), layer(fixed)
    module.allocation.copy_(torch.tensor(sizes))
    x.requires_grad_()
    results = []
    for each in (module, gqa):
        y, aux_loss, _ = each(x, context(config))
        loss = y.square().sum() + (0 if aux_loss is None else aux_loss)
        results.append([y, loss, *torch.autograd.grad(loss, [x, *each.parameters()])])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-12)
    assert config.num_params(width=20) == fixed.num_params(width=20)
    assert config.flops_per_token(width=20, seq_len=11) == fixed.flops_per_token(width=20, seq_len=11)


def test_heads_move_to_the_kv_heads_with_the_stronger_keys(layer, context, x):
    module = layer(CONFIG)
    with torch.no_grad():
        module.w_k[:6].mul_(0.1)
        module.w_k[12:].mul_(3.0)
    weights = {name: p.clone() for name, p in module.named_parameters()}
    powers = (x @ module.w_k.T).unflatten(-1, (3, 6)).square().sum(-1).mean((0, 1))
    train_step(module, x, context(CONFIG))
    torch.testing.assert_close(module.key_power.double(), powers, rtol=1e-6, atol=0)  # kept in fp32
    assert module.allocation.tolist() == [3, 3, 2]  # every second step
    train_step(module, 2 * x, context(CONFIG))
    torch.testing.assert_close(module.key_power.double(), powers * (0.75 + 0.25 * 4), rtol=1e-6, atol=0)
    assert module.allocation.tolist() == allocate(powers.tolist(), 8) == [1, 1, 6]
    for name, p in module.named_parameters():
        assert torch.equal(p, weights[name]), name


def test_qk_norm_does_not_even_out_the_statistic(layer, context, x):
    config = CONFIG.model_copy(update={"qk_norm": True, "update_every_steps": 1})
    module = layer(config)
    with torch.no_grad():
        module.w_k[12:].mul_(10.0)
    train_step(module, x, context(config))
    assert module.allocation.tolist() == [1, 1, 6]


def test_the_statistic_does_not_depend_on_the_split_of_the_batch(layer, context, x):
    whole, cut, rank = layer(CONFIG), layer(CONFIG), layer(CONFIG)
    train_step(whole, x, context(CONFIG))
    for module, rows in ((cut, (slice(0, 1), slice(1, 2))), (rank, (slice(2, 3),))):  # two micro-batches; one
        for part in rows:
            module(x[part], context(CONFIG))
    sums = {name: value + rank.step_sums()[name] for name, value in cut.step_sums().items()}
    assert sums["tokens"].item() == 33
    for module in (cut, rank):
        module.after_step(sums)
        torch.testing.assert_close(module.key_power, whole.key_power, rtol=1e-6, atol=0)


def test_evaluation_is_not_counted_and_a_reset_clears_the_sums(layer, context, x):
    module = layer(CONFIG)
    module.eval()
    module(x, context(CONFIG))
    assert module.step_sums() == {}
    module.train()
    module(x, context(CONFIG))
    assert module.step_sums()
    module.reset_router_stats()
    assert module.step_sums() == {}


def test_frozen_after_the_stated_tokens(layer, context, x):
    config = CONFIG.model_copy(update={"update_every_steps": 1})
    module = layer(config)
    with torch.no_grad():
        module.w_k[12:].mul_(10.0)
    train_step(module, x, context(config), tokens=1000)
    assert module.allocation.tolist() == [3, 3, 2] and module.steps == 0
    train_step(module, x, context(config), tokens=999)
    assert module.allocation.tolist() == [1, 1, 6]


def test_keys_that_are_not_finite_move_no_heads(layer, context, x):
    module = layer(CONFIG.model_copy(update={"update_every_steps": 1}))
    module.allocation.copy_(torch.tensor([1, 1, 6]))
    train_step(module, x / 0, context(CONFIG))
    assert module.allocation.tolist() == [1, 1, 6]


def test_a_loaded_layer_continues_as_the_saved_one(layer, context, x):
    module, resumed = layer(CONFIG), layer(CONFIG, seed=2)
    with torch.no_grad():
        module.w_k[12:].mul_(10.0)
    for _ in range(3):
        train_step(module, x, context(CONFIG))
    resumed.load_state_dict(module.state_dict())
    assert resumed.allocation.tolist() == [1, 1, 6]
    for each in (module, resumed):
        train_step(each, 3 * x, context(CONFIG))
    assert resumed.steps == 4 and torch.equal(resumed.key_power, module.key_power)
    assert torch.equal(resumed(x, context(CONFIG)).y, module(x, context(CONFIG)).y)


def test_the_statistic_stays_in_fp32_in_a_bf16_model(layer):
    module = layer(CONFIG).bfloat16()
    assert module.key_power.dtype == torch.float32 and module.allocation.dtype == torch.int64


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_heads": 9}, ["kv_heads: ", "9 KV heads need one query head", "kv_heads 8", "heads 9"]),
        ({"windows": [3, 4, 5]}, ["windows: ", "cost would change", "one integer per layer", "type gqa"]),
        (
            {"window_pattern": [[3, 4, 5]]},
            ["window_pattern: ", "cost would change", "one integer per layer", "type gqa"],
        ),
    ],
)
def test_impossible_configs_are_refused_with_the_reason_and_two_ways_out(fields, words):
    with pytest.raises(ValidationError) as refusal:
        DynamicGqaConfig.model_validate({**SHAPE, "freeze_after_tokens": 0, **fields})
    message = refusal.value.errors()[0]["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0])
    for word in words[1:]:
        assert word in message


def test_an_allocation_that_would_never_freeze_is_refused():
    with pytest.raises(
        ValueError, match=r"^attention.freeze_after_tokens: 1000 .*use 640 \(80 %\), or train.tokens 1250$"
    ):
        CONFIG.check_run(seq_len=64, tokens=800, tokens_per_step=8)
    CONFIG.check_run(seq_len=64, tokens=1000, tokens_per_step=8)
