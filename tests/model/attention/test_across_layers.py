"""Value residuals and keys and values shared by layers: the equations, their relatives, and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_chains import (
    DENSE,
    FORMS,
    GROUPED,
    MODEL,
    SEGMENTS,
    SEQ,
    VOCAB,
    assert_alike,
    each_dense,
    each_form,
    gradients,
    made,
    plain,
    tokens,
)
from torch import Tensor

from headway.kernels.attention import core
from headway.kernels.rope import apply_rope, rope_tables
from headway.model.attention.gqa import DenseAttention, GqaConfig
from headway.model.base import AttentionSection, SequenceRanks
from headway.model.cost import layer_configs
from headway.model.decoder import Block, Decoder
from headway.model.measure.diversity import measured
from headway.model.measure.observe import Off, observed
from headway.parallel.engine import parameter_groups

# ---------------------------------------------------------------- the equations


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def written_out(decoder: Decoder, config: GqaConfig, ids: Tensor, segments: Tensor | None) -> Tensor:
    """Logits of the whole decoder, head by head, with the parameters of `decoder` by name."""
    p = dict(decoder.named_parameters())
    rope = rope_tables(SEQ, config.rotated, config.rope_base, ids.device)
    place = torch.arange(SEQ)
    x = p["embedding"][ids]
    first: Tensor | None = None
    keys, values = x, x
    for i in range(MODEL.layers):
        a = f"blocks.{i}.attn."
        h = normed(x, p[f"blocks.{i}.attn_norm.gain"])

        def heads(of: str, h: Tensor = h, a: str = a) -> Tensor:
            return F.linear(h, p[f"{a}w_{of}"], p.get(f"{a}b_{of}")).unflatten(-1, (-1, config.head_dim))

        q = heads("q")
        q = apply_rope(normed(q, p[f"{a}q_rope.norm.gain"]) if config.qk_norm else q, rope)
        if i % config.share_kv == 0:
            keys, values = heads("k"), heads("v")
            keys = apply_rope(normed(keys, p[f"{a}k_rope.norm.gain"]) if config.qk_norm else keys, rope)
            if config.value_residual != "none":
                if first is None:
                    first = values
                elif config.value_residual == "fixed":
                    values = (first + values) / 2
                else:
                    values = p[f"{a}mix_first"] * first + p[f"{a}mix_own"] * values
        outputs = []
        for group, (size, window) in enumerate(zip(config.sizes, config.group_windows, strict=True)):
            seen = place[:, None] >= place
            seen = seen & (place[:, None] - place < (window or SEQ))
            if segments is not None:
                seen = seen & (segments[:, :, None] == segments[:, None, :])
            for member in range(size):
                head = sum(config.sizes[:group]) + member
                scores = q[:, :, head] @ keys[:, :, group].transpose(1, 2) / config.head_dim**0.5
                outputs.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values[:, :, group])
        o = torch.stack(outputs, 2)
        if config.gate != "none":
            o = o * torch.sigmoid(F.linear(h, p[f"{a}w_gate"])).unflatten(-1, (o.shape[2], -1))
        x = x + F.linear(o.flatten(2), p[f"{a}w_o"], p.get(f"blocks.{i}.attn_out.bias"))
        m = normed(x, p[f"blocks.{i}.mlp_norm.gain"])
        inner = F.silu(m @ p[f"blocks.{i}.mlp.w_gate"].T) * (m @ p[f"blocks.{i}.mlp.w_up"].T)
        x = x + inner @ p[f"blocks.{i}.mlp.w_down"].T
    return normed(x, p["norm.gain"]) @ p["embedding"].T


@each_dense
@pytest.mark.parametrize("packed", [False, True])
def test_the_model_computes_the_equations_and_their_gradients(config: GqaConfig, packed: bool) -> None:
    decoder, segments = made(config), SEGMENTS if packed else None
    ours, theirs = decoder.logits(tokens(), segments), written_out(decoder, config, tokens(), segments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert_alike(gradients(decoder, ours), gradients(decoder, theirs))


def test_layers_of_other_kinds_between_them_do_not_change_who_takes_from_whom() -> None:
    """local, far, local, local, far: local layers 0 and 2 share, 3 has its own; far layer 4 mixes that of layer 1."""
    each = layer_configs(MODEL, FORMS["mixed"], vocab_size=VOCAB)
    assert [one.takes_from for one in each] == [None, None, 0, None, 1]
    decoder = made(FORMS["mixed"])
    taken: list[tuple[Tensor, ...]] = []
    handed: list[tuple[Tensor, ...]] = []
    for block in decoder.blocks:
        block.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[1].handed))
        block.register_forward_hook(lambda _, inputs, out: handed.append(out.handed))
    decoder.logits(tokens())
    assert [len(one) for one in handed] == [2, 1, 0, 2, 0] and [len(one) for one in taken] == [0, 0, 2, 0, 1]
    assert all(a is b for a, b in zip(taken[2], handed[0], strict=True)) and taken[4][0] is handed[1][0]
    names = {name for name, _ in decoder.named_parameters()}
    assert "blocks.2.attn.w_k" not in names and {"blocks.3.attn.w_k", "blocks.4.attn.mix_own"} <= names


# ---------------------------------------------------------------- relatives


@pytest.mark.parametrize("name", [name for name in DENSE if name.startswith("learned")])
def test_a_value_residual_of_0_and_1_is_plain_attention(name: str) -> None:
    decoder, other = made(DENSE[name]), made(plain(DENSE[name]))
    with torch.no_grad():
        for i, layer in enumerate(decoder.attention_layers()):
            assert isinstance(layer, DenseAttention) and (layer.mix_first is None) == (i == 0)
            if layer.mix_first is not None and layer.mix_own is not None:
                layer.mix_first.fill_(0.0)
                layer.mix_own.fill_(1.0)
    other.load_state_dict({name: t for name, t in decoder.state_dict().items() if ".mix_" not in name})
    logits, wanted = decoder.logits(tokens(), SEGMENTS), other.logits(tokens(), SEGMENTS)
    assert torch.equal(logits, wanted)
    ours = {name: grad for name, grad in gradients(decoder, logits).items() if ".mix_" not in name}
    assert_alike(ours, gradients(other, wanted), tol=1e-13)


def test_learned_numbers_start_as_the_fixed_ones() -> None:
    kwargs: dict[str, Any] = {"vocab_size": VOCAB, "seed": 1}
    learned = Decoder(MODEL, GqaConfig(**GROUPED, value_residual="learned"), **kwargs).double()
    fixed = Decoder(MODEL, GqaConfig(**GROUPED, value_residual="fixed"), **kwargs).double()
    torch.testing.assert_close(learned.logits(tokens()), fixed.logits(tokens()), rtol=0, atol=1e-13)
    assert sum(p.numel() for p in learned.parameters()) == sum(p.numel() for p in fixed.parameters()) + 2 * 4
    matrices, vectors = parameter_groups(learned, 0.1)
    mixing = {id(p) for name, p in learned.named_parameters() if ".mix_" in name}
    assert len(mixing) == 8 and mixing <= {id(p) for p in vectors["params"]} and vectors["weight_decay"] == 0
    assert not mixing & {id(p) for p in matrices["params"]}


def test_parameters_of_equal_name_start_equal() -> None:
    kwargs: dict[str, Any] = {"vocab_size": VOCAB, "seed": 1}
    for config in DENSE.values():
        ours = dict(Decoder(MODEL, config, **kwargs).named_parameters())
        theirs = dict(Decoder(MODEL, plain(config), **kwargs).named_parameters())
        added = ours.keys() - theirs.keys()
        assert all(".mix_" in name for name in added)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() - added)


def test_without_the_options_a_layer_is_the_config_itself() -> None:
    config = GqaConfig(**GROUPED, value_residual="none", share_kv=1)
    assert config.layer(3, 5) is config and config == GqaConfig(**GROUPED) and config.takes_from is None


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("share_kv", [2, 3, 5])
def test_shared_keys_and_values_are_plain_attention_where_layers_see_the_same_input(
    share_kv: int, relative: bool
) -> None:
    """Blocks but the last of a group add nothing, so their layers have one input; plain layers get one W_K and W_V."""
    model = MODEL.model_copy(update={"positions": "relative_xl" if relative else "rope"})
    config = GqaConfig(**GROUPED, share_kv=share_kv, qk_norm=True, rope_fraction=0.0 if relative else 1.0)
    decoder, other = made(config, model=model), made(plain(config), model=model)
    with torch.no_grad():
        for i, block in enumerate(decoder.blocks):
            assert isinstance(block, Block)
            block.attn_norm.gain.copy_(torch.linspace(0.5, 1.5, MODEL.width))
            if (i + 1) % share_kv:
                block.attn.get_parameter("w_o").zero_()
                block.mlp.w_down.zero_()
    state = decoder.state_dict()
    for i in range(MODEL.layers):
        for name in ("w_k", "w_v", "k_rope.norm.gain"):
            state[f"blocks.{i}.attn.{name}"] = state[f"blocks.{i - i % share_kv}.attn.{name}"]
    other.load_state_dict(state)
    wanted = other.logits(tokens(), SEGMENTS)
    torch.testing.assert_close(decoder.logits(tokens(), SEGMENTS), wanted, rtol=0, atol=1e-12)
    with torch.no_grad():  # the readers' inputs differ, and so do the models
        for each in (decoder, other):
            each.blocks[0].get_parameter("mlp.w_down").normal_(generator=torch.Generator().manual_seed(1))
    assert (decoder.logits(tokens(), SEGMENTS) - other.logits(tokens(), SEGMENTS)).abs().max() > 1e-3


# ---------------------------------------------------------------- tokens, documents, decoding


@each_form
def test_a_token_changes_no_earlier_one_and_no_other_document(config: AttentionSection) -> None:
    decoder, ids = made(config).eval(), tokens()
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 1) % VOCAB
    before, after = decoder.logits(ids), decoder.logits(other)
    assert torch.equal(before[:, :6], after[:, :6]) and (before[:, 6:10] != after[:, 6:10]).any(-1).all()
    before, after = decoder.logits(ids, SEGMENTS), decoder.logits(other, SEGMENTS)
    assert torch.equal(before[:, 9:], after[:, 9:]) and not torch.equal(before[:, 7:9], after[:, 7:9])


@each_form
def test_a_packed_document_equals_the_document_alone(config: AttentionSection) -> None:
    decoder = made(config)
    packed = decoder.logits(tokens(), SEGMENTS)[:, 4:9]
    # Rotary tables are fp32: shifting the positions moves scores by about 1e-7.
    torch.testing.assert_close(packed, decoder.logits(tokens()[:, 4:9]), rtol=0, atol=1e-5)


@each_form
@pytest.mark.parametrize("chunks", [(5, 6), (4, 5, 1, 1), (1,) * SEQ])
def test_decoding_equals_the_full_pass(config: AttentionSection, chunks: Sequence[int]) -> None:
    decoder = made(config).eval()
    cache = decoder.new_cache()
    parts = [decoder.logits(part, cache=cache) for part in tokens().split(list(chunks), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), decoder.logits(tokens()), rtol=0, atol=1e-12)


def test_relative_positions_decode_too() -> None:
    model = MODEL.model_copy(update={"positions": "relative_xl"})
    options: list[dict[str, Any]] = [{"share_kv": 2}, {"value_residual": "learned"}]
    for option in options:
        decoder = made(GqaConfig(**GROUPED, rope_fraction=0.0, **option), model=model).eval()
        cache = decoder.new_cache()
        parts = [decoder.logits(part, cache=cache) for part in tokens().split([4, 6, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), decoder.logits(tokens()), rtol=0, atol=1e-12)


def test_rows_of_a_cache_can_be_chosen_and_repeated() -> None:
    decoder = made(DENSE["shared, windows"]).eval()
    ids, rows = tokens(), torch.tensor([2, 0])
    cache = decoder.new_cache()
    decoder.logits(ids[:, :7], cache=cache)
    one = decoder.new_cache()
    decoder.logits(ids[:1, :7], cache=one)
    cache.select(rows)
    found = decoder.logits(ids[rows, 7:], cache=cache)
    torch.testing.assert_close(found, decoder.logits(ids[rows])[:, 7:], rtol=0, atol=1e-12)
    several = one.repeated(2, 4)
    torch.testing.assert_close(decoder.logits(ids[rows, 7:], cache=several)[1], found[1], rtol=0, atol=1e-12)


# ---------------------------------------------------------------- observation


@each_form
@torch.no_grad()
def test_heads_are_observed_switched_off_and_compared_as_in_plain_attention(config: AttentionSection) -> None:
    decoder, ids = made(config).eval(), tokens()
    plain = decoder.logits(ids, SEGMENTS)
    with observed(decoder, SEGMENTS) as layers:
        assert torch.equal(decoder.logits(ids, SEGMENTS), plain)
    for layer in layers:
        assert all(torch.allclose(one.sum(-1), torch.ones((), dtype=one.dtype)) for one in layer.maps) and layer.maps
    with observed(decoder, SEGMENTS, maps=False, off=Off(MODEL.layers - 1, 0)):
        off = decoder.logits(ids, SEGMENTS)

    calls: list[Tensor] = []

    def spy(*args: Any, **options: Any) -> Tensor:
        calls.append(core(*args, **options))
        return calls[-1]

    decoder._contexts._sequence = SequenceRanks(attend=spy)
    decoder.logits(ids, SEGMENTS)
    once, modules = list(calls), decoder.attention_layers()
    calls.clear()
    with measured(dict(enumerate(modules))) as found:
        assert torch.equal(decoder.logits(ids, SEGMENTS), plain)
    expected: list[Tensor] = []
    for index, layer in enumerate(layers):  # a pool attends to what the layer attends to
        own = [once.pop(0) for _ in layer.rows]
        expected += own * (1 + (index in found))
    assert not once and all(torch.equal(a, b) for a, b in zip(calls, expected, strict=True))

    last = layer_configs(MODEL, config, vocab_size=VOCAB)[-1]
    modules[-1].get_parameter("w_o")[:, : last.head_dim] = 0
    torch.testing.assert_close(decoder.logits(ids, SEGMENTS), off, rtol=0, atol=1e-12)
    assert not torch.allclose(off, plain)
