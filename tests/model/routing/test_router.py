"""Router types: their logits, and the effect of noise and dropout."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from headway.kernels.rope import rope_tables
from headway.model.attention.rgqa import RgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.base import Context, Ranks
from headway.model.router import (
    LinearRouterConfig,
    QueryNormRouterConfig,
    RandomRouterConfig,
    RoutingConfig,
    TokenHashRouterConfig,
    TwoLayerRouterConfig,
)

SHAPE: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 6}
ROUTERS: dict[str, Any] = {
    "linear": LinearRouterConfig(),
    "two_layer": TwoLayerRouterConfig(hidden=5, init_std=0.3),
    "query_norm": QueryNormRouterConfig(),
    "random": RandomRouterConfig(init_std=0.3),
    "token_hash": TokenHashRouterConfig(),
}


def decide(module, x, tokens):
    """The router's decision alone."""
    queries = module.heads_of(x, module.w_q).unflatten(2, (-1, module.members))
    rope = rope_tables(x.shape[1], 6, 10_000.0, x.device)
    return module.route(x, Context(rope=rope, tokens=tokens), queries)


@pytest.mark.parametrize("name", ROUTERS)
def test_each_router_routes_tokens_differently_and_reports_its_cost(layer, x, tokens, name):
    config = RgqaConfig(**SHAPE, top_k=1, gate="detached_renorm", router=ROUTERS[name])
    module = layer(config)
    idx = decide(module, x, tokens).idx
    assert len(idx.unique()) > 1
    trained = sum(p.numel() for p in module.router.parameters())
    assert trained == ROUTERS[name].num_params(width=20, groups=2, experts=4)
    assert set(ROUTERS[name].shards()) == {n for n, _ in module.router.named_parameters()}


def test_two_layers_are_the_formula_written_out(layer, x, tokens):
    module = layer(RgqaConfig(**SHAPE, top_k=2, router=ROUTERS["two_layer"]))
    logits = module.router.logits(x, Context(rope=(x, x)), None)
    for g in range(2):
        hidden = torch.nn.functional.silu(x @ module.router.w_in[g * 5 : (g + 1) * 5].T)
        torch.testing.assert_close(logits[:, :, g], hidden @ module.router.w_out[g].T, rtol=0, atol=1e-13)


def test_query_norm_ranks_heads_by_the_length_of_their_queries(layer, x, tokens):
    module = layer(RgqaConfig(**SHAPE, top_k=1, gate="straight_through", router=ROUTERS["query_norm"]))
    norms = (x @ module.w_q.T).unflatten(-1, (2, 4, 6)).norm(dim=-1)
    assert torch.equal(decide(module, x, tokens).idx[..., 0], norms.argmax(-1))
    assert list(module.router.parameters()) == []


@pytest.mark.parametrize("name", ["random", "token_hash"])
def test_fixed_routers_are_saved_and_never_trained(decoder, tokens, name):
    model = decoder(RgqaConfig(**SHAPE, top_k=1, router=ROUTERS[name]))
    trained = {n for n, _ in model.named_parameters()}
    buffer = {"random": "w", "token_hash": "table"}[name]
    for layer in range(2):
        assert f"blocks.{layer}.attn.router.{buffer}" in set(model.state_dict()) - trained
    first, second = (block.attn.router.get_buffer(buffer) for block in model.blocks)
    assert not torch.equal(first, second)  # each layer has a router of its own
    again = decoder(RgqaConfig(**SHAPE, top_k=1, router=ROUTERS[name]))
    assert torch.equal(again.blocks[0].attn.router.get_buffer(buffer), first)  # a function of the seed
    other = decoder(RgqaConfig(**SHAPE, top_k=1, router=ROUTERS[name]), seed=2)
    assert not torch.equal(other.blocks[0].attn.router.get_buffer(buffer), first)


def test_a_token_hash_depends_on_the_id_alone(layer, x, tokens):
    module = layer(RgqaConfig(**SHAPE, top_k=2, router=ROUTERS["token_hash"]))
    assert torch.equal(decide(module, x, tokens).idx, decide(module, torch.randn_like(x), tokens).idx)
    other = tokens.clone()
    other[0, 3] += 1
    changed = decide(module, x, tokens).idx != decide(module, x, other).idx
    assert changed[0, 3].any() and changed.sum() == changed[0, 3].sum()


@pytest.mark.parametrize("noise", ["normal", "gumbel"])
def test_noise_changes_choices_in_training_and_nothing_else(layer, x, tokens, noise):
    plain = layer(RgqaConfig(**SHAPE, top_k=1)).eval()
    noisy = layer(RgqaConfig(**SHAPE, top_k=1, router=LinearRouterConfig(noise=noise, noise_scale=3.0)))
    drawn = [decide(noisy, x, tokens) for _ in range(2)]
    assert not torch.equal(drawn[0].idx, drawn[1].idx)
    logits = (x @ noisy.router.w.T).unflatten(-1, (2, 4))
    torch.testing.assert_close(drawn[0].gate, 2 * logits.gather(-1, drawn[0].idx).sigmoid(), rtol=0, atol=1e-14)
    assert torch.equal(decide(noisy.eval(), x, tokens).idx, decide(plain, x, tokens).idx)


def test_gumbel_noise_samples_heads_with_the_softmax_probabilities(layer):
    module = layer(RgqaConfig(heads=4, kv_heads=1, head_dim=6, top_k=1, router=LinearRouterConfig(noise="gumbel")))
    x = torch.randn(1, 1, 20, dtype=torch.float64).expand(1, 40_000, 20)
    idx = module.router(x, Context(rope=(x, x)), k=1).idx.flatten()
    p = (x[0, 0] @ module.router.w.T).softmax(-1)
    share = torch.bincount(idx, minlength=4) / 40_000
    assert (share - p).abs().max() < 4 * (0.25 / 40_000) ** 0.5  # four standard errors at most


