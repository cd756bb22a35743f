"""Grouped projections (one matmul per expert) equal dense ones in values and gradients, and cost fewer FLOPs."""

import pytest
import torch

from headway.kernels.documents import Documents
from headway.kernels.experts import combine, project, routed_choice
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.moa import MoaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig

POOL = {"heads": 8, "kv_heads": 2, "head_dim": 6}
MECHANISMS = {
    "rgqa-k1": RgqaConfig.model_validate({**POOL, "top_k": 1}),
    "rgqa-k3": RgqaConfig.model_validate({**POOL, "top_k": 3, "qk_norm": True, "gate": "softmax"}),
    "rgqa-always-on": RgqaConfig.model_validate({**POOL, "top_k": 2, "always_on": 1}),
    "rgqa-slot": RgqaConfig.model_validate({**POOL, "top_k": 2, "output": "slot"}),
    "rgqa-norm": RgqaConfig.model_validate(
        {**POOL, "top_k": 2, "gate": "straight_through", "router": {"type": "query_norm"}}
    ),
    "gqe": GqeConfig.model_validate({**POOL, "top_k": 2}),
    "moa": MoaConfig(heads=4, head_dim=6, top_k=2),
    "switchhead": SwitchHeadConfig(kv_heads=3, head_dim=6, experts=4, top_k=2),
    "switchhead-shared": SwitchHeadConfig(kv_heads=3, head_dim=6, experts=4, top_k=1, shared_selection=True),
    "switchhead-gate-only": SwitchHeadConfig(kv_heads=3, head_dim=6, experts=1, top_k=1),
    "hybrid": HybridConfig.model_validate({**POOL, "top_k": 1, "value_experts": 3, "value_top_k": 2}),
    "hybrid-outputs": HybridConfig.model_validate(
        {**POOL, "top_k": 2, "value_experts": 3, "value_top_k": 2, "output_experts": 4, "output_top_k": 2}
    ),
}


@pytest.mark.parametrize("form", ["grouped", "routed"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_a_layer_is_the_same_with_dense_and_with_other_projections(layer, context, x, name, form):
    config = MECHANISMS[name]
    dense, grouped = layer(config), layer(config.model_copy(update={"projections": form}))
    x.requires_grad_()
    documents = Documents.of(torch.tensor([0] * 4 + [1] * 7).expand(3, 11))
    for used in (None, documents):
        outs = [module(x, context(config, documents=used)) for module in (dense, grouped)]
        torch.testing.assert_close(outs[1].y, outs[0].y, rtol=0, atol=1e-12)
        upstream = torch.randn_like(outs[0].y)
        gradients = [
            torch.autograd.grad((out.y * upstream).sum(), [x, *module.parameters()], allow_unused=True)
            for out, module in zip(outs, (dense, grouped), strict=True)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MECHANISMS)
def test_auto_is_dense_on_a_cpu_bit_for_bit(layer, context, x, name):
    config = MECHANISMS[name]
    x.requires_grad_()
    found = []
    for module in (layer(config), layer(config.model_copy(update={"projections": "auto"}))):
        y = module(x, context(config)).y
        found.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()], allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert a is b is None or (a is not None and b is not None and torch.equal(a, b))


def test_auto_routes_where_the_model_of_costs_says_so(monkeypatch):
    from headway.kernels import experts
    from headway.kernels.routed import Forms

    x = torch.empty(16, 2048, 2048, device="meta", dtype=torch.bfloat16)
    shape = {"groups": 4, "experts": 4, "head_dim": 128}
    assert experts.routed_forms("auto", x, k=1, **shape) is None  # no kernel runs there
    monkeypatch.setattr(experts, "fused", lambda tensor: True)
    monkeypatch.setattr(experts, "architecture", lambda device: "sm_90")
    assert experts.routed_forms("auto", x, k=1, **shape) == Forms(gather=True, weight_grad=True)
    assert experts.routed_forms("auto", x, k=4, **shape) is None
    assert experts.routed_forms("auto", x[:1, :64], k=1, **shape) is None
    assert experts.routed_forms("auto", x, k=1, **(shape | {"head_dim": 256})) is None
    assert experts.routed_forms("auto", x.float(), k=1, **shape) is None
    assert experts.routed_forms("dense", x, k=1, **shape) is None


@pytest.mark.parametrize("name", [n for n in MECHANISMS if n not in ("rgqa-norm", "switchhead-gate-only")])
def test_grouped_projections_execute_what_is_useful_and_no_more(name):
    config = MECHANISMS[name]
    dense = config.flops_per_token(width=20, seq_len=16)
    grouped = config.model_copy(update={"projections": "grouped"}).flops_per_token(width=20, seq_len=16)
    assert grouped.useful == grouped.executed == dense.useful < dense.executed


@pytest.mark.parametrize("form", ["dense", "grouped", "routed"])
def test_an_unselected_expert_gets_a_zero_gradient(form):
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    w_in = torch.randn(3 * 2, 4, dtype=torch.float64, requires_grad=True)
    w_out = torch.randn(4, 3 * 2, dtype=torch.float64, requires_grad=True)
    idx = torch.tensor([0, 2, 2, 0, 2]).view(1, 5, 1, 1)
    routed = routed_choice(form, x, idx, 3, head_dim=2)
    slots = project(x, w_in, idx, 3, form, routed)
    y = combine(slots, w_out, idx, torch.ones(1, 5, 1, 1, dtype=torch.float64), 3, form, routed)
    y.square().sum().backward()
    assert w_in.grad is not None and w_out.grad is not None
    assert (w_in.grad[2:4] == 0).all() and (w_out.grad[:, 2:4] == 0).all()
    assert (w_in.grad[:2] != 0).any() and (w_out.grad[:, 4:] != 0).any()


def test_each_pair_is_multiplied_by_its_own_expert():
    """Two groups, slots in any order: written out pair by pair."""
    x, idx = torch.randn(2, 7, 5, dtype=torch.float64), torch.rand(2, 7, 2, 3).argsort(-1)[..., :2]
    weight = torch.randn(2 * 3 * 4, 5, dtype=torch.float64)
    made = project(x, weight, idx, 3, "grouped")
    matrices = weight.view(2, 3, 4, 5)
    for b in range(2):
        for s in range(7):
            for g in range(2):
                for j in range(2):
                    torch.testing.assert_close(made[b, s, g, j], matrices[g, idx[b, s, g, j]] @ x[b, s])
