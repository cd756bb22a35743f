"""Gated DeltaNet: the equation, a published layer, documents, its state in decoding, costs, start, and refusals."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llamas import transformers
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headway.kernels.delta.rule import chunked_delta, recurrent_delta
from headway.kernels.documents import Documents
from headway.model.attention.gated_delta import GatedDelta, GatedDeltaConfig
from headway.model.attention.gqa import GqaConfig
from headway.model.base import Context
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.decoder import Decoder
from headway.model.init import initialise
from headway.model.mixed import MixedConfig

WIDTH, SEQ, BATCH, VOCAB = 20, 11, 2, 30
FORMS = {
    "grouped values": GatedDeltaConfig(heads=2, value_heads=4, head_dim=6, value_dim=5, chunk=4),
    "published": GatedDeltaConfig(heads=3, head_dim=4),
    "two taps": GatedDeltaConfig(heads=2, head_dim=5, value_dim=3, conv=2, chunk=3),
    "no convolution": GatedDeltaConfig(heads=2, head_dim=5, value_dim=5, conv=1),
}
each_form = pytest.mark.parametrize("config", FORMS.values(), ids=list(FORMS))
NO_ROPE = (torch.zeros(SEQ, 0), torch.zeros(SEQ, 0))


def made(config: GatedDeltaConfig) -> GatedDelta:
    module = config.build(width=WIDTH, layers=2, init_std=0.4, norm_eps=1e-5)
    assert isinstance(module, GatedDelta)
    initialise(module, seed=5)
    with torch.no_grad():
        module.norm.gain.copy_(torch.linspace(0.5, 1.5, config.value_size))
    return module.double()


def drawn() -> Tensor:
    return torch.randn(BATCH, SEQ, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def documents() -> Documents:
    return Documents(((4, 1, 6), (9, 2)))


def by_the_equation(module: GatedDelta, config: GatedDeltaConfig, x: Tensor) -> Tensor:
    """Of one document x [S, d], token by token and head by head."""
    size, values = config.head_dim, config.value_size

    def convolved(name: str) -> Tensor:
        rows, taps = x @ module.get_parameter(f"w_{name}").T, module.get_parameter(f"conv_{name}")
        sums = torch.zeros_like(rows)
        for t in range(len(x)):
            for back in range(min(config.conv, t + 1)):
                sums[t] += taps[:, config.conv - 1 - back] * rows[t - back]
        return sums * sums.sigmoid()

    q, k, v = (convolved(name) for name in "qkv")
    rate, step = module.a_log.exp(), F.softplus(x @ module.w_a.T + module.dt_bias)
    decay, beta = (-rate * step).exp(), (x @ module.w_b.T).sigmoid()
    gate = x @ module.w_gate.T
    heads = []
    for head in range(config.values):
        of_keys = head // (config.values // config.heads)
        keys, own = slice(of_keys * size, (of_keys + 1) * size), slice(head * values, (head + 1) * values)
        memory, rows = torch.zeros(size, values, dtype=x.dtype), []
        for t in range(len(x)):
            key, query = (z[t, keys] / (z[t, keys].square().sum() + 1e-6).sqrt() for z in (k, q))
            kept = torch.eye(size, dtype=x.dtype) - beta[t, head] * torch.outer(key, key)
            memory = decay[t, head] * kept @ memory + beta[t, head] * torch.outer(key, v[t, own])
            o = query @ memory / math.sqrt(size)
            o = o / (o.square().mean() + 1e-5).sqrt() * module.norm.gain
            rows.append(o * F.silu(gate[t, own]))
        heads.append(torch.stack(rows))
    return torch.cat(heads, -1) @ module.w_o.T


@torch.no_grad()
@each_form
@pytest.mark.parametrize("packed", [False, True])
def test_the_module_computes_the_equation_within_each_document(config: GatedDeltaConfig, packed: bool) -> None:
    module, x, lengths = made(config), drawn(), documents().lengths
    found = module(x, Context(rope=NO_ROPE, documents=documents() if packed else None)).y
    for row, of_row, parts in zip(found, x, lengths if packed else ((SEQ,),) * BATCH, strict=True):
        expected = torch.cat([by_the_equation(module, config, part) for part in of_row.split(parts)])
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)


@each_form
def test_packed_documents_have_the_values_and_gradients_of_documents_apart(config: GatedDeltaConfig) -> None:
    module, x = made(config), drawn().requires_grad_()
    weight = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)
    together = module(x, Context(rope=NO_ROPE, documents=documents())).y
    apart = torch.cat(
        [
            torch.cat([module(part.unsqueeze(0), Context(rope=NO_ROPE)).y for part in row.split(parts)], 1)
            for row, parts in zip(x, documents().lengths, strict=True)
        ]
    )
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    wrt = [x, *module.parameters()]
    both = [torch.autograd.grad((y * weight).sum(), wrt) for y in (together, apart)]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_the_chunk_changes_nothing_but_rounding() -> None:
    found = []
    for chunk in (1, 4, 64):
        config, x = FORMS["published"].model_copy(update={"chunk": chunk}), drawn().requires_grad_()
        module = made(config)
        y = module(x, Context(rope=NO_ROPE, documents=documents())).y
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_layer_of_qwen3_next_in_transformers_has_the_same_outputs_and_gradients() -> None:
    """Its matrices hold queries, keys, values and gate of a head of keys after one another. It sums in fp32."""
    transformers()
    from transformers.models.qwen3_next import configuration_qwen3_next as configuration
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    config = FORMS["grouped values"]
    size, values, shared = config.head_dim, config.value_size, config.values // config.heads
    theirs_config = configuration.Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=config.heads,
        linear_num_value_heads=config.values,
        linear_key_head_dim=size,
        linear_value_head_dim=values,
        linear_conv_kernel_dim=config.conv,
        rms_norm_eps=1e-5,
        hidden_act="silu",
    )
    ours = made(config)
    theirs = qwen.Qwen3NextGatedDeltaNet(theirs_config, 0).double().eval()
    with torch.no_grad():
        parts = [ours.get_parameter(f"w_{name}").unflatten(0, (config.heads, -1)) for name in ("q", "k", "v", "gate")]
        assert [p.shape[1] for p in parts] == [size, size, shared * values, shared * values]
        theirs.in_proj_qkvz.weight.copy_(torch.cat(parts, 1).flatten(0, 1))
        small = [ours.get_parameter(name).unflatten(0, (config.heads, -1)) for name in ("w_b", "w_a")]
        theirs.in_proj_ba.weight.copy_(torch.cat(small, 1).flatten(0, 1))
        taps = torch.cat([ours.get_parameter(f"conv_{name}") for name in "qkv"])
        theirs.conv1d.weight.copy_(taps.unsqueeze(1))
        theirs.A_log.copy_(ours.a_log)
        theirs.dt_bias.copy_(ours.dt_bias)
        theirs.norm.weight.copy_(ours.norm.gain)
        theirs.out_proj.weight.copy_(ours.w_o)
    found = []
    for run in (theirs, lambda x: ours(x, Context(rope=NO_ROPE)).y):
        x = drawn().requires_grad_()
        y = run(x)
        found.append([y, *torch.autograd.grad((y * torch.linspace(-1, 2, SEQ).unsqueeze(1)).sum(), x)])
    for expected, mine in zip(*found, strict=True):
        assert expected.abs().max() > 0.1 and (mine - expected).norm() <= 2e-6 * expected.norm()


# ---------------------------------------------------------------- decoding

MODEL = ModelConfig(width=WIDTH, layers=4, ffn_width=16, init_std=0.4)
HYBRID = MixedConfig(
    kinds={"linear": FORMS["grouped values"], "full": GqaConfig(heads=4, kv_heads=2, head_dim=6)},
    pattern=["linear", "linear", "linear", "full"],
)


def decoder(attention: Any, *, dtype: torch.dtype = torch.float64) -> Decoder:
    return Decoder(MODEL, attention, vocab_size=VOCAB, seed=2).to(dtype).eval()


def some_tokens(rows: int = BATCH, length: int = SEQ) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("attention", [*FORMS.values(), HYBRID], ids=[*FORMS, "hybrid"])
@pytest.mark.parametrize("parts", [(SEQ,), (1,) * SEQ, (2, 1, 1, 5, 1, 1), (6, 5)])
def test_decoding_a_batch_in_any_parts_is_the_whole_pass(attention: Any, parts: tuple[int, ...]) -> None:
    model, tokens = decoder(attention), some_tokens()
    cache = model.new_cache(SEQ)
    found = torch.cat([model.logits(part, cache=cache) for part in tokens.split(parts, 1)], 1)
    torch.testing.assert_close(found, model.logits(tokens), rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_cache_has_as_many_bytes_after_one_token_as_after_all(dtype: torch.dtype) -> None:
    """State of 4 heads of 6 x 5 in fp32 at least; 3 inputs of convolutions of 2 x 12 + 20 channels in the model's."""
    config, size = FORMS["grouped values"], torch.empty(0, dtype=dtype).element_size()
    model = decoder(config, dtype=dtype)
    cache, expected = model.new_cache(SEQ), 4 * BATCH * (120 * max(4, size) + 3 * 44 * size)
    for part in some_tokens().split((1, 4, 6), 1):
        model.logits(part, cache=cache)
        assert cache.nbytes == expected and cache.numbers == 4 * BATCH * (120 + 3 * 44)
        held = [t for layer in cache.layers for t in layer.state.held.values()]
        assert sum(t.untyped_storage().nbytes() for t in held) == expected  # no storage of all tokens behind a view
    for length in (SEQ, 100_000):
        cost = account(MODEL, config, vocab_size=VOCAB, seq_len=length, bytes_per_element=size)
        assert cost.kv_bytes_per_token * length * BATCH == pytest.approx(expected, rel=1e-12)


