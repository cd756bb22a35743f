"""Routed GQA: its identities, its gates and router, its two ways to keep heads in use."""

from typing import Any

import pytest
import torch

from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.attention.rgqa import RgqaConfig, Routing
from headway.model.decoder import document_mask
from headway.model.router import balance_loss

GATES = ["sigmoid2", "softmax", "detached_renorm", "renorm", "hard"]
SHAPE: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 6}


def unchecked(**fields):
    """A config that the checks refuse, to show why they do."""
    legal = RgqaConfig(**{**SHAPE, "top_k": 1})
    return legal.model_copy(update=fields)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_all_heads_with_hard_gates_are_gqa(decoder, tokens, qk_norm):
    routed = RgqaConfig(**SHAPE, qk_norm=qk_norm, top_k=4, gate="hard", balance="none")
    gqa = GqaConfig(**SHAPE, qk_norm=qk_norm)
    torch.testing.assert_close(decoder(routed).logits(tokens), decoder(gqa).logits(tokens), rtol=0, atol=1e-12)
    fewer = routed.model_copy(update={"top_k": 3})
    assert (decoder(fewer).logits(tokens) - decoder(gqa).logits(tokens)).abs().max() > 1e-3


def test_always_on_heads_alone_with_a_silent_router_are_gqa_of_those_heads(layer, rope, x):
    config = RgqaConfig(**SHAPE, always_on=3, top_k=1)
    module, gqa = layer(config), layer(GqaConfig(**SHAPE))
    with torch.no_grad():  # the routed heads of both groups say nothing
        for w_o in (module.w_o, gqa.w_o):
            w_o.unflatten(1, (2, 4, 6))[:, :, 3].zero_()
    table = rope(config, 11)
    torch.testing.assert_close(module(x, table, None).y, gqa(x, table, None).y, rtol=0, atol=1e-12)


def test_one_head_per_group_with_hard_gates_is_mha(decoder, tokens):
    routed = RgqaConfig(heads=4, kv_heads=4, head_dim=6, top_k=1, gate="hard", balance="none")
    mha = MhaConfig(heads=4, head_dim=6)
    torch.testing.assert_close(decoder(routed).logits(tokens), decoder(mha).logits(tokens), rtol=0, atol=1e-12)


