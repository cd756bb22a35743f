"""MoH: shared and routed heads, the published forms of their factors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from headway.model.attention.gqa import GqaConfig
from headway.model.attention.moh import MohConfig
from headway.model.attention.registry import AnyMechanism
from headway.model.balance import BalanceConfig
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.router import QueryNormRouterConfig, RandomRouterConfig, TokenHashRouterConfig

SHAPE: dict[str, Any] = {"heads": 6, "kv_heads": 6, "head_dim": 6}
FORMS = ["paper", "code", "straight_through"]


@pytest.fixture
def strong(layer) -> Callable[..., Any]:
    """A layer whose shared and stage weights differ as clearly as its routed ones."""

    def make(config: MohConfig):
        module = layer(config)
        with torch.no_grad():
            for name in ("w_shared", "w_stage"):
                if hasattr(module, name):
                    module.get_parameter(name).mul_(20)
        return module

    return make


def factors_of_one_token(module, config, x):
    """x [d] -> [H], from the equations."""
    shared, k = config.shared_heads, config.top_k
    r = module.router.w @ x
    picked = r.sort(descending=True).indices[:k]
    out = torch.zeros(config.heads, dtype=x.dtype)
    if config.form == "straight_through":
        out[:shared] = 1
        out[shared + picked] = 1
        return out
    alpha = (module.w_stage @ x).softmax(-1) if shared else torch.ones(2, dtype=x.dtype)
    first = (module.w_shared @ x).softmax(-1) if shared > 1 else torch.ones(shared, dtype=x.dtype)
    p = r.softmax(-1)
    if config.form == "paper":
        out[:shared] = alpha[0] * first
        out[shared + picked] = alpha[1] * p[picked]
        return out
    alpha = 2 * alpha if shared else alpha
    out[:shared] = alpha[0] * shared * first
    out[shared + picked] = alpha[1] * k * p[picked] / p[picked].sum()
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shared_heads", "top_k"), [(0, 2), (1, 3), (2, 2), (3, 3)])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_output_is_the_sum_of_heads_times_their_factors(strong, layer, context, x, form, shared_heads, top_k, kv_heads):
    fields = {**SHAPE, "kv_heads": kv_heads, "qk_norm": True}
    config = MohConfig(**fields, shared_heads=shared_heads, top_k=top_k, form=form)
    module, dense = strong(config), layer(GqaConfig(**fields))
    y = module(x, context(config)).y
    heads = []  # what each head adds to the output of plain attention with equal weights
    for h in range(6):
        only = torch.zeros(36, dtype=x.dtype)
        only[h * 6 : (h + 1) * 6] = 1
        with torch.no_grad():
            w_o = dense.w_o.clone()
            dense.w_o.mul_(only)
            heads.append(dense(x, context(config)).y)
            dense.w_o.copy_(w_o)
    for b, t in ((0, 0), (1, 4), (2, 10)):
        factors = factors_of_one_token(module, config, x[b, t])
        expected = sum(factor * head[b, t] for factor, head in zip(factors, heads, strict=True))
        torch.testing.assert_close(y[b, t], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_all_heads_straight_through_are_plain_attention(layer, context, x, kv_heads):
    fields = {**SHAPE, "kv_heads": kv_heads}
    config = MohConfig(**fields, shared_heads=2, top_k=4, form="straight_through")
    layers = [layer(config), layer(GqaConfig(**fields))]
    ys = [module(x, context(config)).y for module in layers]
    torch.testing.assert_close(ys[0], ys[1], rtol=0, atol=1e-12)
    upstream = torch.randn_like(x)
    for y in ys:
        (y * upstream).sum().backward()
    for name in ("w_q", "w_k", "w_v", "w_o"):
        got, want = (module.get_parameter(name).grad for module in layers)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert layers[0].router.w.grad.abs().max() > 1e-3


def test_code_form_at_zero_logits_leaves_the_acting_heads_as_they_are(layer, context, x):
    config = MohConfig(**SHAPE, shared_heads=2, top_k=2, form="code")
    module, gqa = layer(config), layer(GqaConfig(**SHAPE))
    with torch.no_grad():
        for weight in (module.router.w, module.w_shared, module.w_stage):
            weight.zero_()
        gqa.w_o[:, 4 * 6 :] = 0  # of equal logits the first two are picked
    torch.testing.assert_close(module(x, context(config)).y, gqa(x, context(config)).y, rtol=0, atol=1e-12)


def test_paper_form_weighs_shared_and_routed_heads_against_each_other(strong, context, x):
    """With all heads picked the factors sum to a + b = 1; with fewer, to less."""
    for top_k, whole in ((4, True), (2, False)):
        config = MohConfig(**SHAPE, shared_heads=2, top_k=top_k)
        module = strong(config)
        factors, _ = module.factors(x, context(config), module.heads_of(x, module.w_q))
        one = torch.ones(3, 11, dtype=x.dtype)
        assert torch.allclose(factors.sum(-1), one, rtol=0, atol=1e-13) == whole
        assert (factors > 0).sum(-1).eq(2 + top_k).all()


# ---------------------------------------------------------------- the router


@pytest.mark.parametrize(
    ("form", "top_k", "moves"),
    [("paper", 1, True), ("paper", 2, True), ("code", 1, False), ("code", 2, True), ("straight_through", 1, True)],
)
def test_which_forms_teach_the_router(layer, context, x, form, top_k, moves):
    legal = MohConfig(**SHAPE, shared_heads=2, top_k=2, balance=BalanceConfig())
    config = legal.model_copy(update={"form": form, "top_k": top_k})  # code at top_k 1 is refused: this is why
    module = layer(config)
    (module(x, context(config)).y ** 2).sum().backward()
    largest = module.router.w.grad.abs().max().item()
    assert (largest > 1e-3) if moves else (largest == 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_a_factor_is_the_output_gradient_along_its_head(layer, context, x, monkeypatch, form):
    config = MohConfig(**SHAPE, shared_heads=2, top_k=2, form=form)
    module, dense = layer(config), layer(GqaConfig(**SHAPE))
    factors, _ = module.factors(x, context(config), module.heads_of(x, module.w_q))
    leaf = factors.detach().requires_grad_()
    monkeypatch.setattr(module, "factors", lambda *_: (leaf, None))
    y = module(x, context(config)).y
    upstream = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, leaf, upstream)
    per_head = []
    for h in range(6):
        only = torch.zeros(36, dtype=x.dtype)
        only[h * 6 : (h + 1) * 6] = 1
        with torch.no_grad():
            w_o = dense.w_o.clone()
            dense.w_o.mul_(only)
            per_head.append((upstream * dense(x, context(config)).y).sum(-1))
            dense.w_o.copy_(w_o)
    torch.testing.assert_close(got, torch.stack(per_head, -1), rtol=0, atol=1e-10)


def test_query_norm_routes_by_the_length_of_the_routed_queries(layer, context, x):
    """Unrotated, measured in units of their spread; no parameters beside plain attention's."""
    config = MohConfig(**SHAPE, shared_heads=2, top_k=2, form="straight_through", router=QueryNormRouterConfig())
    module = layer(config)
    norms = (x @ module.w_q.T).unflatten(-1, (6, 6))[:, :, 2:].norm(dim=-1)
    logits = norms / norms.std(-1, keepdim=True, correction=0)
    factors, aux_loss = module.factors(x, context(config), module.heads_of(x, module.w_q))
    expected = torch.zeros(3, 11, 4, dtype=x.dtype).scatter(-1, norms.topk(2).indices, 1.0)
    torch.testing.assert_close(factors[..., 2:], expected, rtol=0, atol=1e-14)
    assert (factors[..., :2] == 1).all()
    f, mean = expected.mean(1), logits.softmax(-1).mean(1)
    assert aux_loss.item() == pytest.approx(0.01 * 4 * (f * mean).sum(-1).mean().item(), rel=1e-12)
    assert config.num_params(width=20) == GqaConfig(**SHAPE).num_params(width=20)