@torch.no_grad()
def test_rows_of_the_cache_can_be_chosen_and_copied() -> None:
    """As a beam search and the scoring of several choices ask for."""
    model, tokens = decoder(HYBRID), some_tokens(rows=3)
    rows = torch.tensor([2, 0, 2])
    cache = model.new_cache(SEQ)
    model.logits(tokens[:, :6], cache=cache)
    cache.select(rows)
    found = model.logits(tokens[:, 6:], cache=cache)
    mixed = torch.cat([tokens[rows, :6], tokens[:, 6:]], 1)
    torch.testing.assert_close(found, model.logits(mixed)[:, 6:], rtol=0, atol=1e-11)
    one = model.new_cache(SEQ)
    model.logits(tokens[:1, :6], cache=one)
    copies = one.repeated(3, SEQ - 6)
    found = model.logits(tokens[:, 6:], cache=copies)
    same = torch.cat([tokens[:1, :6].expand(3, -1), tokens[:, 6:]], 1)
    torch.testing.assert_close(found, model.logits(same)[:, 6:], rtol=0, atol=1e-11)
    after = model.logits(tokens[:1, 6:8], cache=one)  # the copies changed nothing in what they continued
    torch.testing.assert_close(after, model.logits(tokens[:1, :8])[:, 6:], rtol=0, atol=1e-11)


