"""Load-balancing losses at uniform load, at collapse, and with different splits of a batch."""

import math

import pytest
import torch

from headway.kernels import routing
from headway.model import router
from headway.model.attention.rgqa import RgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.recompute import recomputed

N = 4


def uniform():
    """(logits, p, chosen): equal logits, experts take turns."""
    logits = torch.zeros(2, 8, 3, N, dtype=torch.float64)
    turns = torch.eye(N, dtype=torch.float64)[torch.arange(8) % N][None, :, None].expand(2, 8, 3, N)
    return logits, logits.softmax(-1), turns


def collapse():
    """One expert takes all, and the router is certain of it."""
    first = torch.eye(N, dtype=torch.float64)[0].expand(2, 8, 3, N)
    return 200.0 * first, first, first


VALUES = [  # at uniform use, at collapse
    ("f_p", 1.0, N),
    ("cv2", 0.0, N - 1.0),
    ("entropy", -math.log(N), 0.0),
    ("z", math.log(N) ** 2, 200.0**2),
]


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
@pytest.mark.parametrize(("name", "at_uniform", "at_collapse"), VALUES)
def test_value_at_uniform_use_and_at_collapse(name, at_uniform, at_collapse, scope):
    balance = BalanceConfig.model_validate({name: 0.5, "scope": scope})
    assert balance.loss(*uniform(), slots=1).item() == pytest.approx(0.5 * at_uniform, abs=1e-15)
    assert balance.loss(*collapse(), slots=1).item() == pytest.approx(0.5 * at_collapse, rel=1e-15)


def test_the_two_conventions_of_f_p_differ_by_the_number_of_slots():
    logits, p, turns = uniform()
    pair = turns + turns.roll(1, -1)
    share, count = (BalanceConfig(f_p=1.0, f_p_convention=c).loss(logits, p, pair, slots=2) for c in ("share", "count"))
    assert (share.item(), count.item()) == (1.0, 2.0)


def test_the_scopes_differ_where_sequences_use_different_experts():
    """Two sequences, each with an expert of its own: collapsed one by one, half used together."""
    chosen = torch.eye(2, dtype=torch.float64)[:, None, None].expand(2, 5, 1, 2)
    for name, apart, together in (("f_p", 2.0, 1.0), ("cv2", 1.0, 0.0)):
        for scope, expected in (("sequence", apart), ("micro_batch", together)):
            assert (
                BalanceConfig.model_validate({name: 1.0, "scope": scope}).loss(chosen, chosen, chosen, slots=1).item()
                == expected
            )


def test_losses_add_up_with_their_coefficients():
    logits = torch.randn(2, 8, 3, N, dtype=torch.float64)
    p, chosen = logits.softmax(-1), torch.nn.functional.one_hot(logits.argmax(-1), N).double()
    parts = {"f_p": 0.3, "cv2": 0.7, "z": 0.01, "entropy": 0.2}
    alone = sum(BalanceConfig.model_validate({k: v}).loss(logits, p, chosen, slots=1) for k, v in parts.items())
    torch.testing.assert_close(
        BalanceConfig.model_validate(parts).loss(logits, p, chosen, slots=1), alone, rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("name", ["f_p", "cv2", "z", "entropy"])
def test_descending_a_loss_from_collapse_spreads_the_probabilities(name):
    """From a router that favours one expert; the z-loss shrinks logits instead, which spreads them too."""
    logits = torch.zeros(1, 16, 1, N, dtype=torch.float64)
    logits[..., 0] = 3.0
    logits.requires_grad_()
    start = logits.softmax(-1)[..., 0].mean().item()
    for _ in range(50):
        chosen = torch.nn.functional.one_hot(logits.argmax(-1), N).double()
        loss = BalanceConfig.model_validate({name: 1.0}).loss(logits, logits.softmax(-1), chosen, slots=1)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 2.0 * gradient).detach().requires_grad_()
    assert logits.softmax(-1)[..., 0].mean().item() < start - 0.1


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
@pytest.mark.parametrize("convention", ["share", "count"])
@pytest.mark.parametrize("gate", ["sigmoid2", "softmax"])
def test_sums_of_one_pass_give_the_loss_and_the_load_of_the_whole(
    layer, context, x, monkeypatch, gate, convention, scope
):
    balance = BalanceConfig(f_p=0.3, f_p_convention=convention, scope=scope)
    config = RgqaConfig(heads=8, kv_heads=2, head_dim=6, top_k=2, gate=gate, balance=balance)
    found = []
    for one_pass in (False, True):
        monkeypatch.setattr(router, "fused", lambda tensor, one_pass=one_pass: one_pass)
        module = layer(config).train()
        module.watch_routers(closely=False)
        out = module(x, context(config))
        gradient = torch.autograd.grad(out.aux_loss, module.router.w)[0]
        found.append((out.aux_loss, gradient, module.router_stats()["router"].load))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("closely", [True, False])
def test_a_recomputed_pass_uses_the_same_router_code_path(layer, context, x, monkeypatch, closely):
    """PyTorch refuses a repeated pass that keeps other tensors than the first."""
    for module in (router, routing):  # operations as on a GPU, with their twins
        monkeypatch.setattr(module, "fused", lambda tensor: True)
    config = RgqaConfig(heads=8, kv_heads=2, head_dim=6, top_k=2, balance=BalanceConfig(f_p=0.3))
    module = layer(config).train()
    module.watch_routers(closely=closely)
    x.requires_grad_()
    out = recomputed(module, x, context(config))
    assert out.aux_loss is not None
    (out.y.sum() + out.aux_loss).backward()
    assert x.grad is not None and module.router_stats()["router"].load.sum() == x.shape[0] * x.shape[1] * 2 * 2