def test_published_loss_at_equal_logits_is_k_times_its_coefficient(layer, context, x):
    config = MohConfig(**SHAPE, shared_heads=2, top_k=3)
    module = layer(config)
    with torch.no_grad():
        module.router.w.zero_()
    assert module(x, context(config)).aux_loss.item() == pytest.approx(0.01 * 3, rel=1e-12)


def test_statistics_are_of_one_group_of_routed_heads(layer, context, x):
    config = MohConfig(**SHAPE, shared_heads=2, top_k=3)
    module = layer(config)
    module(x, context(config))
    stats = module.router_stats()["router"]
    assert stats.load.shape == (1, 4) and stats.load.sum() == 3 * 33


def test_bf16_weights_still_route_in_fp32(strong, context, x):
    config = MohConfig(**SHAPE, shared_heads=2, top_k=1)
    module, x = strong(config).bfloat16(), x.bfloat16()
    factors, _ = module.factors(x, context(config), module.heads_of(x, module.w_q))
    assert factors.dtype == torch.float32
    exact = (x.double() @ module.router.w.double().T).argmax(-1)
    assert torch.equal(factors[..., 2:].argmax(-1), exact)


# ---------------------------------------------------------------- layers, ranks, cost


def test_each_layer_has_its_number_of_heads(decoder, tokens):
    config = MohConfig(**SHAPE, shared_heads=2, top_k=[1, 4])
    model = decoder(config)
    model(tokens, tokens)
    picked = [layer.router_stats()["router"].load.sum() for layer in model.attention_layers()]
    assert picked == [1 * 33, 4 * 33]
    with pytest.raises(ValueError, match=r"attention.top_k: 2 numbers for 3 layers; give 3 numbers, or one integer"):
        account(ModelConfig(width=20, layers=3, ffn_width=28), config, vocab_size=37, seq_len=8)


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_gradients_add_up_to_the_layers(strong, context, lockstep, x, form):
    """The router, W_S and W_A are whole on both: their gradients are partial, like those of any replicated gain."""
    config = MohConfig(**{**SHAPE, "kv_heads": 2}, shared_heads=2, top_k=2, form=form, balance=BalanceConfig(f_p=0.5))
    full, parts = strong(config), [strong(config), strong(config)]
    shards = config.shards()
    for rank, part in enumerate(parts):
        for name, shard in shards.items():
            mine = full.get_parameter(name).detach().chunk(2, shard.dim)[rank].clone()
            part.register_parameter(name, torch.nn.Parameter(mine))
    upstream = torch.randn_like(x)
    whole = full(x, context(config))
    ((whole.y * upstream).sum() + whole.aux_loss).backward()
    for out in lockstep(parts, lambda part: part(x, context(config))):
        ((out.y * upstream).sum() + out.aux_loss / 2).backward()
    for name, parameter in full.named_parameters():
        grads = [part.get_parameter(name).grad for part in parts]
        got = torch.cat(grads, shards[name].dim) if name in shards else sum(grads)
        torch.testing.assert_close(got, parameter.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "fields",
    [
        {"router": QueryNormRouterConfig()},
        {"router": RandomRouterConfig()},
        {"router": TokenHashRouterConfig()},
        {"balance": BalanceConfig(loss_free_rate=1e-3)},
    ],
)
def test_a_layer_is_not_sharded_if_a_rank_could_not_evaluate_its_router(fields):
    config = MohConfig(**SHAPE, shared_heads=2, top_k=2, **fields)
    assert {shard.units for shard in config.shards().values()} == {1}


