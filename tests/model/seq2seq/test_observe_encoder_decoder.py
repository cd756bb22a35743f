"""Observing an encoder-decoder changes nothing, shows each of its attentions, and switches single heads off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headway.kernels.visible import Visible, visible_core
from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.attention.sqa import SqaConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.base import AttentionConfig
from headway.model.config import ModelConfig
from headway.model.measure.observe import Off, observed
from headway.model.seq2seq.model import EncoderDecoder

VOCAB, SOURCE, TARGET = 40, 9, 7
MECHANISMS: dict[str, AttentionConfig] = {
    "mha": MhaConfig(heads=4, head_dim=6, biases=True),
    "gqa": GqaConfig(heads=4, kv_heads=2, head_dim=6, gate="headwise"),
    "uneven": GqaConfig(heads=4, kv_heads=2, head_dim=6, group_sizes=[1, 3]),
    "sqa": SqaConfig(heads=8, kv_heads=2, kept=2, head_dim=6),
    "wgqa": WgqaConfig(heads=4, kv_heads=2, head_dim=6, weights="column", start="random"),
}
SOURCE_SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0, 2]])
SEGMENTS = torch.tensor(
    [[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 2]]
)  # the last of row 0 and 1 of row 1 see no source
ORDER = ["encoder", "encoder", "encoder", "self", "cross", "self", "cross"]


def built(attention: AttentionConfig, positions: str) -> EncoderDecoder:
    shape: dict[str, Any] = {"width": 20, "layers": 2, "encoder_layers": 3, "ffn_width": 24, "init_std": 0.4}
    config = ModelConfig.model_validate({"type": "encoder_decoder", "positions": positions, **shape})
    return EncoderDecoder(config, attention, vocab_size=VOCAB, seed=1).double().eval()


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return torch.randint(VOCAB, (2, SOURCE)), torch.randint(VOCAB, (2, TARGET))


def written_out(q: Tensor, k: Tensor, visible: Visible) -> Tensor:
    """Attention [B, H, S, K], in plain products."""
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scale = q.shape[-1] ** -0.5 if visible.scale is None else visible.scale
    scores = torch.einsum("bshd,bthd->bhst", q, keys) * scale
    if visible.mask is not None and visible.mask.dtype == torch.bool:
        scores = scores.masked_fill(~visible.mask, float("-inf"))
    elif visible.mask is not None:
        scores = scores + visible.mask
    found = scores.softmax(-1)
    return found if visible.blind is None else found.masked_fill(visible.blind.transpose(1, 2), 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("positions", ["rope", "relative_t5", "none"])
@pytest.mark.parametrize("name", MECHANISMS)
@torch.no_grad()
def test_maps_are_the_attention_of_each_core_and_the_pass_is_the_same(
    name: str, positions: str, packed: bool, pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(MECHANISMS[name], positions)
    calls: list[Tensor] = []
    source_segments, segments = (SOURCE_SEGMENTS, SEGMENTS) if packed else (None, None)
    plain = model.logits(*pair, source_segments, segments)

    def spy(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        if v.shape[-1] == q.shape[-1]:  # not the unit vectors of the keys
            calls.append(written_out(q, k, visible))
        return visible_core(q, k, v, visible)

    monkeypatch.setattr("headway.model.seq2seq.model.visible_core", spy)
    with observed(model, segments) as layers:
        assert torch.equal(model.logits(*pair, source_segments, segments), plain)
    assert len(layers) == len(model.attention_layers()) == len(ORDER)
    with_core = ORDER if positions == "relative_t5" else [kind for kind in ORDER if kind != "self"]
    assert len(calls) == len(with_core)
    for kind, layer in zip(ORDER, layers, strict=True):
        (attention,), (rows,) = layer.maps, layer.rows
        assert layer.heads == 4 and torch.equal(rows, torch.arange(4).expand_as(rows))
        keys = TARGET if kind == "self" else SOURCE
        assert attention.shape == (2, 4, SOURCE if kind == "encoder" else TARGET, keys)
        if kind in with_core:
            torch.testing.assert_close(attention, calls.pop(0), rtol=0, atol=1e-12)
        if kind == "self":
            assert not attention.triu(1).any()
        sums = attention.sum(-1)
        blind = torch.zeros_like(sums, dtype=torch.bool)
        if packed and kind == "cross":
            blind = (SEGMENTS[:, :, None] != SOURCE_SEGMENTS[:, None]).all(-1)[:, None].expand_as(sums)
            assert blind.any()
        torch.testing.assert_close(sums, (~blind).double())


@pytest.mark.parametrize("number", range(len(ORDER)))
@torch.no_grad()
def test_a_head_that_is_off_has_no_columns_of_w_o(number, pair):
    model = built(MECHANISMS["mha"], "relative_t5")
    plain = model.logits(*pair)
    with observed(model, off=Off(number, 2), maps=False):
        without = model.logits(*pair)
    weight = model.attention_layers()[number].get_parameter("w_o")
    weight[:, 12:18] = 0
    torch.testing.assert_close(without, model.logits(*pair), rtol=0, atol=1e-12)
    assert (without - plain).abs().max() > 1e-3


def test_a_map_of_another_dtype_is_fp32(pair):
    model = built(MECHANISMS["gqa"], "relative_t5").bfloat16()
    with torch.no_grad(), observed(model) as layers:
        model.logits(*pair)
    assert {one.dtype for layer in layers for one in layer.maps} == {torch.float32}
