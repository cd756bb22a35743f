"""Selective recomputation does not change a training pass by a bit, and keeps less for the backward pass."""

import gc
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from headway.kernels.elementwise import silu_mul
from headway.kernels.rope import rope_tables
from headway.model.activations import saved_storages
from headway.model.attention.gqa import GqaConfig
from headway.model.base import Context
from headway.model.config import ModelConfig
from headway.model.decoder import Block, Decoder, Placement, make_block
from headway.model.selective import Recipe, SelectiveRecompute

MODEL = ModelConfig(width=20, layers=2, ffn_width=28, init_std=0.3)
GQA = GqaConfig(heads=4, kv_heads=2, head_dim=6)
VOCAB, B, S = 37, 2, 9


def gradients(mechanism: Any, recompute: Any) -> list[Tensor]:
    """Loss and gradients of a decoder in fp32."""
    placement = Placement(recompute=recompute)
    decoder = Decoder(MODEL, mechanism, vocab_size=VOCAB, seed=1, placement=placement).train()
    tokens = torch.randint(0, VOCAB, (B, S), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    output = decoder(tokens, tokens.roll(-1, 1), (torch.arange(S) >= 4).int().expand(B, S))
    loss = output.loss_sum + output.aux_loss
    return [loss, *torch.autograd.grad(loss, list(decoder.parameters()), allow_unused=True, materialize_grads=True)]


def test_loss_and_gradients_are_the_same_bit_by_bit(mechanism):
    plain, selective = (gradients(mechanism, recompute) for recompute in ("none", "selective"))
    assert all(torch.equal(a, b) for a, b in zip(plain, selective, strict=True))
    assert any(gradient.any() for gradient in plain[1:])


def block(recompute: Any) -> Block:
    return make_block(MODEL, GQA, 0, seed=1, placement=Placement(recompute=recompute))


def inputs() -> tuple[Tensor, Context]:
    x = torch.randn(B, S, MODEL.width, generator=torch.Generator().manual_seed(4), requires_grad=True)
    return x * 1, Context(rope=rope_tables(S, GQA.rotated, GQA.rope_base, x.device))


def kept_bytes(made: Block) -> int:
    x, context = inputs()
    with saved_storages(besides=[*made.parameters(), *context.rope], selective=made.selective) as saved:
        output = made(x, context)
    assert output.y.requires_grad
    return sum(saved.values())


def held_bytes(made: Block) -> int:
    """What a forward pass allocates and does not give back while its output is there."""
    x, context = inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = made(x, context)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None and output.y.requires_grad
    events: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(event.nbytes() for event in events)


def test_the_predicted_saving_is_the_saving_in_allocated_memory():
    plain, selective = block("none"), block("selective")
    said = kept_bytes(plain) - kept_bytes(selective)
    assert said >= 4 * B * S * (2 * MODEL.width + 2 * MODEL.ffn_width)
    # To 2 %: an allocation of a few bytes per row is rounded up.
    assert held_bytes(plain) - held_bytes(selective) == pytest.approx(said, rel=0.02)


def test_a_deep_copy_of_a_block_keeps_the_same_bytes():
    made = block("selective")
    copied = deepcopy(made)
    assert copied.selective is not made.selective and kept_bytes(copied) == kept_bytes(made)


def test_without_gradients_nothing_is_held():
    made = block("selective")
    with torch.no_grad():
        made(*inputs())
    assert made.selective is not None and not made.selective._results


def test_every_backward_pass_of_one_graph_is_the_first():
    made = block("selective")
    x, context = inputs()
    y = made(x, context).y.square().sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_result_is_recomputed_once_for_all_readers():
    calls = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append(1)
        return silu_mul(a, b)

    again = SelectiveRecompute()
    piece = again.piece(counted)
    a, b, w = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    with again:
        result = piece(a, b)
        loss = ((result @ w) + (result.t() @ w)).square().sum()
    del result
    assert len(calls) == 1
    plain = silu_mul(a, b)
    expected = torch.autograd.grad(((plain @ w) + (plain.t() @ w)).square().sum(), (a, b, w))
    for mine, theirs in zip(torch.autograd.grad(loss, (a, b, w)), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert len(calls) == 2


def recipes() -> list[Recipe]:
    return [each for each in gc.get_objects() if type(each) is Recipe]


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_outlives_the_graph(backward):
    made, before = block("selective"), len(recipes())
    x, context = inputs()
    loss = made(x, context).y.square().sum()
    assert len(recipes()) == before + 3  # two norms, SwiGLU's product
    if backward:
        loss.backward()
        assert len(recipes()) == before
    del loss, x
    assert len(recipes()) == before


def test_a_result_modified_in_place_is_kept():
    again = SelectiveRecompute()
    a, b, w = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    with again:
        result = again.piece(silu_mul)(a, b)
        result.mul_(2)
        out = result @ w
    (gradient,) = torch.autograd.grad(out.sum(), w)
    assert torch.equal(gradient, (2 * silu_mul(a, b)).t() @ torch.ones(4, 4))