def test_cost_is_that_of_the_formulas():
    config = MohConfig(heads=8, kv_heads=4, head_dim=64, shared_heads=2, top_k=3)
    d, core = 512, 4 * 64 * 8 * 512
    assert config.num_params(width=d) == 2 * d * 12 * 64 + d * 6 + d * 2 + 2 * d
    flops = config.flops_per_token(width=d, seq_len=1023)
    rest = 4 * d * 4 * 64 + 2 * d * (6 + 2 + 2)
    assert flops.executed == 4 * d * 8 * 64 + core + rest
    assert flops.useful == 4 * d * 5 * 64 + core * 5 / 8 + rest
    assert config.core_flops_per_token(seq_len=1023) == core
    assert config.kv_bytes_per_token(seq_len=1023, bytes_per_element=2) == 2 * 4 * 64 * 2
    reads = config.model_copy(update={"router": QueryNormRouterConfig(), "form": "straight_through"})
    flops = reads.flops_per_token(width=d, seq_len=1023)
    assert flops.executed == 4 * d * 8 * 64 + core + 4 * d * 4 * 64
    assert flops.useful == 2 * d * (8 + 5) * 64 + core * 5 / 8 + 4 * d * 4 * 64


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_heads": 4}, ["kv_heads: ", "6 query heads", "kv_heads 3 or 6"]),
        ({"shared_heads": 6}, ["shared_heads: ", "leave 0 to route", "shared_heads 4", "heads 12"]),
        ({"shared_heads": 9}, ["shared_heads: ", "leave 0 to route", "shared_heads 4", "heads 12"]),
        ({"shared_heads": 5}, ["shared_heads: ", "leave 1 to route", "shared_heads 4", "heads 12"]),
        ({"heads": 1, "kv_heads": 1, "shared_heads": 0}, ["shared_heads: ", "leave 1 to route", "type gqa", "heads 2"]),
        ({"top_k": 5}, ["top_k: ", "5 heads selected of 4", "top_k 1 to 4", "heads 12"]),
        ({"top_k": 0}, ["top_k: ", "0 heads selected of 4", "top_k 1 or 4"]),
        ({"top_k": [2, 7]}, ["top_k: ", "7 heads selected of 4", "top_k 1 to 4", "heads 12"]),
        ({"form": "code", "top_k": 1}, ["form: ", "no gradient", "form paper or straight_through", "top_k 2"]),
    ],
)
def test_impossible_heads_are_refused_with_the_field_the_reason_and_two_ways_out(fields, words):
    with pytest.raises(ValidationError) as refusal:
        TypeAdapter(AnyMechanism).validate_python({"type": "moh", **SHAPE, "shared_heads": 2, "top_k": 2, **fields})
    (error,) = refusal.value.errors()
    message = error["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0])
    for word in words[1:]:
        assert word in message
