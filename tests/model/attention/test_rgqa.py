"""Routed GQA: special cases that equal GQA and MHA, gates, router, balancing loss and loss-free bias."""

from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from headway.kernels.documents import Documents
from headway.kernels.rope import rope_tables
from headway.kernels.routing import GateName
from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.attention.grouped import orthogonality_loss
from headway.model.attention.rgqa import RgqaConfig, SizeRule
from headway.model.balance import BalanceConfig
from headway.model.base import Context
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.k_schedule import KStage
from headway.model.router import Routing

GATES = get_args(GateName)
SHAPE: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 6}


def route(module, x):
    """The decision alone."""
    rope = rope_tables(x.shape[1], 6, 10_000.0, x.device)
    queries = module.heads_of(x, module.w_q).unflatten(2, (-1, module.members))
    return module.route(x, Context(rope=rope), queries)


def unchecked(**fields):
    """A config that the checks refuse, to show why they do."""
    legal = RgqaConfig(**{**SHAPE, "top_k": 1})
    return legal.model_copy(update=fields)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_all_heads_with_hard_gates_are_gqa(decoder, tokens, qk_norm):
    routed = RgqaConfig(**SHAPE, qk_norm=qk_norm, top_k=4, gate="hard", balance=BalanceConfig())
    gqa = GqaConfig(**SHAPE, qk_norm=qk_norm)
    torch.testing.assert_close(decoder(routed).logits(tokens), decoder(gqa).logits(tokens), rtol=0, atol=1e-12)
    fewer = routed.model_copy(update={"top_k": 3})
    assert (decoder(fewer).logits(tokens) - decoder(gqa).logits(tokens)).abs().max() > 1e-3


def test_always_on_heads_alone_with_a_silent_router_are_gqa_of_those_heads(layer, context, x):
    config = RgqaConfig(**SHAPE, always_on=3, top_k=1)
    module, gqa = layer(config), layer(GqaConfig(**SHAPE))
    with torch.no_grad():  # the routed heads of both groups say nothing
        for w_o in (module.w_o, gqa.w_o):
            w_o.unflatten(1, (2, 4, 6))[:, :, 3].zero_()
    table = context(config)
    torch.testing.assert_close(module(x, table).y, gqa(x, table).y, rtol=0, atol=1e-12)


def test_one_head_per_group_with_hard_gates_is_mha(decoder, tokens):
    routed = RgqaConfig(heads=4, kv_heads=4, head_dim=6, top_k=1, gate="hard", balance=BalanceConfig())
    mha = MhaConfig(heads=4, head_dim=6)
    torch.testing.assert_close(decoder(routed).logits(tokens), decoder(mha).logits(tokens), rtol=0, atol=1e-12)


