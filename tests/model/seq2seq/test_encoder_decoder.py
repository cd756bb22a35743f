"""Encoder-decoders: equal to T5, causal where they must be, and blind to padding and to other documents."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headway.kernels.attention import core
from headway.launcher.exchange.hf_check import load_library
from headway.model.attention.dynamic import DynamicGqaConfig
from headway.model.attention.gqa import GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.registry import MECHANISMS
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.base import AttentionConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder, Placement
from headway.model.huggingface import t5
from headway.model.seq2seq.blocks import CrossBlock
from headway.model.seq2seq.model import EncoderDecoder
from headway.model.seq2seq.positions import RelativeBuckets, buckets

VOCAB, SOURCE, TARGET = 40, 9, 7
DENSE: dict[str, AttentionConfig] = {
    "mha": MhaConfig(heads=4, head_dim=6, biases=True),
    "mqa": MqaConfig(heads=4, head_dim=6, gate="headwise"),
    "gqa": GqaConfig(heads=4, kv_heads=2, head_dim=6),
    "uneven": GqaConfig(heads=4, kv_heads=2, head_dim=6, group_sizes=[1, 3]),
    "wgqa": WgqaConfig(heads=4, kv_heads=2, head_dim=6, weights="column", start="random"),
}


def built(attention: AttentionConfig, positions: str = "relative_t5", **model: Any) -> EncoderDecoder:
    shape: dict[str, Any] = {"width": 20, "layers": 2, "encoder_layers": 3, "ffn_width": 24, "init_std": 0.4}
    config = ModelConfig.model_validate({"type": "encoder_decoder", "positions": positions, **shape, **model})
    return EncoderDecoder(config, attention, vocab_size=VOCAB, seed=1).double().eval()


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return torch.randint(VOCAB, (2, SOURCE)), torch.randint(VOCAB, (2, TARGET))


every_dense = pytest.mark.parametrize("attention", DENSE.values(), ids=DENSE)
every_position = pytest.mark.parametrize("positions", ["rope", "relative_t5", "none"])


# ------------------------------------------------------------ T5 of transformers


@pytest.fixture
def exact_library(monkeypatch) -> Any:
    """transformers, whose T5 rounds norms and softmax to fp32: here they stay in float64."""
    library = load_library()
    from transformers.models.t5 import modeling_t5

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    widened = torch.Tensor.float
    monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", norm)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else widened(x))
    return library


def foreign(library: Any, **changes: Any) -> Any:
    shape = {"d_model": 24, "d_kv": 5, "d_ff": 36, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    far = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    config = library.T5Config(vocab_size=VOCAB, architectures=[t5.ARCHITECTURE], **shape, **far, **changes)
    model = library.T5ForConditionalGeneration(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    return model


@pytest.mark.parametrize(
    "changes",
    [{"feed_forward_proj": "relu"}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}],
    ids=["t5", "t5-v1.1"],
)
def test_logits_loss_and_gradients_are_those_of_t5(exact_library, changes):
    theirs = foreign(exact_library, **changes)
    shape = t5.read_t5_config(json.loads(theirs.config.to_json_string()))
    model = EncoderDecoder(shape.model, shape.attention, vocab_size=VOCAB, seed=0).double().eval()
    state = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(t5.ours(name, state[t5.t5_name(name, shape.model)]))
    source, target, labels = (torch.randint(VOCAB, (3, n)) for n in (17, 21, 21))
    labels[1, 10:] = -100
    there = torch.arange(17) < torch.tensor([17, 9, 5])[:, None]
    segments = torch.where(there, 0, -1)
    expected = theirs(input_ids=source, attention_mask=there.long(), decoder_input_ids=target, labels=labels)
    out = model(source, target, labels, segments)
    loss = out.loss_sum / out.targets
    torch.testing.assert_close(model.logits(source, target, segments), expected.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-12, atol=0)
    loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    named = dict(model.named_parameters())
    assert {t5.t5_name(name, shape.model) for name in named} == set(gradients)
    for name, p in named.items():
        torch.testing.assert_close(p.grad, t5.ours(name, gradients[t5.t5_name(name, shape.model)]), rtol=0, atol=1e-12)


def test_buckets_are_those_of_t5():
    load_library()
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-300, 301)
    for both_ways in (True, False):
        for count, largest in ((32, 128), (8, 12), (4, 3)):
            expected = T5Attention._relative_position_bucket(distances, both_ways, count, largest)
            assert buckets(distances, count=count, largest=largest, both_ways=both_ways).equal(expected)


def test_biases_stand_at_their_distances():
    table = RelativeBuckets(3, 3, count=8, largest=12, both_ways=True, init_std=1.0)
    nn.init.normal_(table.weight)
    bias = table(5, 30)  # the queries are at the places 25 .. 29
    for i in range(5):
        for j in range(30):
            bucket = buckets(torch.tensor([j - (25 + i)]), count=8, largest=12, both_ways=True)
            assert bias[:, i, j].equal(table.weight[:, bucket[0]])


# ------------------------------------------------------------ who sees what


@every_position
@every_dense
def test_a_target_sees_no_later_target_and_every_source(attention, positions, pair):
    model, (source, target) = built(attention, positions), pair
    before = model.logits(source, target)
    later = target.clone()
    later[:, 4] = (later[:, 4] + 1) % VOCAB
    after = model.logits(source, later)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=1e-13)
    assert (after[:, 4:] - before[:, 4:]).abs().amax(-1).min() > 1e-6
    for place in (0, SOURCE - 1):
        other = source.clone()
        other[:, place] = (other[:, place] + 1) % VOCAB
        assert (model.logits(other, target) - before).abs().amax(-1).min() > 1e-6


@every_position
@every_dense
def test_padding_of_the_source_changes_nothing(attention, positions, pair):
    model, (source, target) = built(attention, positions), pair
    expected = model.logits(source, target)
    for filler in (0, 7):
        padded = torch.cat([source, torch.full((2, 3), filler)], 1)
        segments = torch.cat([torch.zeros_like(source), torch.full((2, 3), -1)], 1)
        torch.testing.assert_close(model.logits(padded, target, segments), expected, rtol=0, atol=1e-12)


@every_position
@every_dense
def test_packed_pairs_are_those_of_their_own_rows(attention, positions):
    """Also a third document with a target alone, whose cross attention has no keys and adds nothing."""
    model = built(attention, positions)
    sources, targets = [torch.randint(VOCAB, (1, n)) for n in (4, 6)], [torch.randint(VOCAB, (1, n)) for n in (5, 3)]
    packed = [torch.cat(parts, 1) for parts in (sources, [*targets, torch.randint(VOCAB, (1, 2))])]
    numbers = [torch.tensor([[0] * 4 + [1] * 6]), torch.tensor([[0] * 5 + [1] * 3 + [2] * 2])]
    logits = model.logits(*packed, *numbers)
    atol = 1e-5 if positions == "rope" else 1e-12  # tables of RoPE are fp32, and equal distances stand in other rows
    for (source, target), part in zip(zip(sources, targets, strict=True), logits[:, :8].split([5, 3], 1), strict=True):
        torch.testing.assert_close(part, model.logits(source, target), rtol=0, atol=atol)
    crossed: list[Tensor] = []
    hooks = [b.cross.register_forward_hook(lambda *args: crossed.append(args[-1].y)) for b in cross_blocks(model)]
    model(*packed, packed[1], *numbers).loss_sum.backward()
    for hook in hooks:
        hook.remove()
    assert all(y[:, 8:].eq(0).all() and not y[:, :8].eq(0).any() for y in crossed) and len(crossed) == 2
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def cross_blocks(model: EncoderDecoder) -> list[CrossBlock]:
    return [block for block in model.blocks if isinstance(block, CrossBlock)]


# ------------------------------------------------------------ decoding


@every_position
@every_dense
def test_decoding_with_a_cache_is_the_whole_pass(attention, positions, pair):
    model, (source, target) = built(attention, positions), pair
    segments = torch.zeros_like(source)
    segments[1, 6:] = -1
    cache = model.new_cache(source, segments, tokens=TARGET)
    assert cache.numbers == 0
    parts, sizes = [], []
    for piece in target.split([3, 1, 1, 2], 1):
        parts.append(model.next_logits(piece, cache))
        sizes.append(cache.numbers)
    torch.testing.assert_close(torch.cat(parts, 1), model.logits(source, target, segments), rtol=0, atol=1e-12)
    numbers = attention.kv_bytes_per_token(seq_len=1, bytes_per_element=1) * 2 * len(target)  # of a token, two layers
    assert sizes == [numbers * (SOURCE + n) for n in (3, 4, 5, 7)]


def test_the_cache_does_not_project_the_source_again(pair):
    model, (source, target) = built(DENSE["gqa"]), pair
    cache = model.new_cache(source)
    model.next_logits(target[:, :1], cache)
    for block in cross_blocks(model):
        block.cross.get_parameter("w_k").data.fill_(float("nan"))
    assert bool(model.next_logits(target[:, 1:2], cache).isfinite().all())


# ------------------------------------------------------------ the cross attention by hand


def by_hand(layer: Any, name: str, x: Tensor, states: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of x [B, S, 20] to all of `states` [B, K, 20], with a bias [4, S, K]."""
    w: dict[str, Tensor] = {key: layer.get_parameter(key) for key in ("w_q", "w_k", "w_v", "w_o")}
    if name == "wgqa":
        for key in ("k", "v"):
            factor = layer.get_parameter(f"{key}_weights").view(2, 2, 6, 1)
            w[f"w_{key}"] = (w[f"w_{key}"].view(2, 2, 6, 20) * factor).sum(1).view(12, 20)
    outs = []
    for head, kv_head in enumerate([0, 1, 1, 1] if name == "uneven" else [0, 0, 1, 1]):
        rows, group = slice(6 * head, 6 * head + 6), slice(6 * kv_head, 6 * kv_head + 6)
        scores = (x @ w["w_q"][rows].T) @ (states @ w["w_k"][group].T).transpose(1, 2) * scale
        scores = scores if bias is None else scores + bias[head]
        outs.append(scores.softmax(-1) @ (states @ w["w_v"][group].T))
    return torch.cat(outs, -1) @ w["w_o"].T


