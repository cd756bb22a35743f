"""Grouped query experts: published equations, gradients of the router, slots, the shared head, tensor parallelism."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from headway.kernels.documents import Documents
from headway.kernels.rope import apply_rope
from headway.model.attention.gqa import MhaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.base import Context
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.init import initialise
from headway.model.kv_cache import KVCache
from headway.model.router import LinearRouterConfig, QueryNormRouterConfig, Routing

SHAPE: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 6}
VARIANTS = ["gqe", "hard_concat", "weighted_concat"]
SHARED = ["none", "mean", "group0", "dedicated"]


def unchecked(**fields):
    """A config that the checks refuse, to show why they do."""
    return GqeConfig(**SHAPE, top_k=1).model_copy(update=fields)


def written_out(module, config, x, rope):
    """The equations token by token, group by group; only RoPE is not written out."""
    head_dim, members, groups = config.head_dim, config.heads_per_group, config.groups

    def rotated(w):
        return apply_rope((x @ w.T).unflatten(-1, (-1, head_dim)), rope)

    def attend(q, k, v, t):
        return torch.softmax(k[: t + 1] @ q / head_dim**0.5, 0) @ v[: t + 1]

    q, k, v = rotated(module.w_q), rotated(module.w_k), (x @ module.w_v.T).unflatten(-1, (groups, head_dim))
    if config.shared == "mean":  # the rotated mean of the keys, which is the mean of the rotated ones
        w_k, w_v = (w.unflatten(0, (groups, head_dim)).mean(0) for w in (module.w_k, module.w_v))
        k_shared, v_shared = rotated(w_k)[:, :, 0], x @ w_v.T
    elif config.shared == "group0":
        k_shared, v_shared = k[:, :, 0], v[:, :, 0]
    elif config.shared == "dedicated":
        k_shared, v_shared = rotated(module.w_k_shared)[:, :, 0], x @ module.w_v_shared.T
    else:
        k_shared = v_shared = None
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            slots, weights = [], []
            for g in range(groups):
                p = torch.softmax(module.router.w[g * members : (g + 1) * members] @ x[b, t], 0)
                for m in p.argsort(descending=True)[: config.top_k]:
                    slots.append(attend(q[b, t, g * members + m], k[b, :, g], v[b, :, g], t))
                    weights.append(p[m])
            if config.variant == "weighted_concat":
                slots = [w * o for w, o in zip(weights, slots, strict=True)]
            parts, matrices = [*slots], [module.w_o]
            if config.variant == "gqe":
                parts.append(sum(w * o for w, o in zip(weights, slots, strict=True)) / sum(weights))
                matrices.append(module.w_o_mix)
            if k_shared is not None and v_shared is not None:
                parts.append(attend(rotated(module.w_q_shared)[b, t, 0], k_shared[b], v_shared[b], t))
                matrices.append(module.w_o_shared)
            y[b, t] = torch.cat(matrices, 1) @ torch.cat(parts)  # the published W_O, (k G + 2) D wide
    return y


@pytest.mark.parametrize(("variant", "shared"), [*((v, "published") for v in VARIANTS), *(("gqe", s) for s in SHARED)])
def test_is_the_equations_written_out(layer, context, x, variant, shared):
    config = GqeConfig(**SHAPE, top_k=2, variant=variant, shared_head=shared, rope_fraction=2 / 3)
    module, table, x = layer(config), context(config, 7), x[:, :7]
    torch.testing.assert_close(module(x, table).y, written_out(module, config, x, table.rope), rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(
    ("variant", "shared"),
    [("gqe", "mean"), ("gqe", "dedicated"), ("hard_concat", "group0"), ("weighted_concat", "none")],
)
def test_packed_slots_equal_dense_heads(layer, context, x, variant, shared, top_k):
    config = GqeConfig(**SHAPE, top_k=top_k, variant=variant, shared_head=shared, qk_norm=True, rope_fraction=2 / 3)
    module = layer(config)
    x.requires_grad_()
    documents = Documents.of(torch.tensor([0] * 4 + [1] * 7).expand(3, 11))
    for table in (context(config), context(config, documents=documents)):
        packed, dense = module(x, table), module.forward_reference(x, table)
        torch.testing.assert_close(packed.y, dense.y, rtol=0, atol=1e-12)
        upstream, wanted = torch.randn_like(packed.y), [x, *module.parameters()]
        got, want = (torch.autograd.grad((out.y * upstream).sum() + out.aux_loss, wanted) for out in (packed, dense))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("variant", "gate"), [("hard_concat", "hard"), ("weighted_concat", "softmax")])
def test_without_mix_and_shared_head_is_routed_gqa_with_an_output_slice_per_slot(decoder, tokens, variant, gate):
    same: dict[str, Any] = {**SHAPE, "top_k": 2, "qk_norm": True, "balance": BalanceConfig(f_p=0.3)}
    models = decoder(GqeConfig(**same, variant=variant)), decoder(RgqaConfig(**same, gate=gate, output="slot"))
    assert [name for name, _ in models[0].named_parameters()] == [name for name, _ in models[1].named_parameters()]
    outs = [model(tokens, tokens.roll(-1, 1)) for model in models]
    torch.testing.assert_close(outs[0].loss_sum, outs[1].loss_sum, rtol=1e-12, atol=0)
    for out in outs:
        (out.loss_sum + out.aux_loss).backward()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10)


def test_one_unscaled_expert_per_group_is_mha(decoder, tokens):
    legal = GqeConfig(heads=8, kv_heads=4, head_dim=6, top_k=1, variant="hard_concat")
    one = legal.model_copy(update={"heads": 4})  # refused, as its routers have nothing to choose
    mha = MhaConfig(heads=4, head_dim=6)
    torch.testing.assert_close(decoder(one).logits(tokens), decoder(mha).logits(tokens), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the router


def test_the_mixing_weights_sum_to_one_over_all_groups(layer, context, x):
    config = GqeConfig(**SHAPE, top_k=2)
    module = layer(config)
    gate = module.router(x, context(config), k=2).gate
    weights = module.mixing_weights(gate)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(3, 11, dtype=x.dtype), rtol=0, atol=1e-14)
    assert ((weights[:, :, 0].sum(-1) - 0.5).abs() > 0.05).any()  # not one within each group


@pytest.mark.parametrize(
    ("fields", "moves"),
    [
        ({}, True),
        ({"shared_head": "none"}, True),
        ({"top_k": 2}, True),
        ({"kv_heads": 1}, False),
        ({"kv_heads": 1, "top_k": 2}, True),
        ({"variant": "hard_concat"}, False),
        ({"variant": "hard_concat", "top_k": 2}, False),
        ({"variant": "weighted_concat"}, True),
        ({"variant": "weighted_concat", "kv_heads": 1}, True),
    ],
)
def test_which_variants_give_the_router_a_gradient(layer, context, x, fields, moves):
    config = unchecked(balance=BalanceConfig(), **fields)
    module = layer(config)
    (module(x, context(config)).y ** 2).sum().backward()
    gradient = module.router.w.grad
    largest = 0.0 if gradient is None else gradient.abs().max().item()
    # p / p is exactly 1, but its two terms of gradient p/p^2 and 1/p are rounded apart
    assert (largest > 1e-3) if moves else (largest < 1e-12)


def test_the_task_loss_gives_gradients_to_logits_of_unselected_experts(layer, context, x):
    config = GqeConfig(**SHAPE, top_k=1)
    module, table = layer(config), context(config)
    logits = module.router.logits(x, table, None).detach().requires_grad_()
    module.router.logits = lambda *_: logits
    module(x, table).y.square().sum().backward()
    passed_over = torch.ones_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 0)
    assert ((logits.grad * passed_over).abs().sum((0, 1)) > 1e-6).all()


def test_tokens_choose_differently_from_the_first_step_on():
    """The published router starts at zero: all logits tie, and every token takes the first expert."""
    config = GqeConfig(heads=8, kv_heads=2, head_dim=6, top_k=1)
    module: Any = config.build(width=20, layers=1, init_std=0.02, norm_eps=1e-5)
    initialise(module, seed=3, prefix="blocks.0.attn.")
    x, rope = torch.randn(4, 64, 20), (torch.ones(64, 6), torch.zeros(64, 6))
    module(x, Context(rope=rope))
    load = module.router_stats()["router"].load
    assert (load > 0.1 * 256).all()
    with torch.no_grad():
        module.router.w.zero_()
    module.reset_router_stats()
    module(x, Context(rope=rope))
    assert torch.equal(module.router_stats()["router"].load, torch.tensor([[256.0, 0, 0, 0]] * 2))
    with pytest.raises(ValidationError):
        LinearRouterConfig(init_std=0.0)


@pytest.mark.parametrize(("top_k", "uniform"), [(1, 1.0), (2, 2.0)])
def test_aux_loss_is_k_at_uniform_use_times_its_coefficient(layer, context, top_k, uniform):
    config = GqeConfig(**SHAPE, top_k=top_k)
    module, table = layer(config), context(config, 8)
    steps = (torch.arange(8)[:, None] + torch.arange(4)) % 4  # every expert is first, second, .. twice in 8 tokens
    logits = -steps.double()[None, :, None].expand(3, 8, 2, 4)
    module.router.logits = lambda *_: logits
    x = torch.randn(3, 8, 20, dtype=torch.float64)
    assert module(x, table).aux_loss.item() == pytest.approx(0.01 * uniform, rel=1e-14)


def test_aux_loss_is_the_number_of_experts_at_collapse(layer, context, x):
    config = GqeConfig(**SHAPE, top_k=1)
    module = layer(config)
    logits = torch.tensor([1000.0, 0, 0, 0], dtype=torch.float64).expand(3, 11, 2, 4)
    module.router.logits = lambda *_: logits
    assert module(x, context(config)).aux_loss.item() == 0.01 * 4


def test_aux_losses_of_the_layers_are_summed(decoder, tokens):
    model = decoder(GqeConfig(**SHAPE, top_k=1))
    losses = []
    for attention in model.attention_layers():
        attention.register_forward_hook(lambda _module, _args, out: losses.append(out.aux_loss))
    total = model(tokens, tokens.roll(-1, 1)).aux_loss
    assert len(losses) == 2 and losses[0] != losses[1]
    torch.testing.assert_close(total, losses[0] + losses[1], rtol=1e-12, atol=0, check_dtype=False)


# ---------------------------------------------------------------- slots, shared head, cache


@pytest.mark.parametrize("variant", ["gqe", "hard_concat"])
def test_the_order_of_the_slots_matters_and_is_that_of_the_output_slices(layer, context, x, monkeypatch, variant):
    config = GqeConfig(**SHAPE, top_k=3, variant=variant)
    module, table = layer(config), context(config)
    y = module(x, table).y
    idx, gate, aux_loss = module.router(x, table, k=3)
    monkeypatch.setattr(module.router, "forward", lambda *_, **__: Routing(idx.flip(-1), gate.flip(-1), aux_loss))
    assert (module(x, table).y - y).abs().max() > 1e-2
    with torch.no_grad():
        module.w_o.copy_(module.w_o.unflatten(1, (2, 3, 6)).flip(2).flatten(1))
    torch.testing.assert_close(module(x, table).y, y, rtol=0, atol=1e-13)


def test_published_means_the_mean_in_gqe_and_no_shared_head_elsewhere(layer, context, x):
    for variant, shared in zip(VARIANTS, ["mean", "none", "none"], strict=True):
        published, stated = (
            GqeConfig.model_validate({**SHAPE, "top_k": 2, "variant": variant, "shared_head": name})
            for name in ("published", shared)
        )
        assert published.num_params(width=20) == stated.num_params(width=20)
        table = context(published)
        assert torch.equal(layer(published)(x, table).y, layer(stated)(x, table).y)


@pytest.mark.parametrize("shared", SHARED)
def test_a_chunk_of_prefill_does_not_see_its_own_future(layer, x, context, shared):
    """With a cache there are more keys than queries; a mask by position, not none, keeps the chunk causal."""
    config = GqeConfig(**SHAPE, top_k=2, shared_head=shared)
    module, (cos, sin) = layer(config).eval(), context(config).rope

    def chunk(later):
        cache = KVCache()
        module(x[:, :4], Context(rope=(cos[:4], sin[:4]), cache=cache))
        end = torch.cat([x[:, 4:10], later], 1)
        return module(end, Context(rope=(cos[4:], sin[4:]), cache=cache)).y

    y, other = chunk(x[:, 10:]), chunk(x[:, 10:] + 1)
    assert torch.equal(y[:, :6], other[:, :6]) and not torch.equal(y[:, 6], other[:, 6])
    torch.testing.assert_close(y, module(x, context(config)).y[:, 4:], rtol=0, atol=1e-12)


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    ("ranks", "fields"),
    [
        (2, {"shared_head": "mean", "qk_norm": True}),
        (4, {"shared_head": "mean"}),
        (4, {"shared_head": "group0"}),
        (2, {"shared_head": "dedicated"}),
        (2, {"variant": "weighted_concat"}),
        (2, {"variant": "hard_concat", "shared_head": "mean"}),
    ],
)
def test_ranks_add_up_to_the_layer_and_so_do_their_gradients(layer, context, lockstep, x, ranks, fields):
    """A gradient of a cut parameter is the slice of the whole's; of a parameter that is not cut, ranks hold parts."""
    config = GqeConfig(heads=8, kv_heads=4, head_dim=8, top_k=2, **fields)
    full, shards, table = layer(config), config.shards(), context(config)
    parts = [layer(config) for _ in range(ranks)]
    for rank, part in enumerate(parts):
        for name, shard in shards.items():
            owner, _, own_name = name.rpartition(".")
            mine = full.get_parameter(name).detach().chunk(ranks, shard.dim)[rank]
            part.get_submodule(owner).register_parameter(own_name, torch.nn.Parameter(mine))
    inputs = [x.clone().requires_grad_() for _ in range(ranks + 1)]
    whole = full(inputs[-1], table)
    outs = lockstep(parts, lambda part: part(inputs[parts.index(part)], table))
    y = torch.stack([out.y for out in outs]).sum(0)
    torch.testing.assert_close(y, whole.y, rtol=0, atol=1e-12)
    upstream = torch.randn_like(y)
    (whole.y * upstream).sum().backward()
    (y * upstream).sum().backward()
    torch.testing.assert_close(sum(part.grad for part in inputs[:-1]), inputs[-1].grad, rtol=0, atol=1e-11)
    for name, parameter in full.named_parameters():
        if parameter.grad is None:  # hard_concat's router
            continue
        got = [part.get_parameter(name).grad for part in parts]
        together = torch.cat(got, shards[name].dim) if name in shards else sum(got)
        torch.testing.assert_close(together, parameter.grad, rtol=0, atol=1e-11)


