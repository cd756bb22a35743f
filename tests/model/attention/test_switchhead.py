"""SwitchHead: special cases that equal MHA, routers, gates."""

import pytest
import torch
from pydantic import ValidationError

from headway.kernels.documents import Documents
from headway.model.attention.gqa import MhaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.balance import BalanceConfig
from headway.model.base import Context
from headway.model.router import LinearRouterConfig


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 2), (3, 3)])
def test_chosen_experts_equal_masked_dense_experts(layer, context, x, experts, top_k):
    config = SwitchHeadConfig(kv_heads=3, head_dim=6, experts=experts, top_k=top_k, qk_norm=True, rope_fraction=1 / 3)
    module = layer(config)
    x.requires_grad_()
    documents = Documents.of(torch.tensor([0] * 4 + [1] * 7).expand(3, 11))
    for table in (context(config), context(config, documents=documents)):
        packed, dense = module(x, table).y, module.forward_reference(x, table).y
        torch.testing.assert_close(packed, dense, rtol=0, atol=1e-12)
        upstream = torch.randn_like(packed)
        wanted = [x, *module.parameters()]
        for a, b in zip(
            torch.autograd.grad(packed, wanted, upstream), torch.autograd.grad(dense, wanted, upstream), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_equals_the_equations_written_out(layer, context, x):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=2, rope_fraction=0.0)
    module = layer(config)
    q, k = ((x @ w.T).unflatten(-1, (2, 6)) for w in (module.w_q, module.w_k))
    w_v, w_o = module.w_v.unflatten(0, (2, 3, 6)), module.w_o.unflatten(1, (2, 3, 6))
    source, destination = ((x @ w.T).unflatten(-1, (2, 3)).sigmoid() for w in (module.source.w, module.destination.w))
    causal = torch.ones(11, 11).tril().bool()
    expected = torch.zeros_like(x)
    for h in range(2):
        v = torch.zeros(3, 11, 6, dtype=x.dtype)
        for e in range(3):
            in_top = source[:, :, h, e] >= source[:, :, h].topk(2).values[..., -1]
            v = v + (in_top * source[:, :, h, e])[..., None] * (x @ w_v[h, e].T)
        scores = torch.einsum("bsd,btd->bst", q[:, :, h], k[:, :, h]) / 6**0.5
        o = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v
        for e in range(3):
            in_top = destination[:, :, h, e] >= destination[:, :, h].topk(2).values[..., -1]
            expected = expected + (in_top * destination[:, :, h, e])[..., None] * (o @ w_o[:, h, e].T)
    torch.testing.assert_close(module(x, context(config)).y, expected, rtol=0, atol=1e-12)


def test_one_expert_is_mha_with_a_sigmoid_gate_per_head(layer, context, x):
    config = SwitchHeadConfig(kv_heads=3, head_dim=6, experts=1, top_k=1)
    module, mha = layer(config), layer(MhaConfig(heads=3, head_dim=6))
    assert set(module.routers) == {"destination"}
    assert sum(p.numel() for p in module.parameters()) == config.num_params(width=20) == 4 * 20 * 18 + 20 * 3
    gate = (x @ module.destination.w.T).sigmoid()  # [B, S, n]
    outputs = []
    for h in range(3):
        whole = mha.w_o.detach().clone()
        with torch.no_grad():
            mha.w_o.unflatten(1, (3, 6))[:, [i for i in range(3) if i != h]] = 0
            outputs.append(gate[..., h : h + 1] * mha(x, context(config)).y)
            mha.w_o.copy_(whole)
    torch.testing.assert_close(module(x, context(config)).y, sum(outputs), rtol=0, atol=1e-12)


def forced(routing, **changes):
    return lambda *_: tuple(None if r is None else r._replace(**changes) for r in routing)


def test_all_experts_with_unit_gates_are_mha_with_summed_experts(layer, context, x, monkeypatch):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=3)
    module, mha, table = layer(config), layer(MhaConfig(heads=2, head_dim=6)), context(config)
    routing = module.route(x, table)
    monkeypatch.setattr(module, "route", forced(routing, gate=torch.ones_like(routing[0].gate)))
    with torch.no_grad():
        mha.w_v.copy_(module.w_v.unflatten(0, (2, 3, 6)).sum(1).flatten(0, 1))
        mha.w_o.copy_(module.w_o.unflatten(1, (2, 3, 6)).sum(2).flatten(1))
    torch.testing.assert_close(module(x, table).y, mha(x, table).y, rtol=0, atol=1e-12)


def test_gradient_of_an_output_gate_is_the_output_gradient_along_its_expert(layer, context, x, monkeypatch):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=2)
    module, table = layer(config), context(config)
    source, destination = module.route(x, table)
    idx, leaf = destination.idx, destination.gate.detach().requires_grad_()
    monkeypatch.setattr(module, "route", lambda *_: (source, destination._replace(gate=leaf)))
    y = module(x, table).y
    upstream = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, leaf, upstream)
    experts = torch.empty(3, 11, 2, 3, dtype=x.dtype)  # <dy, W_O[h, e] o_h>: y is linear in the gates
    with torch.no_grad():
        for h in range(2):
            for e in range(3):
                chosen, factor = torch.full_like(idx, e), torch.zeros_like(leaf)
                chosen[..., 1] = (e + 1) % 3
                factor[:, :, h, 0] = 1
                one = destination._replace(idx=chosen, gate=factor)
                monkeypatch.setattr(module, "route", lambda *_, one=one: (source, one))
                experts[:, :, h, e] = (upstream * module(x, table).y).sum(-1)
    torch.testing.assert_close(got, experts.gather(-1, idx), rtol=0, atol=1e-10)