@pytest.mark.parametrize("positions", ["rope", "relative_t5"])
@pytest.mark.parametrize("name", ["gqa", "uneven", "wgqa"])
def test_cross_attention_is_the_formula(name, positions, pair):
    model, (source, target) = built(DENSE[name], positions), pair
    cross = cross_blocks(model)[1].cross
    inputs: list[Any] = []
    cross.register_forward_hook(lambda _, args, out: inputs.append((args[0], out.y)))
    model.logits(source, target)
    x, y = inputs[0]
    expected = by_hand(cross, name, x, model.encode(source), None, 6**-0.5 if positions == "rope" else 1.0)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gqa", "uneven", "wgqa"])
def test_attention_of_the_encoder_is_the_formula(name, pair):
    model = built(DENSE[name])
    layer = model.get_submodule("encoder.1.attn")
    inputs: list[Any] = []
    layer.register_forward_hook(lambda _, args, out: inputs.append((args[0], out.y)))
    model.encode(pair[0])
    x, y = inputs[0]
    assert model.encoder_buckets is not None
    expected = by_hand(layer, name, x, x, model.encoder_buckets(SOURCE, SOURCE), 1.0)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------ training


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputation_has_the_same_gradients(recompute):
    source, target = torch.randint(VOCAB, (2, SOURCE)), torch.randint(VOCAB, (2, TARGET))
    found = []
    for way in ("none", recompute):
        config = ModelConfig(
            type="encoder_decoder", width=20, layers=2, ffn_width=24, positions="relative_t5", mlp="geglu", dropout=0.2
        )
        model = EncoderDecoder(config, DENSE["gqa"], vocab_size=VOCAB, seed=1, placement=Placement(recompute=way))
        out = model.train()(source, target, target)
        out.loss_sum.backward()
        found.append([out.loss_sum, *(p.grad for p in model.parameters())])
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_dropout_acts_in_both_stacks_and_differs_by_key(pair):
    source, target = pair
    drops = {"dropout": 0.3, "dropout_places": ("embedding", "branches", "hidden", "head")}
    model = built(DENSE["gqa"], **drops).train()
    losses = [
        model(source, target, target, keys=torch.tensor(keys)).loss_sum.item() for keys in ([1, 2], [1, 2], [3, 4])
    ]
    assert losses[0] == losses[1] != losses[2]
    seen: list[Tensor] = []
    for name in ("encoder.0.mlp_norm", "blocks.0.cross_norm", "blocks.0.mlp_norm"):
        model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.append(args[1].eq(0)))
    for name in ("encoder.0.attn_norm", "blocks.0.attn_norm"):  # of the embedding, which is not zero itself
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].eq(0)))
    model(source, source, source, keys=torch.tensor([1, 2]))
    assert all(0.1 < mask.double().mean() < 0.5 for mask in seen)  # 0.3 of 360 elements
    assert len(seen) == 5 and not any(a.equal(b) for a, b in itertools.combinations(seen, 2))


