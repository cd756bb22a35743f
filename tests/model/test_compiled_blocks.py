"""`speed.compile: block`: one graph for all blocks of one shape, with the results of the plain blocks.

Losses and gradients are compared in fp32, where compiled code rounds sums in another order.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headway.kernels.attention import Packed, core, core_of_blocks
from headway.kernels.documents import Documents
from headway.kernels.levers import LeverError
from headway.kernels.operations import Operations
from headway.model import compiled as module
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.base import AttentionConfig, SequenceRanks
from headway.model.compiled import compile_blocks
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder, Placement

V, B, S, LAYERS = 64, 2, 24, 3
PLACED = Placement(operations=Operations(core=core_of_blocks), sequence=SequenceRanks(attend=core_of_blocks))
GQA = GqaConfig(heads=4, kv_heads=2, head_dim=6)


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """Graphs are made and differentiated as always, and run without Inductor, which takes half a minute for each."""
    compile_ = torch.compile

    def made(function: Any, **options: Any) -> Any:
        return compile_(function, **{k: v for k, v in options.items() if k != "options"}, backend="aot_eager")

    monkeypatch.setattr(module.torch, "compile", made)


def decoder(attention: AttentionConfig, *, blocks: bool, **model: Any) -> Decoder:
    config = ModelConfig(width=20, layers=LAYERS, ffn_width=24, init_std=0.1, vocab_size=V, **model)
    made = Decoder(config, attention, vocab_size=V, seed=1, placement=PLACED)
    if blocks:
        compile_blocks(made)
    return made


def pairs(attention: AttentionConfig, **model: Any) -> tuple[Decoder, Decoder]:
    return decoder(attention, blocks=False, **model), decoder(attention, blocks=True, **model)


def micro_batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and segments [B, S]; the documents of every step have other lengths."""
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, V, (B, S), generator=g)
    ends = torch.randint(1, S, (B, 1), generator=g)
    return tokens, (torch.arange(S) >= ends).int()