# ---------------------------------------------------------------- cost


def test_costs_are_the_published_formulas():
    d, h, g, head_dim, seq_len = 96, 12, 3, 16, 65
    for k in (1, 2, 4):
        config = GqeConfig(heads=h, kv_heads=g, head_dim=head_dim, top_k=k)
        params = d * (h + 1) * head_dim + 2 * d * g * head_dim + d * h + (k * g + 2) * head_dim * d
        assert config.num_params(width=d) == params
        useful = 2 * d * (k * g + 1) * head_dim + 2 * (k * g + 2) * head_dim * d + 4 * d * g * head_dim
        useful += 2 * d * h + 4 * head_dim * (k * g + 1) * (seq_len + 1) / 2
        flops = config.flops_per_token(width=d, seq_len=seq_len)
        assert (flops.useful, flops.executed) == (useful, useful + 2 * d * (h - k * g) * head_dim)
        assert config.kv_bytes_per_token(seq_len=seq_len, bytes_per_element=2) == 2 * 2 * g * head_dim


def test_parameters_and_cache_of_each_optional_part():
    d, head_dim = 96, 16

    def params(**fields):
        return GqeConfig(heads=12, kv_heads=3, head_dim=head_dim, top_k=2, **fields).num_params(width=d)

    matrix = d * head_dim
    assert params() - params(shared_head="none") == 2 * matrix
    assert params(shared_head="none") - params(variant="hard_concat") == matrix
    assert params(variant="weighted_concat") == params(variant="hard_concat")
    assert params(shared_head="dedicated") - params(shared_head="group0") == 2 * matrix
    dedicated = GqeConfig(heads=12, kv_heads=3, head_dim=head_dim, top_k=2, shared_head="dedicated")
    assert dedicated.kv_bytes_per_token(seq_len=64, bytes_per_element=2) == 2 * 2 * (3 + 1) * head_dim


