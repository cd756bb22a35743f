"""Hybrid-QVO: special cases that equal other mechanisms, routers, cost, and refused configs."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from headway.kernels.documents import Documents
from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.registry import AnyMechanism
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.balance import BalanceConfig

SHAPE: dict[str, Any] = {"heads": 6, "kv_heads": 2, "head_dim": 6}
VALUES: dict[str, Any] = {"value_experts": 3, "value_top_k": 2}
OUTPUTS: dict[str, Any] = {"output_experts": 4, "output_top_k": 2}
SILENT: dict[str, Any] = {name: BalanceConfig() for name in ("balance", "value_balance")}
ALL_SILENT: dict[str, Any] = {**SILENT, "output_balance": BalanceConfig()}


def output_and_gradients(module, x, context, upstream):
    """y, and the gradients of x and of the parameters by name; of what takes no part, zeros."""
    x = x.detach().requires_grad_()
    out = module(x, context)
    names, wanted = zip(*module.named_parameters(), strict=True)
    loss = (out.y * upstream).sum() + (0 if out.aux_loss is None else out.aux_loss)
    gradients = torch.autograd.grad(loss, [x, *wanted], materialize_grads=True)
    return out.y, dict(zip(("x", *names), gradients, strict=True))


def assert_same(hybrid, other, renamed, x, context):
    """Both layers give the same output and gradients; `renamed`: the other layer's parameter -> this one's name."""
    upstream = torch.randn_like(x)
    y, mine = output_and_gradients(hybrid, x, context, upstream)
    expected, theirs = output_and_gradients(other, x, context, upstream)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert expected.abs().max() > 1e-2
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(mine[renamed.get(name, name)], gradient, rtol=0, atol=1e-11)


def with_unit_value_gates(module):
    """Make all value gates 1 for every token, since 2 sigmoid(0) = 1."""
    with torch.no_grad():
        module.value_router.w.zero_()
    return module


# ---------------------------------------------------------------- special cases


@pytest.mark.parametrize(
    "fields", [{"top_k": 1, "orthogonality": 0.1}, {"top_k": 2, "always_on": 1}, {"top_k": 2, "output": "slot"}]
)
def test_one_value_expert_with_unit_gates_is_routed_gqa(layer, context, x, fields):
    config = HybridConfig(**SHAPE, **fields, value_experts=1, value_top_k=1, value_balance=BalanceConfig())
    rgqa = RgqaConfig(**SHAPE, **fields)
    assert_same(with_unit_value_gates(layer(config)), layer(rgqa), {}, x, context(config))


def test_one_query_head_with_output_experts_is_switchhead(layer, context, x):
    config = HybridConfig(
        heads=3, kv_heads=3, head_dim=6, top_k=1, gate="hard", **VALUES, output_experts=3, output_top_k=2,
        value_gate="sigmoid", output_gate="sigmoid", qk_norm=True, **ALL_SILENT,
    )  # fmt: skip
    module = layer(config)
    switchhead = layer(SwitchHeadConfig(kv_heads=3, head_dim=6, experts=3, top_k=2, qk_norm=True))
    renamed = {"source.w": "value_router.w", "destination.w": "output_router.w"}
    with torch.no_grad():
        for theirs, mine in renamed.items():
            switchhead.get_parameter(theirs).copy_(module.get_parameter(mine))
    assert_same(module, switchhead, renamed, x, context(config))


def test_all_query_heads_and_one_value_expert_with_unit_gates_are_gqa(layer, context, x):
    config = HybridConfig(**SHAPE, top_k=3, gate="hard", value_experts=1, value_top_k=1, **SILENT)
    assert_same(with_unit_value_gates(layer(config)), layer(GqaConfig(**SHAPE)), {}, x, context(config))


def test_one_query_head_and_one_value_expert_with_unit_gates_are_mha(layer, context, x):
    config = HybridConfig(
        heads=3, kv_heads=3, head_dim=6, top_k=1, gate="hard", value_experts=1, value_top_k=1, **SILENT
    )
    mha = layer(MhaConfig(heads=3, head_dim=6))
    assert_same(with_unit_value_gates(layer(config)), mha, {}, x, context(config))


def test_all_value_experts_with_unit_gates_are_routed_gqa_with_their_sum(layer, context, x):
    config = HybridConfig(**SHAPE, top_k=2, value_experts=3, value_top_k=3)
    module, rgqa = with_unit_value_gates(layer(config)), layer(RgqaConfig(**SHAPE, top_k=2))
    with torch.no_grad():
        rgqa.w_v.copy_(module.w_v.unflatten(0, (2, 3, 6)).sum(1).flatten(0, 1))
    table = context(config)
    torch.testing.assert_close(module(x, table).y, rgqa(x, table).y, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the equations


FORMS: list[dict[str, Any]] = [
    {"top_k": 1, **VALUES},
    {"top_k": 3, "value_experts": 2, "value_top_k": 1, "gate": "detached_renorm"},
    {"top_k": 1, "always_on": 1, "always_on_gate": "sigmoid2", **VALUES, "value_gate": "sigmoid"},
    {"top_k": 2, "output": "slot", **VALUES},
    {"top_k": 1, **VALUES, **OUTPUTS},
    {"top_k": 1, "always_on": 2, **VALUES, **OUTPUTS, "output_gate": "sigmoid", "orthogonality": 0.1},
]


@pytest.mark.parametrize("fields", FORMS)
def test_packed_slots_equal_masked_dense_heads_and_experts(layer, context, x, fields, monkeypatch):
    config = HybridConfig(**SHAPE, **fields, qk_norm=True, rope_fraction=2 / 3)
    module = layer(config)
    upstream = torch.randn_like(x)
    documents = Documents.of(torch.tensor([0] * 4 + [1] * 7).expand(3, 11))
    for table in (context(config), context(config, documents=documents)):
        packed = output_and_gradients(module, x, table, upstream)
        with monkeypatch.context() as patch:
            patch.setattr(module, "forward", module.forward_reference)
            dense = output_and_gradients(module, x, table, upstream)
        torch.testing.assert_close(packed[0], dense[0], rtol=0, atol=1e-12)
        for name, gradient in packed[1].items():
            torch.testing.assert_close(gradient, dense[1][name], rtol=0, atol=1e-11)


def picked(logits, k, gate):
    """logits [B, S, N] -> gates of the k largest, 0 for the others."""
    keep = logits >= logits.topk(k).values[..., -1:]
    return keep * {"sigmoid": 1, "sigmoid2": 2}[gate] * logits.sigmoid()


def written_out(module, config, x):
    """The equations, one group, head and expert at a time; no RoPE."""
    m, e_v, e_o = 3, config.value_experts, config.output_experts
    w_q, w_k = module.w_q.unflatten(0, (2, m, 6)), module.w_k.unflatten(0, (2, 6))
    w_v, w_o = module.w_v.unflatten(0, (2, e_v, 6)), module.w_o.unflatten(1, (2, e_o or m, 6))
    causal = torch.ones(11, 11).tril().bool()
    y = torch.zeros_like(x)
    for g in range(2):
        heads = picked(x @ module.router.w.unflatten(0, (2, m))[g].T, config.k, config.gate)
        sources = picked(x @ module.value_router.w.unflatten(0, (2, e_v))[g].T, config.value_top_k, config.value_gate)
        v = sum(sources[..., e, None] * (x @ w_v[g, e].T) for e in range(e_v))
        per_head = []
        for h in range(m):
            scores = (x @ w_q[g, h].T) @ (x @ w_k[g].T).transpose(1, 2) / 6**0.5
            o = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v
            per_head.append(heads[..., h, None] * o)
        if e_o:
            outputs = picked(
                x @ module.output_router.w.unflatten(0, (2, e_o))[g].T, config.output_top_k, config.output_gate
            )
            y = y + sum(outputs[..., e, None] * (sum(per_head) @ w_o[:, g, e].T) for e in range(e_o))
        else:
            y = y + sum(o @ w_o[:, g, h].T for h, o in enumerate(per_head))
    return y


@pytest.mark.parametrize("fields", [{**VALUES, **SILENT}, {**VALUES, **OUTPUTS, **ALL_SILENT, "value_gate": "sigmoid"}])
def test_equals_the_equations_written_out(layer, context, x, fields):
    config = HybridConfig(**SHAPE, top_k=2, **fields, rope_fraction=0.0)
    module = layer(config)
    upstream = torch.randn_like(x)
    y, gradients = output_and_gradients(module, x, context(config), upstream)
    x = x.detach().requires_grad_()
    expected = written_out(module, config, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    names, wanted = zip(*module.named_parameters(), strict=True)
    for name, gradient in zip(
        ("x", *names), torch.autograd.grad((expected * upstream).sum(), [x, *wanted]), strict=True
    ):
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-11)


# ---------------------------------------------------------------- routers


def test_every_router_learns_from_the_task_at_one_expert_per_token(layer, context, x):
    config = HybridConfig(
        **SHAPE, top_k=1, value_experts=3, value_top_k=1, output_experts=3, output_top_k=1, **ALL_SILENT
    )
    module = layer(config)
    out = module(x, context(config))
    assert out.aux_loss is None
    (out.y**2).sum().backward()
    for router in (module.router, module.value_router, module.output_router):
        assert router.w.grad.abs().max() > 1e-3


def test_each_router_is_balanced_by_its_own_coefficient(layer, context, x):
    def loss(**balance):
        config = HybridConfig(**SHAPE, top_k=1, **VALUES, **OUTPUTS, **{**ALL_SILENT, **balance})
        return layer(config)(x, context(config)).aux_loss

    on = {name: BalanceConfig(f_p=weight) for name, weight in zip(ALL_SILENT, (0.1, 0.2, 0.4), strict=True)}
    alone = [loss(**{name: balance}) for name, balance in on.items()]
    assert len({round(part.item(), 6) for part in alone}) == 3
    torch.testing.assert_close(loss(**on), sum(alone), rtol=1e-12, atol=0)


def test_balance_is_on_for_heads_and_values_unless_turned_off():
    config = HybridConfig(**SHAPE, top_k=1, **VALUES)
    assert config.balance == config.value_balance == BalanceConfig(f_p=0.01)


def test_stats_name_each_router(layer, context, x):
    config = HybridConfig(**SHAPE, top_k=1, **VALUES, **OUTPUTS)
    module = layer(config)
    module(x, context(config))
    stats = module.router_stats()
    for name, experts, k in (("router", 3, 1), ("value_router", 3, 2), ("output_router", 4, 2)):
        picks = (x @ module.get_parameter(f"{name}.w").T).unflatten(-1, (2, experts)).topk(k).indices
        load = torch.stack([torch.bincount(picks[:, :, g].flatten(), minlength=experts) for g in range(2)])
        assert torch.equal(stats.pop(name).load, load.float())
    assert not stats


def test_loss_free_balancing_of_values_moves_the_bias_of_values_alone(layer):
    free = BalanceConfig(loss_free_rate=0.5)
    module = layer(HybridConfig(**SHAPE, top_k=1, value_experts=2, value_top_k=1, balance=free, value_balance=free))
    module.after_step({"value_router": torch.tensor([[4.0, 0.0], [1.0, 1.0]])})
    assert torch.equal(module.value_router.bias, torch.tensor([[-0.5, 0.5], [0.0, 0.0]]))
    assert not module.router.bias.any()


def test_a_bf16_layer_routes_in_fp32_and_stays_bf16(layer, context, x):
    config = HybridConfig(**SHAPE, top_k=1, **VALUES, **OUTPUTS)
    module, x = layer(config).bfloat16(), x.bfloat16()
    table = context(config)
    values, outputs = module.route_experts(x, table)
    assert values.gate.dtype == outputs.gate.dtype == torch.float32
    exact = (x.double() @ module.value_router.w.double().T).unflatten(-1, (2, 3))
    assert torch.equal(values.idx, exact.topk(2).indices)
    assert module(x, table).y.dtype == module.forward_reference(x, table).y.dtype == torch.bfloat16


# ---------------------------------------------------------------- start, k, diversity


def test_initial_parameters_equal_those_of_routed_gqa_except_for_values(layer):
    module, rgqa = layer(HybridConfig(**SHAPE, top_k=1, **VALUES)), layer(RgqaConfig(**SHAPE, top_k=1))
    for name, value in rgqa.named_parameters():
        assert name == "w_v" or torch.equal(module.get_parameter(name), value)
    scaled = layer(HybridConfig(**SHAPE, top_k=1, **VALUES, value_gate="sigmoid", value_init_scale=0.5))
    torch.testing.assert_close(scaled.w_v, 0.5 * module.w_v, rtol=1e-6, atol=0)  # drawn in fp32


def test_k_may_differ_by_layer():
    config = HybridConfig(**SHAPE, top_k=[1, 3], **VALUES)
    assert [config.layer(i, 2).k for i in range(2)] == [1, 3]


def test_diversity_is_that_of_the_query_heads_over_mixed_values(layer, context, x):
    config = HybridConfig(**SHAPE, top_k=3, gate="hard", **VALUES)
    module, table = layer(config).eval(), context(config)
    pool = module.pool(x, table)
    assert pool.member == "query head"
    assert pool.weights.shape == (2, 3, 20 * 6)
    y = pool.outputs.flatten(2) @ module.w_o.T  # all heads with gates of 1
    torch.testing.assert_close(module(x, table).y, y, rtol=0, atol=1e-12)


def test_diversity_is_that_of_the_value_experts_where_a_group_has_one_query_head(layer, context, x):
    config = HybridConfig(heads=3, kv_heads=3, head_dim=6, top_k=1, **VALUES)
    module, table = layer(config).eval(), context(config)
    pool = module.pool(x, table)
    assert pool.member == "value expert"
    mha = layer(MhaConfig(heads=3, head_dim=6))
    for e in range(3):
        rows = module.w_v.unflatten(0, (3, 3, 6))[:, e]
        torch.testing.assert_close(pool.weights[:, e], rows.flatten(1), rtol=0, atol=0)
        torch.testing.assert_close(
            pool.projections[:, :, :, e].flatten(2), x @ rows.flatten(0, 1).T, rtol=0, atol=1e-12
        )
        with torch.no_grad():
            mha.w_v.copy_(rows.flatten(0, 1))
        torch.testing.assert_close(pool.outputs[:, :, :, e].flatten(2) @ mha.w_o.T, mha(x, table).y, rtol=0, atol=1e-12)
    assert (
        layer(HybridConfig(heads=3, kv_heads=3, head_dim=6, top_k=1, value_experts=1, value_top_k=1)).pool(x, table)
        is None
    )


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize(("k", "k_v", "e_v"), [(1, 2, 4), (2, 2, 4), (3, 1, 6)])
def test_cost_follows_the_formulas(k, k_v, e_v):
    d, h, g, head_dim, seq_len = 1024, 16, 4, 64, 2048
    config = HybridConfig(heads=h, kv_heads=g, head_dim=head_dim, top_k=k, value_experts=e_v, value_top_k=k_v)
    params = 2 * d * h * head_dim + d * g * head_dim + g * e_v * d * head_dim + d * h + d * g * e_v
    assert config.num_params(width=d) == params
    if e_v == 4:
        assert params == 3_440_640
    projections = 4 * d * k * g * head_dim + 2 * d * g * head_dim + 2 * k_v * g * head_dim * (d + 1)
    routers = 2 * d * h + 2 * d * g * e_v
    core = 4 * head_dim * k * g * (seq_len + 1) / 2
    flops = config.flops_per_token(width=d, seq_len=seq_len)
    assert flops.useful == projections + routers + core
    assert flops.executed - flops.useful == 4 * d * (h - k * g) * head_dim + 2 * d * g * (e_v - k_v) * head_dim
    gqa = GqaConfig(heads=h, kv_heads=g, head_dim=head_dim)
    kv_bytes = {c.kv_bytes_per_token(seq_len=seq_len, bytes_per_element=2) for c in (config, gqa)}
    assert kv_bytes == {2 * g * head_dim * 2}


def test_with_output_experts_it_costs_what_switchhead_costs_and_a_router_of_heads():
    d, g = 96, 3
    shape: dict[str, Any] = {"kv_heads": g, "head_dim": 16}
    config = HybridConfig(**shape, heads=g, top_k=1, value_experts=4, value_top_k=2, output_experts=4, output_top_k=2)
    switchhead = SwitchHeadConfig(**shape, experts=4, top_k=2)
    assert config.num_params(width=d) - switchhead.num_params(width=d) == d * g
    mine, theirs = (c.flops_per_token(width=d, seq_len=64) for c in (config, switchhead))
    assert mine.useful - theirs.useful == mine.executed - theirs.executed == 2 * d * g


# ---------------------------------------------------------------- bad input


HYBRID: dict[str, Any] = {"type": "hybrid", "heads": 8, "kv_heads": 2, "head_dim": 16, "top_k": 1, **VALUES}
QUERY_NORM = {"type": "query_norm"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"value_top_k": 4}, ["value_top_k: ", "4 experts selected of 3", "value_top_k 1 to 3", "value_experts 4"]),
        ({"value_router": QUERY_NORM}, ["value_router: ", "no queries", "linear", "token_hash"]),
        ({**OUTPUTS, "output_top_k": 5}, ["output_top_k: ", "5 experts selected of 4", "1 to 4", "output_experts 5"]),
        ({**OUTPUTS, "output_router": QUERY_NORM}, ["output_router: ", "no queries", "linear", "token_hash"]),
        ({**OUTPUTS, "output": "slot"}, ["output: ", "replaces", "output head", "output_experts 0"]),
        ({"output_top_k": 3}, ["output_top_k: ", "output_experts is 0", "output_experts 3", "leave output_top_k out"]),
        ({"output_gate": "sigmoid"}, ["output_gate: ", "output_experts is 0", "output_experts 2", "leave output_gate"]),
        ({"output_balance": {"f_p": 0.1}}, ["output_balance: ", "output_experts is 0", "output_experts 2", "leave"]),
        ({"top_k": 5}, ["top_k: ", "5 heads selected of 4", "top_k 1 to 4", "heads 10"]),
        ({"gate": "renorm"}, ["gate: ", "no gradient", "sigmoid2", "top_k 2"]),
        ({"key_experts": 4}, ["key_experts: ", "cannot be routed", "route values", "kv_heads"]),
        ({"route_keys": True}, ["route_keys: ", "cannot be routed", "route values", "kv_heads"]),
    ],
)
def test_impossible_configs_are_refused_with_the_field_the_reason_and_two_ways_out(fields, words):
    with pytest.raises(ValidationError) as refusal:
        TypeAdapter(AnyMechanism).validate_python({**HYBRID, **fields})
    (error,) = refusal.value.errors()
    message = error["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0])
    for word in words[1:]:
        assert word in message


def test_a_spec_of_defaults_written_out_is_legal_again():
    config = HybridConfig.model_validate(HYBRID)
    assert HybridConfig.model_validate(config.model_dump()) == config