def trained(model: Decoder, step: int) -> tuple[float, dict[str, Tensor]]:
    """Loss with auxiliary losses, and gradients, of a pass over micro-batch `step`."""
    tokens, segments = micro_batch(step)
    torch.manual_seed(step)  # noise of routers
    model.before_step(step * tokens.numel())
    out = model(tokens, tokens.roll(-1, 1), segments)
    loss = out.loss_sum / tokens.numel() + out.aux_loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def assert_alike(plain: Decoder, blocks: Decoder, *, steps: int, rel: float = 1e-6, grad_rel: float = 1e-5) -> None:
    """grad_rel: a gradient's difference relative to its norm. Some are differences of nearly equal sums (routers)."""
    for step in range(steps):
        (expected, wanted), (loss, found) = trained(plain, step), trained(blocks, step)
        assert loss == pytest.approx(expected, rel=rel)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (found[name] - gradient).norm() <= grad_rel * gradient.norm() + 1e-9, name


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---------------------------------------------------------------- the attention core as one operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 9, 200])
@pytest.mark.parametrize("count", [60, 700, 1300])
def test_the_core_of_compiled_blocks_is_the_plain_core_bit_for_bit(count, window, dtype):
    g = torch.Generator().manual_seed(0)
    ends = torch.tensor([[7, 60], [count // 2, count - 1], [count, count]])
    segments = (torch.arange(count)[None, :, None] >= ends[:, None]).sum(-1).int()
    documents = Documents.of(segments)
    q, k, v = (torch.randn(3, count, n, 8, generator=g).to(dtype).requires_grad_() for n in (4, 2, 2))
    up = torch.randn(3, count, 4, 8, generator=g).to(dtype)
    plain = core(q, k, v, documents, window=window)
    single = core_of_blocks(q, k, v, Packed.of(documents, q.device), window=window)
    assert torch.equal(plain, single)
    for a, b in zip(torch.autograd.grad(plain, (q, k, v), up), torch.autograd.grad(single, (q, k, v), up), strict=True):
        assert torch.equal(a, b)


def test_the_operator_is_registered_as_pytorch_asks():
    q, k, v = (torch.randn(B, S, n, 8, requires_grad=True) for n in (4, 2, 2))
    numbers = Packed.of(Documents.of(micro_batch(0)[1]), q.device).numbers
    torch.library.opcheck(torch.ops.headway.packed_core.default, (q, k, v, numbers, 5))


# ---------------------------------------------------------------- graphs


@pytest.mark.slow  # of all mechanisms together
def test_every_mechanism_is_one_graph_and_is_not_compiled_again(compilable_mechanism, traced):
    """Two graphs of a routed layer: its meter counts the first micro-batch of a step, and adds up the later ones.

    Layers with windows or sizes of their own have graphs of their own.
    """
    mechanism = compilable_mechanism
    plain, blocks = pairs(mechanism)
    if mechanism.reads_routing:  # sizes are read on the host, which breaks the graph
        with pytest.raises(LeverError, match=r"speed\.compile: block does not compile a block of .*; use speed"):
            trained(blocks, 0)
        return
    assert_alike(plain, blocks, steps=2)
    first = graphs()
    assert first <= LAYERS * 2
    for layer in (*plain.attention_layers(), *blocks.attention_layers()):
        layer.reset_router_stats()
    for step in range(2, 6):
        trained(blocks, step)
    assert graphs() == first


def test_layers_share_one_graph(traced):
    plain, blocks = pairs(GQA)
    assert_alike(plain, blocks, steps=3)
    assert graphs() == 1


@pytest.mark.parametrize("option", [{"value_residual": "learned"}, {"value_residual": "fixed"}, {"share_kv": 2}])
def test_what_layers_hand_on_crosses_their_graphs(option, traced):
    """One graph of layers that hand on, one of those that take; gradients of both are those of the plain blocks."""
    plain, blocks = pairs(GQA.model_copy(update=option))
    assert_alike(plain, blocks, steps=3)
    assert graphs() == 2


def test_routers_count_what_they_count_without_a_compiler(traced):
    plain, blocks = pairs(RgqaConfig(heads=6, kv_heads=2, head_dim=6, top_k=2))
    for step in range(3):
        trained(plain, step)
        trained(blocks, step)
    for a, b in zip(plain.attention_layers(), blocks.attention_layers(), strict=True):
        (mine,), (theirs,) = a.router_stats().values(), b.router_stats().values()
        assert torch.equal(mine.load, theirs.load) and mine.load.sum() == 3 * 2 * 2 * B * S
        assert mine.detail is not None and theirs.detail is not None
        for x, y in zip(mine.detail.tensors(), theirs.detail.tensors(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)  # margins and gates are sums of rounded numbers


def test_dropout_has_the_same_masks_in_one_graph(traced):
    plain, blocks = pairs(GQA, dropout=0.2, dropout_places=("embedding", "branches", "hidden", "head"))
    assert_alike(plain, blocks, steps=2)
    assert graphs() == 1
    assert trained(decoder(GQA, blocks=False), 0)[0] != pytest.approx(trained(plain, 0)[0], rel=1e-4)


def test_validation_and_generation_run_without_compiled_blocks(traced):
    plain, blocks = pairs(GQA)
    tokens, segments = micro_batch(0)
    for model in (plain, blocks):
        model.eval()
    with torch.no_grad():
        assert torch.equal(blocks.logits(tokens, segments), plain.logits(tokens, segments))
    assert graphs() == 0


def test_a_compiler_that_fails_is_named_and_an_error_of_a_later_pass_is_not_blamed_on_it(monkeypatch, traced):
    def failing(*_: Any) -> Any:
        raise RuntimeError("no such compiler\nand a long trace")

    first, later = (decoder(GQA, blocks=True) for _ in range(2))
    trained(later, 0)
    for model in (first, later):
        monkeypatch.setattr(model.blocks[0].compiled, "_function", failing)
    with pytest.raises(LeverError, match=r"speed\.compile: block .*no such compiler\); use speed\.compile: none, or"):
        trained(first, 0)
    with pytest.raises(RuntimeError, match="no such compiler") as caught:
        trained(later, 1)
    assert not isinstance(caught.value, LeverError)


# ---------------------------------------------------------------- with Inductor


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gqa", "rgqa", "windows", "gpt2"])
def test_compiled_code_trains_alike_and_repeats_its_bits(kind):
    forms: dict[str, dict[str, Any]] = {
        "gpt2": {"mlp": "gelu_tanh", "norm": "layernorm", "mlp_biases": True, "dropout": 0.1}
    }
    attentions: dict[str, AttentionConfig] = {
        "rgqa": RgqaConfig(heads=6, kv_heads=2, head_dim=6, top_k=2),
        "windows": GqaConfig(heads=4, kv_heads=2, head_dim=6, window_pattern=[None, 5, None]),
    }
    plain, blocks = pairs(attentions.get(kind, GQA), **forms.get(kind, {}))
    again = decoder(attentions.get(kind, GQA), blocks=True, **forms.get(kind, {}))
    assert_alike(plain, blocks, steps=2)
    for step in range(2):
        (loss, gradients), (same, repeated) = trained(blocks, step), trained(again, step)
        assert loss == same and all(torch.equal(gradients[name], repeated[name]) for name in gradients)


def test_windows_of_a_layer_reach_the_operator(traced):
    windowed = GqaConfig(heads=4, kv_heads=2, head_dim=6, windows=5)
    assert_alike(*pairs(windowed), steps=1)
    assert trained(decoder(windowed, blocks=True), 0)[0] != trained(decoder(GQA, blocks=True), 0)[0]


def test_the_context_of_the_caller_is_not_changed(traced):
    """All layers share one context, and validation between steps reads its documents."""
    blocks = decoder(GQA, blocks=True)
    tokens, segments = micro_batch(0)
    context = blocks._contexts.of(tokens, segments, dtype=torch.float32).at(0)
    documents = replace(context).documents
    blocks.blocks[0](torch.zeros(B, S, 20, requires_grad=True), context)
    assert context.documents is documents and isinstance(documents, Documents)
