"""NAMOH: costs, balance of heads, heads by layer, and what is refused."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from headway.model.attention.gqa import MhaConfig
from headway.model.attention.namoh import NamohConfig
from headway.model.balance import BalanceConfig
from headway.model.mixed import AnyAttention
from headway.model.router import QueryNormRouterConfig, RandomRouterConfig, TokenHashRouterConfig
from headway.model.segments import Segments

SHAPE: dict[str, Any] = {"heads": 5, "head_dim": 6}


@pytest.mark.parametrize(("heads", "k", "length"), [(3, 1, 4), (3, 2, 4), (4, 2, 3), (2, 2, 5)])
def test_keys_of_a_head_are_their_mean_over_all_routings(heads, k, length):
    """Exactly: each token's choice is any k heads with equal probability. An even load is at most this."""
    choices = list(itertools.combinations(range(heads), k))
    every = [torch.tensor(routing)[None] for routing in itertools.product(choices, repeat=length)]
    mean = sum(Segments.of(idx, heads=heads).scores for idx in every) / len(every)
    config = NamohConfig(heads=heads, head_dim=6, top_k=k)
    assert length * k * config.head_keys(seq_len=length) == pytest.approx(mean, rel=1e-12)
    even = length * k * (length * k / heads + 1) / 2
    assert even <= mean * (1 + 1e-12) and (k < heads or even == pytest.approx(mean))


def test_costs_are_those_of_the_page():
    config, d = NamohConfig(heads=8, head_dim=64, top_k=2, shared_heads=2, window=128, qk_norm=True), 512
    assert config.num_params(width=d) == 4 * d * 10 * 64 + d * 8 + 2 * 64
    window = (128 * 129 / 2 + (1024 - 128) * 128) / 1024
    core = 4 * 64 * (2 * (1 + 1023 / 8) + 2 * window)
    assert config.core_flops_per_token(seq_len=1024) == pytest.approx(core, rel=1e-12)
    flops = config.flops_per_token(width=d, seq_len=1024)
    assert flops.useful == pytest.approx(8 * d * 4 * 64 + 2 * d * 8 + core, rel=1e-12)
    assert flops.executed - flops.useful == pytest.approx(8 * d * 6 * 64, rel=1e-12)
    grouped = config.model_copy(update={"projections": "grouped"}).flops_per_token(width=d, seq_len=1024)
    assert grouped.executed == grouped.useful == flops.useful
    assert config.kv_bytes_per_token(seq_len=1024, bytes_per_element=2) == 2 * 64 * 2 * (2 + 2 * 127 / 1024)
    assert config.model_copy(update={"top_k": 8, "shared_heads": 0, "window": None}).core_flops_per_token(
        seq_len=1024
    ) == MhaConfig(heads=8, head_dim=64).core_flops_per_token(seq_len=1024)


def test_a_bias_without_a_loss_evens_the_load_and_leaves_the_gates(layer, context):
    config = NamohConfig(heads=8, head_dim=6, top_k=2, balance=BalanceConfig(loss_free_rate=0.02))
    module, x = layer(config), torch.randn(4, 64, 20, dtype=torch.float64) + 1
    loads, given = [], replace(context(config, 64), tokens=None)
    for _ in range(200):
        assert module(x, given).aux_loss is None
        loads.append(module.router_stats()["router"].load[0])
        module.after_step({"router": loads[-1][None]})
        module.reset_router_stats()
    assert loads[-1].max() < 1.3 * loads[-1].mean() < loads[0].max()
    routing = module.router(x, given, k=2)
    p = (x @ module.router.w.T).softmax(-1)
    torch.testing.assert_close(routing.gate[:, :, 0], p.gather(-1, routing.idx[:, :, 0]), rtol=0, atol=1e-14)


def test_the_published_loss_is_f_times_p(layer, context, x):
    config = NamohConfig(**SHAPE, top_k=2)
    module = layer(config)
    p = (x @ module.router.w.T).softmax(-1)
    f = torch.zeros_like(p).scatter(-1, p.topk(2).indices, 0.5).mean(1)
    loss = 0.001 * 5 * (f * p.mean(1)).sum(-1).mean()
    torch.testing.assert_close(module(x, context(config)).aux_loss, loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": 6}, ["top_k: ", "6 of 5 heads", "use top_k 1 to 5, or heads 6"]),
        ({"top_k": 0}, ["top_k: ", "use top_k 1 to 5"]),
        ({"top_k": [2, 9]}, ["top_k: ", "9 of 5 heads", "heads 9"]),
        ({"top_k": 1, "gate": "renorm"}, ["gate: ", "no gradient", "softmax or detached_renorm", "top_k 2"]),
        ({"window": 8}, ["window: ", "there are none", "shared_heads 4"]),
        ({"router": {"type": "query_norm"}}, ["router: query_norm", "linear or two_layer"]),
        ({"gate": "hard", "balance": {}}, ["gate: hard", "no gradient", "balance.f_p"]),
        ({"key_experts": 2}, ["key_experts"]),
    ],
)
def test_impossible_options_are_refused_with_the_field_the_reason_and_a_way_out(fields, words):
    with pytest.raises(ValidationError) as refusal:
        TypeAdapter(AnyAttention).validate_python({"type": "namoh", **SHAPE, "top_k": 2, **fields})
    message = refusal.value.errors()[0]["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0])
    for word in words[1:]:
        assert word in message


def test_a_window_beyond_the_sequences_is_refused():
    config = NamohConfig(**SHAPE, top_k=2, shared_heads=1, window=128)
    with pytest.raises(ValueError, match=r"attention\.window: .* data\.seq_len 128"):
        config.check_run(seq_len=64, tokens=1, tokens_per_step=1)
    config.check_run(seq_len=128, tokens=1, tokens_per_step=1)


@pytest.mark.parametrize("router", [RandomRouterConfig(), TokenHashRouterConfig()])
def test_a_router_with_buffers_alone_keeps_the_layer_whole(router):
    config = NamohConfig(**SHAPE, top_k=2, router=router, shared_heads=2)
    assert {shard.units for shard in config.shards().values()} == {1}
    assert {shard.units for shard in NamohConfig(**SHAPE, top_k=2, shared_heads=2).shards().values()} == {5, 2}


def test_queries_of_other_ranks_are_not_read():
    with pytest.raises(ValidationError, match="query_norm"):
        NamohConfig(**SHAPE, top_k=2, router=QueryNormRouterConfig())


def test_each_layer_has_its_number_of_heads(decoder, tokens):
    model = decoder(NamohConfig(**SHAPE, top_k=[1, 4]))
    model(tokens, tokens)
    assert [int(layer.router_stats()["router"].load.sum()) for layer in model.attention_layers()] == [33, 4 * 33]
