"""Activation recomputation does not change outputs, gradients, router selections or statistics."""

from copy import deepcopy
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError

from headway.model.attention.rgqa import RgqaConfig
from headway.model.base import Context, RoutingMemory
from headway.model.recompute import recomputed
from headway.model.router import LinearRouterConfig

SHAPE: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 6}


def plain(module, x, context):
    return module(x, context)


def trained(run, module, x, context):
    """y, auxiliary loss and gradients of a loss that weighs every output differently."""
    y, aux_loss, _ = run(module, x, context)
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    loss = (y * weight).sum() + (0 if aux_loss is None else aux_loss)
    return [y, loss, *torch.autograd.grad(loss, [x, *module.parameters()])]


def test_output_loss_and_gradients_are_those_of_the_plain_pass_bit_by_bit(mechanism, layer, context, x):
    module = layer(mechanism)
    x.requires_grad_()
    both = [trained(run, module, x, context(mechanism)) for run in (plain, recomputed)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*both, strict=True))


def test_statistics_count_a_token_once(mechanism, layer, context, x):
    module = layer(mechanism)
    once, twice = deepcopy(module), module
    trained(plain, once, x.requires_grad_(), context(mechanism))
    trained(recomputed, twice, x, context(mechanism))
    for name, stats in once.router_stats().items():
        assert torch.equal(stats.load, twice.router_stats()[name].load)
        pairs = zip(stats.detail.tensors(), twice.router_stats()[name].detail.tensors(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    for name, total in once.step_sums().items():
        assert torch.equal(total, twice.step_sums()[name])


@pytest.mark.parametrize("fields", [{"noise": "normal"}, {"noise": "gumbel"}, {"dropout": 0.5}])
def test_noise_is_not_drawn_again(layer, context, x, fields):
    config = RgqaConfig(**SHAPE, top_k=1, router=LinearRouterConfig(**fields))
    module = layer(config)
    x.requires_grad_()
    both, states = [], []
    for run in (plain, recomputed):
        torch.manual_seed(5)
        both.append(trained(run, module, x, context(config)))
        states.append(torch.get_rng_state())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*both, strict=True))
    assert torch.equal(*states)


def with_near_ties(module):
    """Logits that differ by less than the noise that every pass but the first adds to them."""

    def perturb(router):
        exact, passes = router.logits, count()

        def logits(*args):
            made = 1e-9 * exact(*args)
            return made if next(passes) == 0 else made + 1e-7 * torch.randn_like(made)

        router.logits = logits

    for router in module.routers.values():
        perturb(router)
    return module


def test_a_recomputed_router_repeats_its_selection(routed_mechanism, layer, context, x):
    x.requires_grad_()
    expected, kept = (
        trained(run, with_near_ties(layer(routed_mechanism)), x, context(routed_mechanism))[2]
        for run in (plain, recomputed)
    )
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-5)  # gates follow the noise of 1e-7


def test_without_memory_a_recomputed_router_selects_differently(routed_mechanism, layer, context, x, monkeypatch):
    x.requires_grad_()
    expected = trained(plain, with_near_ties(layer(routed_mechanism)), x, context(routed_mechanism))[2]
    monkeypatch.setattr(Context, "choice", lambda self, choose, experts: choose())
    try:
        wrong = trained(recomputed, with_near_ties(layer(routed_mechanism)), x, context(routed_mechanism))[2]
    except CheckpointError:  # other numbers of tokens per expert, other shapes
        assert getattr(routed_mechanism, "projections", "dense") == "grouped"
    else:
        assert (wrong - expected).abs().max() > 0.1


def test_every_backward_pass_repeats_the_first_pass(layer, context, x):
    config = RgqaConfig(**SHAPE, top_k=1)
    module = layer(config)
    y, *_ = recomputed(module, x.requires_grad_(), context(config))
    first, second = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def kept_bytes(run, module, x, context):
    """Of all tensors that a forward pass keeps for the backward pass, parameters left out; shared storage once."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run(module, x, context)
    return sum(kept.values()), output


def test_a_block_keeps_only_its_input(mechanism, layer, context, x):
    module = layer(mechanism)
    x = (x + 0).requires_grad_()
    usually, _ = kept_bytes(plain, module, x, context(mechanism))
    kept, _ = kept_bytes(recomputed, module, x, context(mechanism))
    assert kept == 8 * x.numel() < usually / 3


def test_choices_take_a_byte_per_slot(layer, context, x):
    config, memory = RgqaConfig(**SHAPE, top_k=3), RoutingMemory()
    memory.begin()
    layer(config)(x, replace(context(config), memory=memory))
    (choice,) = memory.choices
    assert choice.shape == (3, 11, 2, 3) and choice.nbytes == 3 * 11 * 2 * 3


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [(2, torch.uint8), (256, torch.uint8), (257, torch.int16), (32_768, torch.int16), (32_769, torch.int32)],
)
def test_selections_are_replayed_in_order_from_the_smallest_integer_dtype(experts, dtype):
    memory = RoutingMemory()
    first, second = torch.tensor([[[[0, experts - 1]]]]), torch.tensor([[[[experts - 1, 1]]]])
    memory.begin()
    assert memory.choice(lambda: first, experts) is first and memory.choice(lambda: second, experts) is second
    assert {choice.dtype for choice in memory.choices} == {dtype}
    for _ in range(2):
        memory.begin()
        again = [memory.choice(lambda: torch.zeros(0), experts) for _ in range(2)]
        assert torch.equal(again[0], first) and torch.equal(again[1], second)
