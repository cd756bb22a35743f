"""SwitchHead: its identities, its routers, its gates."""

import pytest
import torch

from headway.model.attention.gqa import MhaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.decoder import document_mask


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 2), (3, 3)])
def test_chosen_experts_equal_masked_dense_experts(layer, rope, x, experts, top_k):
    config = SwitchHeadConfig(kv_heads=3, head_dim=6, experts=experts, top_k=top_k, qk_norm=True, rope_fraction=1 / 3)
    module, table = layer(config), rope(config, 11)
    x.requires_grad_()
    mask = document_mask(torch.tensor([0] * 4 + [1] * 7).expand(3, 11), x.dtype)
    for used in (None, mask):
        packed, dense = module(x, table, used).y, module.forward_reference(x, table, used).y
        torch.testing.assert_close(packed, dense, rtol=0, atol=1e-12)
        upstream = torch.randn_like(packed)
        wanted = [x, *module.parameters()]
        for a, b in zip(
            torch.autograd.grad(packed, wanted, upstream), torch.autograd.grad(dense, wanted, upstream), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_equals_the_equations_written_out(layer, rope, x):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=2, rope_fraction=0.0)
    module = layer(config)
    q, k = ((x @ w.T).unflatten(-1, (2, 6)) for w in (module.w_q, module.w_k))
    w_v, w_o = module.w_v.unflatten(0, (2, 3, 6)), module.w_o.unflatten(1, (2, 3, 6))
    source, destination = ((x @ w.T).unflatten(-1, (2, 3)).sigmoid() for w in (module.w_sv, module.w_so))
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
    torch.testing.assert_close(module(x, rope(config, 11), None).y, expected, rtol=0, atol=1e-12)


def test_one_expert_is_mha_with_a_gate_per_head_on_values_and_outputs(layer, rope, x):
    config = SwitchHeadConfig(kv_heads=3, head_dim=6, experts=1, top_k=1)
    module, mha = layer(config), layer(MhaConfig(heads=3, head_dim=6))
    with torch.no_grad():
        for router in (module.w_sv, module.w_so):
            router.zero_()  # every gate is one half, on values and on outputs
    table = rope(config, 11)
    torch.testing.assert_close(module(x, table, None).y, mha(x, table, None).y / 4, rtol=0, atol=1e-12)


def test_all_experts_with_unit_gates_are_mha_with_summed_experts(layer, rope, x, monkeypatch):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=3)
    module, mha = layer(config), layer(MhaConfig(heads=2, head_dim=6))
    route = module._route
    monkeypatch.setattr(module, "_route", lambda *args: (route(*args)[0], torch.ones_like(route(*args)[1])))
    with torch.no_grad():
        mha.w_v.copy_(module.w_v.unflatten(0, (2, 3, 6)).sum(1).flatten(0, 1))
        mha.w_o.copy_(module.w_o.unflatten(1, (2, 3, 6)).sum(2).flatten(1))
    table = rope(config, 11)
    torch.testing.assert_close(module(x, table, None).y, mha(x, table, None).y, rtol=0, atol=1e-12)


def test_gradient_of_an_output_gate_is_the_output_gradient_along_its_expert(layer, rope, x, monkeypatch):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=3, top_k=2)
    module, table = layer(config), rope(config, 11)
    route = module._route
    idx, gate = route("destination", x, module.w_so)
    leaf = gate.detach().requires_grad_()
    monkeypatch.setattr(
        module, "_route", lambda name, *args: (idx, leaf) if name == "destination" else route(name, *args)
    )
    y = module(x, table, None).y
    upstream = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, leaf, upstream)
    experts = torch.empty(3, 11, 2, 3, dtype=x.dtype)  # <dy, W_O[h, e] o_h>: y is linear in the gates
    with torch.no_grad():
        for h in range(2):
            for e in range(3):
                forced = torch.full_like(idx, e), torch.zeros_like(gate)
                forced[0][..., 1] = (e + 1) % 3
                forced[1][:, :, h, 0] = 1
                monkeypatch.setattr(
                    module, "_route", lambda name, *a, f=forced: f if name == "destination" else route(name, *a)
                )
                experts[:, :, h, e] = (upstream * module(x, table, None).y).sum(-1)
    torch.testing.assert_close(got, experts.gather(-1, idx), rtol=0, atol=1e-10)


def test_both_routers_learn_from_the_task_at_one_expert_per_token(layer, rope, x):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=4, top_k=1)
    module = layer(config)
    out = module(x, rope(config, 11), None)
    assert out.aux_loss is None
    (out.y**2).sum().backward()
    for router in (module.w_sv, module.w_so):
        assert router.grad.abs().max() > 1e-3


def test_routers_are_fp32_in_a_bf16_model(layer, x):
    module = layer(SwitchHeadConfig(kv_heads=2, head_dim=6, experts=4, top_k=1)).bfloat16()
    x = x.bfloat16()
    idx, gate = module._route("source", x, module.w_sv)
    exact = (x.double() @ module.w_sv.double().T).unflatten(-1, (2, 4))
    assert gate.dtype == torch.float32
    assert torch.equal(idx[..., 0], exact.argmax(-1))


def test_stats_of_both_routers(layer, rope, x):
    config = SwitchHeadConfig(kv_heads=2, head_dim=6, experts=4, top_k=2)
    module = layer(config)
    module(x, rope(config, 11), None)
    stats = module.router_stats()
    assert set(stats) == {"source", "destination"}
    for router, weight in (("source", module.w_sv), ("destination", module.w_so)):
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
    assert switchhead.kv_bytes_per_token(bytes_per_element=2) == rgqa.kv_bytes_per_token(bytes_per_element=2)
    flops = [
        c.flops_per_token(width=d, seq_len=64).useful - c.core_flops_per_token(seq_len=64) for c in (switchhead, rgqa)
    ]
    assert flops[0] - flops[1] == 2 * d * g * m + 4 * top_k * g * head_dim
    assert rgqa.score_maps == top_k * switchhead.score_maps