SLOTS = [(1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (2, 2)]
LEGAL = [(gate, *slots) for gate in GATES for slots in SLOTS if (gate, slots[0]) != ("renorm", 1)]


@pytest.mark.parametrize(("gate", "top_k", "always_on"), LEGAL)
def test_packed_slots_equal_masked_dense_heads(layer, rope, x, gate, top_k, always_on):
    config = RgqaConfig(**SHAPE, top_k=top_k, always_on=always_on, gate=gate, qk_norm=True, rope_fraction=2 / 3)
    module, table = layer(config), rope(config, 11)
    x.requires_grad_()
    mask = document_mask(torch.tensor([0] * 4 + [1] * 7).expand(3, 11), x.dtype)
    for used in (None, mask):
        packed, dense = module(x, table, used), module.forward_reference(x, table, used)
        torch.testing.assert_close(packed.y, dense.y, rtol=0, atol=1e-12)
        upstream = torch.randn_like(packed.y)
        wanted = [x, *module.parameters()]
        got, want = (
            torch.autograd.grad((out.y * upstream).sum() + out.aux_loss, wanted, allow_unused=True)
            for out in (packed, dense)
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_token_uses_exactly_its_heads(layer, rope, x):
    """Removing the output slices of every head that a token did not choose leaves its output as it was."""
    config = RgqaConfig(**SHAPE, top_k=1)
    module, table = layer(config), rope(config, 11)
    y, idx = module(x, table, None).y, module.route(x).idx
    for b, t in ((0, 3), (2, 10)):
        kept = torch.zeros(2, 4, 1, dtype=x.dtype).scatter(1, idx[b, t].unsqueeze(-1), 1.0)
        with torch.no_grad():
            whole = module.w_o.clone()
            module.w_o.mul_(kept.expand(2, 4, 6).reshape(-1))
            torch.testing.assert_close(module(x, table, None).y[b, t], y[b, t], rtol=0, atol=1e-13)
            module.w_o.copy_(whole)


def test_the_order_of_the_slots_is_irrelevant(layer, rope, x, monkeypatch):
    config = RgqaConfig(**SHAPE, top_k=3)
    module, table = layer(config), rope(config, 11)
    y = module(x, table, None).y
    idx, gate, aux_loss = module.route(x)
    monkeypatch.setattr(module, "route", lambda _: Routing(idx.flip(-1), gate.flip(-1), aux_loss))
    torch.testing.assert_close(module(x, table, None).y, y, rtol=0, atol=1e-13)


# ---------------------------------------------------------------- the router's gradient


@pytest.mark.parametrize(
    ("gate", "top_k", "moves"),
    [("renorm", 1, False), ("renorm", 2, True), ("hard", 1, False), ("hard", 2, False), ("sigmoid2", 1, True),
     ("softmax", 1, True), ("detached_renorm", 1, True)],
)  # fmt: skip
def test_which_gates_teach_the_router(layer, rope, x, gate, top_k, moves):
    config = unchecked(top_k=top_k, gate=gate, balance="none")
    module = layer(config)
    (module(x, rope(config, 11), None).y ** 2).sum().backward()
    gradient = module.w_r.grad
    largest = 0.0 if gradient is None else gradient.abs().max().item()
    assert (largest > 1e-3) if moves else (largest == 0.0)


def test_gradient_of_a_gate_is_the_output_gradient_along_its_head(layer, rope, x, monkeypatch):
    config = RgqaConfig(**SHAPE, top_k=2)
    module, table = layer(config), rope(config, 11)
    idx, gate, _ = module.route(x)
    leaf = gate.detach().requires_grad_()
    monkeypatch.setattr(module, "route", lambda _: Routing(idx, leaf, None))
    y = module(x, table, None).y
    upstream = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, leaf, upstream)

    heads = layer(GqaConfig(**SHAPE))  # equal weights by name; its heads' outputs before W_O
    outputs = []
    for h in range(8):
        only = torch.zeros(48, dtype=x.dtype)
        only[h * 6 : (h + 1) * 6] = 1
        with torch.no_grad():
            w_o = heads.w_o.clone()
            heads.w_o.mul_(only)
            outputs.append(heads(x, table, None).y)
            heads.w_o.copy_(w_o)
    per_head = torch.stack([(upstream * out).sum(-1) for out in outputs], -1)  # <dy, W_O[h] o_h>, [B, S, H]
    torch.testing.assert_close(got, per_head.unflatten(-1, (2, 4)).gather(-1, idx), rtol=0, atol=1e-10)


def test_bf16_weights_still_route_in_fp32(layer, x):
    module = layer(RgqaConfig(**SHAPE, top_k=1)).bfloat16()
    x = x.bfloat16()
    exact = (x.double() @ module.w_r.double().T).unflatten(-1, (2, 4))
    routing = module.route(x)
    assert routing.gate.dtype == torch.float32
    assert torch.equal(routing.idx[..., 0], exact.argmax(-1))
    torch.testing.assert_close(routing.gate[..., 0].double(), 2 * exact.amax(-1).sigmoid(), rtol=1e-6, atol=0)


def test_equal_logits_choose_the_first_head(layer, x):
    module = layer(RgqaConfig(**SHAPE, top_k=2))
    with torch.no_grad():
        module.w_r.zero_()
    assert torch.equal(module.route(x).idx, torch.tensor([0, 1]).expand(3, 11, 2, 2))


# ---------------------------------------------------------------- balancing


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_f_p_is_one_at_uniform_use_and_n_at_collapse(scope):
    experts = 4
    uniform = torch.full((2, 8, 3, experts), 1 / experts, dtype=torch.float64)
    turns = torch.eye(experts, dtype=torch.float64)[torch.arange(8) % experts][None, :, None].expand(2, 8, 3, experts)
    assert balance_loss(uniform, turns, slots=1, scope=scope).item() == 1.0
    first = torch.eye(experts, dtype=torch.float64)[0].expand(2, 8, 3, experts)
    assert balance_loss(first, first, slots=1, scope=scope).item() == experts
    pair = turns + turns.roll(1, -1)
    assert balance_loss(uniform, pair, slots=2, scope=scope).item() == 1.0


def test_the_scopes_differ_where_sequences_use_different_heads():
    """Two sequences, each with a head of its own: collapsed one by one, half used together."""
    chosen = torch.eye(2, dtype=torch.float64)[:, None, None].expand(2, 5, 1, 2)
    assert balance_loss(chosen, chosen, slots=1, scope="sequence").item() == 2.0
    assert balance_loss(chosen, chosen, slots=1, scope="micro_batch").item() == 1.0


def test_aux_loss_follows_the_formula_and_its_coefficient(layer, rope, x):
    config = RgqaConfig(**SHAPE, top_k=2, balance_coef=0.5)
    module = layer(config)
    logits = (x @ module.w_r.T).unflatten(-1, (2, 4))
    p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    expected = 0.0
    for sequence in range(3):
        for group in range(2):
            picks = logits[sequence, :, group].topk(2).indices.flatten()
            f = torch.bincount(picks, minlength=4).double() / (2 * 11)
            expected += (4 * (f * p[sequence, :, group].mean(0)).sum() / 6).item()
    assert module(x, rope(config, 11), None).aux_loss.item() == pytest.approx(0.5 * expected, rel=1e-12)


def test_descending_the_aux_loss_evens_out_the_load(layer, rope):
    config = RgqaConfig(**SHAPE, top_k=1, balance_coef=1.0)
    module = layer(config)
    x = torch.randn(4, 64, 20, dtype=torch.float64) + 1.5  # a common part that favours some heads

    def largest_share():
        idx = module.route(x).idx
        return max(torch.bincount(idx[:, :, g].flatten(), minlength=4).max().item() / 256 for g in range(2))

    start = largest_share()
    optimizer = torch.optim.SGD([module.w_r], lr=2.0)
    for _ in range(60):
        optimizer.zero_grad()
        module.route(x).aux_loss.backward()
        optimizer.step()
    assert start > 0.5
    assert largest_share() < 0.35


def test_loss_free_bias_evens_out_the_load_and_leaves_the_gates(layer):
    config = RgqaConfig(**SHAPE, top_k=1, balance="loss_free", bias_rate=0.02)
    module = layer(config)
    x = torch.randn(4, 64, 20, dtype=torch.float64) + 1.5

    def load():
        module.reset_router_stats()
        routing = module.route(x)
        assert routing.aux_loss is None
        return routing, {name: stats.load for name, stats in module.router_stats().items()}

    _, first = load()
    start = first["query"].max().item()
    for _ in range(80):
        module.after_step(load()[1])
    routing, last = load()
    assert start > 0.5 * 256
    assert last["query"].max().item() < 0.35 * 256
    logits = (x @ module.w_r.T).unflatten(-1, (2, 4))
    torch.testing.assert_close(routing.gate, 2 * logits.gather(-1, routing.idx).sigmoid(), rtol=0, atol=1e-14)
    assert (routing.idx[..., 0] != logits.argmax(-1)).any()


def test_loss_free_step_is_the_sign_of_the_missing_load(layer):
    module = layer(RgqaConfig(**SHAPE, top_k=1, balance="loss_free", bias_rate=0.5))
    module.after_step({"query": torch.tensor([[4.0, 0.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]])})
    assert torch.equal(module.router_bias, torch.tensor([[-0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_the_bias_stays_fp32_in_a_bf16_model_and_is_saved(decoder):
    model = decoder(RgqaConfig(**SHAPE, top_k=1, balance="loss_free"))
    layer = model.attention_layers()[1]
    layer.router_bias.fill_(0.123456789)
    exact = layer.router_bias.clone()
    model.bfloat16()
    assert layer.w_r.dtype == torch.bfloat16
    assert layer.router_bias.dtype == torch.float32 and torch.equal(layer.router_bias, exact)
    assert model.double().attention_layers()[1].router_bias.dtype == torch.float32
    assert torch.equal(model.state_dict()["blocks.1.attn.router_bias"], exact)


# ---------------------------------------------------------------- statistics


def test_router_stats_are_sums_over_training_tokens(layer, x):
    config = RgqaConfig(**SHAPE, top_k=2)
    module = layer(config)
    assert module.router_stats() == {}
    for _ in range(2):
        module.route(x)
    module.eval()
    module.route(x)
    stats = module.router_stats()["query"]
    logits = (x @ module.w_r.T).unflatten(-1, (2, 4))
    ordered = logits.sort(-1, descending=True).values
    p = logits.softmax(-1)
    picks = logits.topk(2).indices
    load = torch.stack([torch.bincount(picks[:, :, g].flatten(), minlength=4) for g in range(2)])
    assert torch.equal(stats.load, 2.0 * load)
    assert stats.tokens.item() == 2 * 33 and stats.slots == 2
    assert stats.entropy.item() == pytest.approx(-2 * (p * p.log()).sum().item(), rel=1e-5)  # sums are fp32
    assert stats.margin.item() == pytest.approx(2 * (ordered[..., 1] - ordered[..., 2]).sum().item(), rel=1e-5)
    module.reset_router_stats()
    assert module.router_stats() == {}