SLOTS = [(1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (2, 2)]
LEGAL = [(gate, *slots) for gate in GATES for slots in SLOTS if (gate, slots[0]) != ("renorm", 1)]


@pytest.mark.parametrize(("gate", "top_k", "always_on"), LEGAL)
def test_packed_slots_equal_masked_dense_heads(layer, context, x, gate, top_k, always_on):
    config = RgqaConfig(**SHAPE, top_k=top_k, always_on=always_on, gate=gate, qk_norm=True, rope_fraction=2 / 3)
    module = layer(config)
    x.requires_grad_()
    documents = Documents.of(torch.tensor([0] * 4 + [1] * 7).expand(3, 11))
    for table in (context(config), context(config, documents=documents)):
        packed, dense = module(x, table), module.forward_reference(x, table)
        torch.testing.assert_close(packed.y, dense.y, rtol=0, atol=1e-12)
        upstream = torch.randn_like(packed.y)
        wanted = [x, *module.parameters()]
        got, want = (
            torch.autograd.grad((out.y * upstream).sum() + out.aux_loss, wanted, allow_unused=True)
            for out in (packed, dense)
        )
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_token_uses_exactly_its_heads(layer, context, x):
    """Removing the output slices of every head that a token did not choose leaves its output as it was."""
    config = RgqaConfig(**SHAPE, top_k=1)
    module, table = layer(config), context(config)
    y, idx = module(x, table).y, route(module, x).idx
    for b, t in ((0, 3), (2, 10)):
        kept = torch.zeros(2, 4, 1, dtype=x.dtype).scatter(1, idx[b, t].unsqueeze(-1), 1.0)
        with torch.no_grad():
            whole = module.w_o.clone()
            module.w_o.mul_(kept.expand(2, 4, 6).reshape(-1))
            torch.testing.assert_close(module(x, table).y[b, t], y[b, t], rtol=0, atol=1e-13)
            module.w_o.copy_(whole)


def test_the_order_of_the_slots_is_irrelevant(layer, context, x, monkeypatch):
    config = RgqaConfig(**SHAPE, top_k=3)
    module, table = layer(config), context(config)
    y = module(x, table).y
    idx, gate, aux_loss = route(module, x)
    monkeypatch.setattr(module, "route", lambda *_: Routing(idx.flip(-1), gate.flip(-1), aux_loss))
    torch.testing.assert_close(module(x, table).y, y, rtol=0, atol=1e-13)


# ---------------------------------------------------------------- the router's gradient


@pytest.mark.parametrize(
    ("gate", "top_k", "moves"),
    [("renorm", 1, False), ("renorm", 2, True), ("hard", 1, False), ("hard", 2, False), ("sigmoid2", 1, True),
     ("softmax", 1, True), ("softmax_n", 1, True), ("detached_renorm", 1, True), ("straight_through", 1, True)],
)  # fmt: skip
def test_which_gates_teach_the_router(layer, context, x, gate, top_k, moves):
    config = unchecked(top_k=top_k, gate=gate, balance=BalanceConfig())
    module = layer(config)
    (module(x, context(config)).y ** 2).sum().backward()
    gradient = module.router.w.grad
    largest = 0.0 if gradient is None else gradient.abs().max().item()
    assert (largest > 1e-3) if moves else (largest == 0.0)


def test_gradient_of_a_gate_is_the_output_gradient_along_its_head(layer, context, x, monkeypatch):
    config = RgqaConfig(**SHAPE, top_k=2)
    module, table = layer(config), context(config)
    idx, gate, _ = route(module, x)
    leaf = gate.detach().requires_grad_()
    monkeypatch.setattr(module, "route", lambda *_: Routing(idx, leaf, None))
    y = module(x, table).y
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
            outputs.append(heads(x, table).y)
            heads.w_o.copy_(w_o)
    per_head = torch.stack([(upstream * out).sum(-1) for out in outputs], -1)  # <dy, W_O[h] o_h>, [B, S, H]
    torch.testing.assert_close(got, per_head.unflatten(-1, (2, 4)).gather(-1, idx), rtol=0, atol=1e-10)


def test_bf16_weights_still_route_in_fp32(layer, x):
    module = layer(RgqaConfig(**SHAPE, top_k=1)).bfloat16()
    x = x.bfloat16()
    exact = (x.double() @ module.router.w.double().T).unflatten(-1, (2, 4))
    routing = route(module, x)
    assert routing.gate.dtype == torch.float32
    assert torch.equal(routing.idx[..., 0], exact.argmax(-1))
    torch.testing.assert_close(routing.gate[..., 0].double(), 2 * exact.amax(-1).sigmoid(), rtol=1e-6, atol=0)


def test_equal_logits_choose_the_first_head(layer, x):
    module = layer(RgqaConfig(**SHAPE, top_k=2))
    with torch.no_grad():
        module.router.w.zero_()
    assert torch.equal(route(module, x).idx, torch.tensor([0, 1]).expand(3, 11, 2, 2))


# ---------------------------------------------------------------- balancing


def test_aux_loss_follows_the_formula_and_its_coefficient(layer, context, x):
    config = RgqaConfig(**SHAPE, top_k=2, balance=BalanceConfig(f_p=0.5))
    module = layer(config)
    logits = (x @ module.router.w.T).unflatten(-1, (2, 4))
    p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    expected = 0.0
    for sequence in range(3):
        for group in range(2):
            picks = logits[sequence, :, group].topk(2).indices.flatten()
            f = torch.bincount(picks, minlength=4).double() / (2 * 11)
            expected += (4 * (f * p[sequence, :, group].mean(0)).sum() / 6).item()
    assert module(x, context(config)).aux_loss.item() == pytest.approx(0.5 * expected, rel=1e-12)


def test_descending_the_aux_loss_evens_out_the_load(layer, context):
    config = RgqaConfig(**SHAPE, top_k=1, balance=BalanceConfig(f_p=1.0))
    module = layer(config)
    x = torch.randn(4, 64, 20, dtype=torch.float64) + 1.5  # a common part that favours some heads

    def largest_share():
        idx = route(module, x).idx
        return max(torch.bincount(idx[:, :, g].flatten(), minlength=4).max().item() / 256 for g in range(2))

    start = largest_share()
    optimizer = torch.optim.SGD([module.router.w], lr=2.0)
    for _ in range(60):
        optimizer.zero_grad()
        route(module, x).aux_loss.backward()
        optimizer.step()
    assert start > 0.5
    assert largest_share() < 0.35


def test_loss_free_bias_evens_out_the_load_and_leaves_the_gates(layer):
    config = RgqaConfig(**SHAPE, top_k=1, balance=BalanceConfig(loss_free_rate=0.02))
    module = layer(config)
    x = torch.randn(4, 64, 20, dtype=torch.float64) + 1.5

    def load():
        module.reset_router_stats()
        routing = route(module, x)
        assert routing.aux_loss is None
        return routing, {name: stats.load for name, stats in module.router_stats().items()}

    _, first = load()
    start = first["router"].max().item()
    for _ in range(80):
        module.after_step(load()[1])
    routing, last = load()
    assert start > 0.5 * 256
    assert last["router"].max().item() < 0.35 * 256
    logits = (x @ module.router.w.T).unflatten(-1, (2, 4))
    torch.testing.assert_close(routing.gate, 2 * logits.gather(-1, routing.idx).sigmoid(), rtol=0, atol=1e-14)
    assert (routing.idx[..., 0] != logits.argmax(-1)).any()


def test_loss_free_step_is_the_sign_of_the_missing_load(layer):
    module = layer(RgqaConfig(**SHAPE, top_k=1, balance=BalanceConfig(loss_free_rate=0.5)))
    module.after_step({"router": torch.tensor([[4.0, 0.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]])})
    assert torch.equal(module.router.bias, torch.tensor([[-0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))


def test_the_bias_stays_fp32_in_a_bf16_model_and_is_saved(decoder):
    model = decoder(RgqaConfig(**SHAPE, top_k=1, balance=BalanceConfig(loss_free_rate=1e-3)))
    layer = model.attention_layers()[1]
    layer.router.bias.fill_(0.123456789)
    exact = layer.router.bias.clone()
    model.bfloat16()
    assert layer.router.w.dtype == torch.bfloat16
    assert layer.router.bias.dtype == torch.float32 and torch.equal(layer.router.bias, exact)
    assert model.double().attention_layers()[1].router.bias.dtype == torch.float32
    assert torch.equal(model.state_dict()["blocks.1.attn.router.bias"], exact)


# ---------------------------------------------------------------- how many heads


def test_k_may_differ_by_layer(decoder, tokens):
    model = decoder(RgqaConfig(**SHAPE, top_k=[1, 3]))
    assert [layer.top_k for layer in model.attention_layers()] == [1, 3]
    costs = [
        account(ModelConfig(width=20, layers=2, ffn_width=28), RgqaConfig(**SHAPE, top_k=k), vocab_size=37, seq_len=8)
        for k in ([1, 3], 2)
    ]
    assert costs[0].flops_per_token == costs[1].flops_per_token
    with pytest.raises(ValueError, match=r"top_k: 3 numbers for 2 layers; give 2 numbers, or one integer"):
        decoder(RgqaConfig(**SHAPE, top_k=[1, 2, 3]))


def test_k_follows_its_schedule_and_ends_where_the_cost_is_stated(layer):
    stages = [KStage(until_tokens=100, top_k=4), KStage(until_tokens=300, top_k=2)]
    module = layer(RgqaConfig(**SHAPE, top_k=1, k_schedule=stages))
    seen = []
    for tokens in (0, 99, 100, 299, 300, 10**9):
        module.before_step(tokens)
        seen.append(module.top_k)
    assert seen == [4, 4, 2, 2, 1, 1]


def test_a_schedule_that_starts_with_all_heads_is_a_dense_warm_up(layer, context, x):
    scheduled = RgqaConfig(**SHAPE, top_k=1, gate="hard", k_schedule=[KStage(until_tokens=10, top_k=4)])
    module, gqa = layer(scheduled), layer(GqaConfig(**SHAPE))
    module.before_step(0)
    torch.testing.assert_close(module(x, context(scheduled)).y, gqa(x, context(scheduled)).y, rtol=0, atol=1e-12)
    module.before_step(10)
    assert (module(x, context(scheduled)).y - gqa(x, context(scheduled)).y).abs().max() > 1e-3


@pytest.mark.parametrize(("params", "k"), [(8.2e7, 1), (8.2e8, 2), (8.2e9, 3), (8.2e12, 4), (1e3, 1)])
def test_the_size_rule_uses_more_heads_in_larger_models(params, k):
    rule = SizeRule(ratio=0.25, slope=0.25, at_params=8.2e7)
    assert RgqaConfig(**SHAPE, top_k=rule).at_size(int(params)).top_k == k


def test_the_size_rule_sees_the_whole_model(decoder):
    small = RgqaConfig(**SHAPE, top_k=SizeRule(ratio=0.5, slope=0.5, at_params=9_320))
    params = sum(p.numel() for p in decoder(small).parameters())
    assert params == 9_320 and [layer.top_k for layer in decoder(small).attention_layers()] == [2, 2]
    above = RgqaConfig(**SHAPE, top_k=SizeRule(ratio=0.5, slope=0.5, at_params=9_000))
    assert [layer.top_k for layer in decoder(above).attention_layers()] == [3, 3]


def test_a_larger_pool_adds_parameters_and_no_flops_but_the_router():
    small, large = (RgqaConfig(heads=h, kv_heads=2, head_dim=6, top_k=2) for h in (8, 32))
    assert large.num_params(width=20) - small.num_params(width=20) == 2 * 20 * 24 * 6 + 20 * 24
    flops = [c.flops_per_token(width=20, seq_len=64).useful for c in (small, large)]
    assert flops[1] - flops[0] == 2 * 20 * 24


# ---------------------------------------------------------------- outputs


def test_slices_of_w_o_per_slot_depend_on_the_order_of_the_slots(layer, context, x, monkeypatch):
    config = RgqaConfig(**SHAPE, top_k=3, output="slot")
    module, table = layer(config), context(config)
    assert module.w_o.shape == (20, 2 * 3 * 6)
    assert sum(p.numel() for p in module.parameters()) == config.num_params(width=20)
    y = module(x, table).y
    torch.testing.assert_close(module.forward_reference(x, table).y, y, rtol=0, atol=1e-12)
    idx, gate, aux_loss = route(module, x)
    monkeypatch.setattr(module, "route", lambda *_: Routing(idx.flip(-1), gate.flip(-1), aux_loss))
    assert (module(x, table).y - y).abs().max() > 1e-3


def test_slots_that_are_all_always_on_are_gqa(layer, context, x):
    """Per slot and per head are the same where a slot holds one head always."""
    config = RgqaConfig(**SHAPE, top_k=1, always_on=3, gate="hard", output="slot")
    module, gqa = layer(config), layer(GqaConfig(**SHAPE))
    torch.testing.assert_close(module(x, context(config)).y, gqa(x, context(config)).y, rtol=0, atol=1e-12)


def test_always_on_heads_may_have_a_gate_of_their_own(layer, context, x):
    config = RgqaConfig(**SHAPE, top_k=1, always_on=2, always_on_gate="sigmoid2")
    module = layer(config)
    assert sum(p.numel() for p in module.parameters()) == config.num_params(width=20)
    idx, gate, _ = route(module, x)
    logits = (x @ module.w_always_on.T).unflatten(-1, (2, 2))
    torch.testing.assert_close(gate[..., :2], 2 * logits.sigmoid(), rtol=0, atol=1e-14)
    assert torch.equal(idx[..., :2], torch.tensor([0, 1]).expand(3, 11, 2, 2))
    torch.testing.assert_close(
        module(x, context(config)).y, module.forward_reference(x, context(config)).y, rtol=0, atol=1e-12
    )


# ---------------------------------------------------------------- diversity


def test_the_orthogonality_penalty_is_zero_for_orthogonal_and_one_for_equal_heads():
    eye = torch.eye(8, dtype=torch.float64)
    assert orthogonality_loss(eye, members=4, head_dim=2).item() == pytest.approx(0.0, abs=1e-15)
    assert orthogonality_loss(eye[:2].repeat(4, 1), members=4, head_dim=2).item() == pytest.approx(1.0, rel=1e-15)


@pytest.mark.parametrize("mechanism_type", ["gqa", "rgqa"])
def test_descending_the_penalty_drives_the_heads_of_a_group_apart(layer, context, x, mechanism_type):
    fields = {**SHAPE, "orthogonality": 2.0}
    silent = BalanceConfig()
    config = GqaConfig(**fields) if mechanism_type == "gqa" else RgqaConfig(**fields, top_k=1, balance=silent)
    module = layer(config)
    with torch.no_grad():
        module.w_q += 0.5  # a common part
    optimizer = torch.optim.SGD([module.w_q], lr=5.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = module(x, context(config)).aux_loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5 and losses[-1] < 0.02


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": [1, 5]}, ["top_k: ", "5 heads selected of 4", "top_k 1 to 4", "heads 10"]),
        ({"top_k": 0}, ["top_k: ", "0 heads", "top_k 1 to 4"]),
        ({"k_schedule": [{"until_tokens": 5, "top_k": 9}]}, ["top_k: ", "9 heads", "top_k 1 to 4", "heads 18"]),
        (
            {"k_schedule": [{"until_tokens": 9, "top_k": 2}, {"until_tokens": 5, "top_k": 3}]},
            ["k_schedule: ", "must increase", "sort", "one stage"],
        ),
        ({"output": "slot", "top_k": [1, 2]}, ["output: ", "per slot", "output head", "integer"]),
        (
            {"output": "slot", "k_schedule": [{"until_tokens": 5, "top_k": 2}]},
            ["output: ", "per slot", "output head", "without k_schedule"],
        ),
        ({"always_on_gate": "sigmoid2"}, ["always_on_gate: ", "always_on 1", "always_on_gate none"]),
        ({"gate": "renorm", "top_k": [2, 1]}, ["gate: ", "no gradient", "sigmoid2", "top_k 2"]),
    ],
)
def test_impossible_combinations_say_what_is_possible(fields, words):
    with pytest.raises(ValidationError) as refusal:
        RgqaConfig.model_validate({**SHAPE, "top_k": 1, **fields})
    message = refusal.value.errors()[0]["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0]) and all(word in message for word in words)


def test_a_schedule_that_leaves_no_step_for_the_final_k_is_refused():
    config = RgqaConfig(**SHAPE, top_k=1, k_schedule=[KStage(until_tokens=1000, top_k=4)])
    config.check_run(seq_len=8, tokens=1008, tokens_per_step=8)
    with pytest.raises(
        ValueError, match=r"k_schedule: .* last step begins at 992, .* until_tokens 500, or train.tokens 2"
    ):
        config.check_run(seq_len=8, tokens=1000, tokens_per_step=8)