@pytest.mark.parametrize(
    ("shape", "attention_params", "params", "mflops"),
    [
        ((1024, 20, 16, 4, 2864), 2_048_000, 249_734_144, 494.2),
        ((1024, 20, 16, 8, 2608), 2_834_432, 249_734_144, 525.6),
        ((2048, 20, 32, 8, 5840), 7_798_784, 939_214_848, 1799.6),
    ],
)
def test_proposed_sizes(shape, attention_params, params, mflops):
    width, layers, heads, groups, ffn_width = shape
    config = GqeConfig(heads=heads, kv_heads=groups, head_dim=64, top_k=1)
    model = ModelConfig(width=width, layers=layers, ffn_width=ffn_width)
    cost = account(model, config, vocab_size=32_000, seq_len=2048)
    assert config.num_params(width=width) == attention_params
    assert cost.num_params == params
    assert round(cost.flops_per_token.useful / 1e6, 1) == mflops


def test_a_router_that_reads_queries_needs_all_of_them():
    config = GqeConfig(**SHAPE, top_k=1, router=QueryNormRouterConfig())
    flops = config.flops_per_token(width=20, seq_len=64)
    assert flops.useful == flops.executed
    assert "router.w" not in config.shards()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": 5}, ["top_k: ", "5 experts selected of 4", "top_k 1 to 4", "heads 10"]),
        ({"kv_heads": 8, "top_k": 1}, ["heads: ", "one expert per group", "heads 16", "type mha"]),
        ({"kv_heads": 3, "top_k": 1}, ["kv_heads: ", "8 query heads", "kv_heads 2 or 4"]),
        ({"kv_heads": 1, "top_k": 1}, ["variant: ", "no gradient", "variant weighted_concat", "or top_k 2"]),
        ({"heads": 1, "kv_heads": 1, "top_k": 1}, ["heads: ", "one expert per group", "heads 2", "type mha"]),
        (
            {"top_k": 1, "variant": "hard_concat", "balance": {}},
            ["variant: hard_concat", "gives the router no gradient", "router.type random"],
        ),
    ],
)
def test_an_impossible_shape_is_refused_with_the_field_the_reason_and_two_ways_out(fields, words):
    with pytest.raises(ValidationError) as refusal:
        GqeConfig.model_validate({**SHAPE, **fields})
    (error,) = refusal.value.errors()
    message = error["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0])
    for word in words[1:]:
        assert word in message


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 4},
        {"heads": 10, "top_k": 5},
        {"heads": 16, "kv_heads": 8, "top_k": 2},
        {"kv_heads": 1, "top_k": 1, "variant": "weighted_concat"},
        {"kv_heads": 1, "top_k": 2},
        {"heads": 2, "kv_heads": 1, "top_k": 2},
        {"heads": 2, "kv_heads": 1, "top_k": 1, "variant": "weighted_concat"},
    ],
)
def test_the_ways_out_are_legal(fields):
    assert GqeConfig(**{**SHAPE, **fields}).top_k == fields["top_k"]


@pytest.mark.parametrize("fields", [{"top_k": 0}, {"variant": "soft"}, {"shared_head": "group1"}, {"gate": "renorm"}])
def test_unknown_names_and_values_are_refused(fields):
    with pytest.raises(ValidationError):
        GqeConfig(**{**SHAPE, "top_k": 1, **fields})