def test_what_a_decoder_has_too_starts_equal():
    shape: dict[str, Any] = {"width": 20, "layers": 2, "ffn_width": 24}
    both = EncoderDecoder(ModelConfig(type="encoder_decoder", **shape), DENSE["gqa"], vocab_size=VOCAB, seed=1)
    alone = Decoder(ModelConfig(**shape), DENSE["gqa"], vocab_size=VOCAB, seed=1).state_dict()
    assert set(alone) < set(both.state_dict())
    assert all(tensor.equal(both.state_dict()[name]) for name, tensor in alone.items())
    biased = EncoderDecoder(
        ModelConfig(type="encoder_decoder", positions="relative_t5", **shape), DENSE["gqa"], vocab_size=VOCAB, seed=1
    )
    for name in ("encoder.0.attn.w_q", "blocks.1.attn.w_q", "blocks.1.cross.w_q"):
        assert biased.get_parameter(name).equal(both.get_parameter(name) * 6**-0.5)


def test_learns_to_read_the_source():
    """The target repeats the source: without cross attention the loss stays at log 12 = 2.48."""
    config = ModelConfig(
        type="encoder_decoder", width=32, layers=1, ffn_width=48, init_std=0.1, positions="relative_t5"
    )
    model = EncoderDecoder(config, GqaConfig(heads=4, kv_heads=2, head_dim=8), vocab_size=12, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = torch.tensor(0.0)
    for _ in range(150):
        source = torch.randint(12, (32, 6))
        out = model(source, torch.cat([torch.zeros(32, 1, dtype=torch.int64), source[:, :-1]], 1), source)
        loss = out.loss_sum / out.targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.2


# ------------------------------------------------------------ what is refused


def test_routed_mechanisms_and_windows_are_refused():
    config = ModelConfig(type="encoder_decoder", width=20, layers=1, ffn_width=24)
    for attention in (
        RgqaConfig(heads=4, kv_heads=2, head_dim=6, top_k=1),
        DynamicGqaConfig(heads=4, kv_heads=2, head_dim=6, freeze_after_tokens=0),
    ):
        with pytest.raises(ValueError, match=rf"^attention\.type: {attention.type} has no encoder-decoder form"):
            EncoderDecoder(config, attention, vocab_size=VOCAB, seed=0)
    for key, value in (("windows", 4), ("window_pattern", [4, None])):
        with pytest.raises(ValueError, match=rf"^attention\.{key}: "):
            attention = MhaConfig.model_validate({"heads": 2, "head_dim": 4, key: value})
            EncoderDecoder(config, attention, vocab_size=VOCAB, seed=0)


def test_the_mechanisms_with_a_form_are_these():
    assert {name for name, kind in MECHANISMS.items() if vars(kind).get("crosses")} == {
        "mha", "mqa", "gqa", "sqa", "wgqa"
    }  # fmt: skip


def test_a_mechanism_that_derives_from_one_must_say_it_itself():
    class Changed(GqaConfig):
        """GQA with another layer."""

    assert "has no encoder-decoder form" in str(Changed(heads=2, kv_heads=1, head_dim=4).no_encoder_decoder)
    assert GqaConfig(heads=2, kv_heads=1, head_dim=4).no_encoder_decoder is None


def refused(**model: Any) -> str:
    with pytest.raises(ValueError) as error:
        ModelConfig(width=20, layers=1, ffn_width=24, **model)
    return str(error.value)


def test_keys_of_the_other_type_are_refused():
    assert "encoder_layers: 2 has no effect with type decoder" in refused(encoder_layers=2)
    assert "scaled_head: True has no effect" in refused(scaled_head=True)
    assert "positions: relative_t5 is for type encoder_decoder" in refused(positions="relative_t5")
    both = {"type": "encoder_decoder"}
    assert "positions: learned has no form" in refused(**both, positions="learned", max_positions=8)
    assert "branch_start: zero is measured for decoders only" in refused(**both, branch_start="zero")
    assert "relative_buckets: 8 has no effect with positions rope" in refused(**both, relative_buckets=8)
    t5_like = {**both, "positions": "relative_t5"}
    assert "relative_max_distance: 16 leaves nothing" in refused(**t5_like, relative_max_distance=16)


def test_the_causal_core_is_not_touched():
    """With rotary positions the decoder's self-attention is the core of decoders, bit for bit."""
    model = built(DENSE["gqa"], "rope").float()
    calls = []
    object.__setattr__(
        model._contexts._sequence, "attend", lambda *args, **kwargs: calls.append(1) or core(*args, **kwargs)
    )
    model.logits(torch.randint(VOCAB, (1, 4)), torch.randint(VOCAB, (1, 5)))
    assert len(calls) == 2  # of two layers; the encoder and cross attention have another core