def test_dropout_still_picks_k_different_heads_when_it_passes_over_nearly_all(layer, x, tokens):
    config = RgqaConfig(**SHAPE, top_k=3, router=LinearRouterConfig(dropout=0.95))
    idx = decide(layer(config), x, tokens).idx
    assert all(len(set(row)) == 3 for row in idx.flatten(0, 2).tolist())


def test_dropout_passes_over_a_head_with_the_stated_probability(layer):
    config = RgqaConfig(heads=4, kv_heads=1, head_dim=6, top_k=1, router=LinearRouterConfig(dropout=0.3))
    x = torch.randn(1, 1, 20, dtype=torch.float64).expand(1, 20_000, 20)
    module = layer(config)
    best = (x[0, 0] @ module.router.w.T).argmax()
    kept = (module.router(x, Context(rope=(x, x)), k=1).idx == best).double().mean().item()
    assert kept == pytest.approx(0.7 + 0.3**4, abs=4 * (0.21 / 20_000) ** 0.5)  # all dropped: the best


def test_equal_rows_leave_no_head_favoured_at_the_start(layer):
    """One norm for all rows: the root mean square of those that were drawn."""
    drawn = layer(RgqaConfig(**SHAPE, top_k=1)).router.w
    equal = layer(RgqaConfig(**SHAPE, top_k=1, router=LinearRouterConfig(init="equal_rows"))).router.w
    norms = equal.norm(dim=1)
    torch.testing.assert_close(norms, drawn.norm(dim=1).square().mean().sqrt().expand(8), rtol=1e-6, atol=0)
    torch.testing.assert_close(equal / norms[:, None], drawn / drawn.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss_free_rate", [0.0, 0.01])
def test_gumbel_noise_is_in_units_of_the_logits_with_a_bias_too(layer, loss_free_rate):
    """At bias 0 the sigmoid keeps the order, so heads are still sampled with the softmax probabilities."""
    balance = BalanceConfig(loss_free_rate=loss_free_rate)
    router = LinearRouterConfig(noise="gumbel")
    module = layer(RgqaConfig(heads=4, kv_heads=1, head_dim=6, top_k=1, router=router, balance=balance))
    x = torch.randn(1, 1, 20, dtype=torch.float64).expand(1, 40_000, 20)
    share = torch.bincount(module.router(x, Context(rope=(x, x)), k=1).idx.flatten(), minlength=4) / 40_000
    p = (x[0, 0] @ module.router.w.T).softmax(-1)
    assert (share - p).abs().max() < 4 * (0.25 / 40_000) ** 0.5  # four standard errors at most


def test_nothing_is_added_to_the_loss_in_evaluation(layer, x, tokens):
    module = layer(RgqaConfig(**SHAPE, top_k=1, orthogonality=1.0)).eval()
    assert decide(module, x, tokens).aux_loss is None and module.diversity_loss() is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"router": {"type": "query_norm"}}, ["gate: ", "sigmoid saturates", "straight_through", "router.type linear"]),
        (
            {"router": {"type": "query_norm"}, "gate": "softmax", "balance": {"loss_free_rate": 1e-3}},
            ["balance: ", "only the bias would decide", "balance.f_p", "router.type linear"],
        ),
        (
            {"gate": "hard", "balance": {}},
            ["gate: ", "gives the router no gradient", "balance.f_p 0.01", "router.type random"],
        ),
        ({"heads": 2, "gate": "softmax"}, ["gate: ", "single routed head", "sigmoid2", "heads 4"]),
        ({"key_experts": 2}, ["key_experts: ", "cannot be routed", "hybrid", "kv_heads"]),
    ],
)
def test_routers_that_could_not_learn_are_refused(fields, words):
    with pytest.raises(ValidationError) as refusal:
        RgqaConfig.model_validate({**SHAPE, "top_k": 1, **fields})
    message = refusal.value.errors()[0]["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0]) and all(word in message for word in words)


def test_a_hard_gate_without_a_loss_is_legal_where_there_is_nothing_to_learn():
    RgqaConfig.model_validate({**SHAPE, "top_k": 4, "gate": "hard", "balance": {}})
    RgqaConfig.model_validate({**SHAPE, "top_k": 1, "gate": "hard", "balance": {}, "router": {"type": "random"}})


@pytest.mark.parametrize(
    "fields", [{"noise": "normal"}, {"noise": "gumbel"}, {"dropout": 0.4}, {"noise": "normal", "dropout": 0.4}]
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_groups_get_the_noise_of_a_single_device_on_any_tensor_parallel_rank(x, tokens, fields, ranks):
    config, routing = LinearRouterConfig(**fields), RoutingConfig("sigmoid2", BalanceConfig(), LinearRouterConfig())

    def choices(weight, own):
        router = config.build(routing, width=20, groups=4 // own.count, experts=5).double()
        router.w, router.ranks = torch.nn.Parameter(weight), own
        torch.manual_seed(3)
        idx = router(x, Context(rope=(x, x), tokens=tokens), k=2).idx
        return idx, torch.get_rng_state()

    weight = torch.randn(20, 20, dtype=torch.float64) * 0.1
    whole, state = choices(weight, Ranks())
    parts = [choices(part, Ranks(index=i, count=ranks)) for i, part in enumerate(weight.chunk(ranks))]
    assert torch.equal(torch.cat([idx for idx, _ in parts], 2), whole)
    assert all(torch.equal(own_state, state) for _, own_state in parts)