def test_one_router_serves_both_sides_where_selection_is_shared(layer, context, x):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=2, shared_selection=True)
    module, table = layer(config), context(config)
    apart = layer(config.model_copy(update={"shared_selection": False}))
    assert set(module.routers) == {"destination"}
    assert config.num_params(width=20) == sum(p.numel() for p in module.parameters())
    with torch.no_grad():
        apart.source.w.copy_(apart.destination.w)
    torch.testing.assert_close(module(x, table).y, apart(x, table).y, rtol=0, atol=1e-12)


def test_expert_dropout_changes_the_choice_in_training_and_never_the_gate(layer, context, x):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=2, router=LinearRouterConfig(dropout=0.5))
    module, table = layer(config), context(config)
    logits = (x @ module.destination.w.T).unflatten(-1, (2, 3))
    _, dropped = module.route(x, table)
    assert (dropped.idx != logits.topk(2).indices).any()
    torch.testing.assert_close(dropped.gate, logits.gather(-1, dropped.idx).sigmoid(), rtol=0, atol=1e-14)
    module.eval()
    assert torch.equal(module.route(x, table)[1].idx, logits.topk(2).indices)


def test_the_entropy_regulariser_sums_over_both_routers(layer, context, x):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=2, balance=BalanceConfig(entropy=0.5))
    module = layer(config)
    expected = 0.0
    for router in (module.source, module.destination):
        p = (x @ router.w.T).unflatten(-1, (2, 3)).softmax(-1).mean(1)
        expected += 0.5 * (p * p.log()).sum(-1).mean().item()
    assert module(x, context(config)).aux_loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": 5}, ["top_k: ", "5 experts selected of 3", "top_k 1 to 3", "experts 5"]),
        ({"top_k": 1, "gate": "renorm"}, ["gate: ", "no gradient", "gate sigmoid", "top_k 2"]),
        ({"top_k": 1, "experts": 1, "shared_selection": True}, ["shared_selection: ", "false", "experts 2"]),
        ({"router": {"type": "query_norm"}}, ["router: ", "query heads", "linear", "two_layer"]),
    ],
)
def test_impossible_combinations_say_what_is_possible(fields, words):
    with pytest.raises(ValidationError) as refusal:
        SwitchHeadConfig.model_validate({"kv_heads": 2, "head_dim": 6, "experts": 3, "top_k": 2, **fields})
    message = refusal.value.errors()[0]["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0]) and all(word in message for word in words)


def test_both_routers_learn_from_the_task_at_one_expert_per_token(layer, context, x):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=4, top_k=1)
    module = layer(config)
    out = module(x, context(config))
    assert out.aux_loss is None
    (out.y**2).sum().backward()
    for router in (module.source.w, module.destination.w):
        assert router.grad.abs().max() > 1e-3


def test_routers_are_fp32_in_a_bf16_model(layer, x):
    module = layer(SwitchHeadConfig(kv_heads=2, head_dim=6, experts=4, top_k=1)).bfloat16()
    x = x.bfloat16()
    idx, gate, _ = module.source(x, Context(rope=(x, x)), k=1)
    exact = (x.double() @ module.source.w.double().T).unflatten(-1, (2, 4))
    assert gate.dtype == torch.float32
    assert torch.equal(idx[..., 0], exact.argmax(-1))


def test_stats_of_both_routers(layer, context, x):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=4, top_k=2)
    module = layer(config)
    module(x, context(config))
    stats = module.router_stats()
    assert set(stats) == {"source", "destination"}
    for router, weight in (("source", module.source.w), ("destination", module.destination.w)):
        picks = (x @ weight.T).unflatten(-1, (2, 4)).topk(2).indices
        load = torch.stack([torch.bincount(picks[:, :, h].flatten(), minlength=4) for h in range(2)])
        assert torch.equal(stats[router].load, load.float())
    module.reset_router_stats()
    assert module.router_stats() == {}


@pytest.mark.parametrize("top_k", [1, 2])
def test_is_the_dual_of_routed_gqa(top_k):
    """n = G, E = M: equal projections, caches and FLOPs, but for a second router and the gating products."""
    d, g, m, head_dim = 96, 3, 4, 16
    switchhead = SwitchHeadConfig(kv_heads=g, experts=m, head_dim=head_dim, top_k=top_k)
    rgqa = RgqaConfig(heads=g * m, kv_heads=g, head_dim=head_dim, top_k=top_k)
    assert switchhead.num_params(width=d) - rgqa.num_params(width=d) == d * g * m
    assert switchhead.kv_bytes_per_token(seq_len=64, bytes_per_element=2) == rgqa.kv_bytes_per_token(
        seq_len=64, bytes_per_element=2
    )
    flops = [
        c.flops_per_token(width=d, seq_len=64).useful - c.core_flops_per_token(seq_len=64) for c in (switchhead, rgqa)
    ]
    assert flops[0] - flops[1] == 2 * d * g * m + 4 * top_k * g * head_dim
    assert rgqa.score_maps == top_k * switchhead.score_maps