# ---------------------------------------------------------------- a hybrid by layer


def test_three_layers_with_a_state_to_one_with_softmax_are_trained_and_counted() -> None:
    model = Decoder(MODEL, HYBRID, vocab_size=VOCAB, seed=2).double()
    tokens, segments = some_tokens(), torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2])
    out = model(tokens, tokens.roll(-1, 1), segments)
    out.loss_sum.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    names = [type(layer).__name__ for layer in model.attention_layers()]
    assert names == ["GatedDelta"] * 3 + ["DenseAttention"]
    found = account(MODEL, HYBRID, vocab_size=VOCAB, seq_len=SEQ)
    assert found.num_params == sum(p.numel() for p in model.parameters())
    linear, full = (account(MODEL, kind, vocab_size=VOCAB, seq_len=SEQ) for kind in HYBRID.kinds.values())
    assert found.kv_bytes_per_token == pytest.approx((3 * linear.kv_bytes_per_token + full.kv_bytes_per_token) / 4)
    core = [cost.attention_core_flops.executed for cost in (linear, full)]
    assert found.attention_core_flops.executed == pytest.approx((3 * core[0] + core[1]) / 4)


# ---------------------------------------------------------------- costs and start


def test_useful_flops_are_those_of_single_tokens() -> None:
    """Torch counts the two products that read the state; writing it is an outer product of as many multiplications."""
    config, length = FORMS["grouped values"], 7
    heads, values = config.heads, config.values
    shapes = [(heads, 6), (heads, 6), (values, 5), (values,), (values,)]
    q, k, v, decay, beta = (torch.zeros(BATCH, length, *shape) for shape in shapes)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        recurrent_delta(q, k, v, decay, beta)
    reading = counter.get_total_flops() / (BATCH * length)
    assert reading == 4 * 6 * 5 * values
    assert config.useful_core_flops_per_token(seq_len=length) == 1.5 * reading


@pytest.mark.parametrize(("length", "chunks"), [(8, [4, 4]), (11, [4, 4, 3]), (3, [3]), (1, [1])])
def test_executed_flops_are_those_of_the_chunks(length: int, chunks: list[int]) -> None:
    config = FORMS["grouped values"]
    expected = 0.0
    for n in chunks:
        expected += 2 * (2 * n * n * 6) * 2  # k k^T and q k^T of two heads of keys
        expected += 4 * (3 * 2 * n * 6 * 5 + 2 * n * n * 5 + n * (n - 1) * 5)
    assert config.core_flops_per_token(seq_len=length) * length == pytest.approx(expected, rel=1e-12)
    one = config.model_copy(update={"chunk": 1})
    assert one.core_flops_per_token(seq_len=length) == 6 * 6 * 5 * 4 + 4 * 6 * 2 + 2 * 5 * 4


def test_the_backward_pass_executes_more_than_twice_the_forward_pass() -> None:
    """As the page says: states of all chunks but the last are computed again, then every chunk, then gradients."""
    triangular = {torch.ops.aten.linalg_solve_triangular: lambda a, b, *_, out_shape, **__: math.prod(b) * (b[-2] - 1)}
    config = GatedDeltaConfig(heads=2, value_heads=4, head_dim=16, value_dim=12, chunk=64)
    shapes = [(2, 16), (2, 16), (4, 12), (4,), (4,)]
    q, k, v, decay, beta = (torch.rand(1, 128, *shape, requires_grad=True) for shape in shapes)
    with FlopCounterMode(display=False, custom_mapping=triangular) as counter:
        o, _ = chunked_delta(q, k, v, -decay, beta, chunk=64)
        forward = counter.get_total_flops()
        o.sum().backward()
    assert forward == config.core_flops_per_token(seq_len=128) * 128
    assert counter.get_total_flops() / forward == pytest.approx(4.64, abs=0.005)


def test_parameters_are_the_six_squares_of_the_width_that_the_authors_state() -> None:
    """Heads of 256 that have 0.75 d channels together, and values twice as wide (fla/layers/gated_deltanet.py)."""
    width = 2048
    config = GatedDeltaConfig(heads=6, head_dim=256)
    small = 2 * 6 * width + 4 * (2 * 1536 + 3072) + 2 * 6 + 512  # W_A and W_B, taps, A and c, gains
    assert config.num_params(width=width) == 6 * width**2 + small


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (1024, {"heads": 2, "head_dim": 16, "chunk": 16}),  # states of many chunks
        (64, {"heads": 4, "head_dim": 16}),  # one chunk: squares of its tokens
        (128, {"heads": 2, "head_dim": 64, "value_dim": 32}),  # keys
        (128, {"heads": 2, "value_heads": 4, "head_dim": 16, "value_dim": 128}),  # values
    ],
)
def test_the_plan_counts_what_the_backward_pass_holds_besides_gradients(length: int, sizes: dict[str, int]) -> None:
    config = GatedDeltaConfig.model_validate(sizes)
    keys, values = (config.heads, config.head_dim), (config.values, config.value_size)
    inputs = [
        torch.randn(BATCH, length, *shape).requires_grad_() for shape in (keys, keys, values, values[:1], values[:1])
    ]
    q, k, v, decay, beta = inputs
    o, _ = chunked_delta(q, k, v, -decay.exp(), beta.sigmoid(), chunk=config.chunk)
    upstream = torch.ones_like(o)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = torch.autograd.grad(o, inputs, upstream)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = max(accumulate(event.nbytes() for event in events))
    held = peak - sum(4 * t.numel() for t in found)
    assert BATCH * config.recomputed_core_bytes(seq_len=length) == pytest.approx(held, rel=0.15)


def test_decay_starts_as_published() -> None:
    """exp(A) uniform in (0, 16]; softplus(c) between 0.001 and 0.1, uniform in the logarithm."""
    config = GatedDeltaConfig(heads=2000, head_dim=1, value_dim=1)
    module = config.build(width=1, layers=1, init_std=0.02, norm_eps=1e-5)
    initialise(module, seed=1, prefix="blocks.0.attn.")
    rate, step = module.get_parameter("a_log").exp(), F.softplus(module.get_parameter("dt_bias"))
    for found in (rate / 16, step.log10() / 2 + 1.5):
        share = found.sort().values
        assert share[0] > 0 and share[-1] <= 1 + 1e-6
        ranks = (torch.arange(2000) + 0.5) / 2000
        assert (share - ranks).abs().max() < 1.63 / math.sqrt(2000)  # Kolmogorov-Smirnov at 1 %
    assert abs(float(torch.corrcoef(torch.stack([rate, step]))[0, 1])) < 0.1
    taps = module.get_parameter("conv_q")
    assert float(taps.std()) == pytest.approx(1 / math.sqrt(12), rel=0.05)
    other = config.build(width=1, layers=1, init_std=0.5, norm_eps=1e-5)
    initialise(other, seed=1, prefix="blocks.0.attn.")
    assert torch.equal(other.get_parameter("a_log"), module.get_parameter("a_log"))


@torch.no_grad()
def test_nothing_is_rotated() -> None:
    models = [MODEL.model_copy(update={"positions": positions}) for positions in ("rope", "none")]
    for attention, same in ((FORMS["published"], True), (GqaConfig(heads=2, kv_heads=2, head_dim=6), False)):
        found = [Decoder(model, attention, vocab_size=VOCAB, seed=2).logits(some_tokens()) for model in models]
        assert torch.equal(*found) is same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_heads": 6}, r"value_heads: 6 heads of values do not divide among 4 heads .*_heads 8 .*or heads 2"),
        ({"value_heads": 2}, r"value_heads: 2 heads of values do not divide among 4 heads .* value_heads 4 "),
        ({"rope_fraction": 0.5}, r"rope_fraction: gated_delta rotates nothing.* leave rope_fraction out"),
        ({"rope_base": 500.0}, r"rope_base: gated_delta rotates nothing"),
        ({"qk_norm": True}, r"qk_norm: queries and keys of gated_delta always have length 1 .*use qk_norm false"),
        ({"conv": 0}, r"conv"),
        ({"chunk": 0}, r"chunk"),
    ],
)
def test_what_it_has_no_form_for_is_refused(change: dict[str, Any], message: str) -> None:
    legal = {"type": "gated_delta", "heads": 4, "head_dim": 5}
    assert GatedDeltaConfig.model_validate(legal).shards()["w_gate"].units == 4
    with pytest.raises(ValidationError, match=message):
        GatedDeltaConfig.model_validate(legal | change)
