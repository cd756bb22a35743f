"""Costs of encoder-decoders: counted parameters, FLOPs and cache against the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headway.model.attention.gqa import GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.seq2seq.model import EncoderDecoder

SOURCE, TARGET, VOCAB, HEADS, HEAD_DIM, ENCODER, LAYERS = 9, 5, 37, 4, 6, 3, 2
MECHANISMS = {
    "mha": MhaConfig(heads=HEADS, head_dim=HEAD_DIM, biases=True),
    "mqa": MqaConfig(heads=HEADS, head_dim=HEAD_DIM),
    "gqa": GqaConfig(heads=HEADS, kv_heads=2, head_dim=HEAD_DIM, gate="elementwise"),
    "uneven": GqaConfig(heads=HEADS, kv_heads=2, head_dim=HEAD_DIM, group_sizes=[1, 3]),
    "wgqa": WgqaConfig(heads=HEADS, kv_heads=2, head_dim=HEAD_DIM, weights="row"),
}
FORMS: dict[str, dict[str, Any]] = {
    "rope": {"positions": "rope", "mlp": "relu", "mlp_biases": True, "norm": "layernorm", "head_bias": True},
    "t5": {"positions": "relative_t5", "mlp": "geglu", "tied_embeddings": False},
}


@pytest.fixture(params=FORMS)
def config(request) -> ModelConfig:
    shape: dict[str, Any] = {"width": 20, "layers": LAYERS, "encoder_layers": ENCODER, "ffn_width": 24}
    return ModelConfig(type="encoder_decoder", **shape, **FORMS[request.param])


@pytest.fixture(params=MECHANISMS)
def attention(request) -> Any:
    return MECHANISMS[request.param]


def cost_of(config, attention):
    return account(
        config, attention, vocab_size=VOCAB, seq_len=SOURCE + TARGET, bytes_per_element=4, encoder_tokens=SOURCE
    )


def test_parameters_are_those_of_the_model(config, attention):
    model = EncoderDecoder(config, attention, vocab_size=VOCAB, seed=1)
    cost = cost_of(config, attention)
    assert cost.num_params == sum(p.numel() for p in model.parameters())
    counted = dict.fromkeys(cost.params_by_part, 0)
    parts = {"attn": "attention", "attn_out": "attention", "cross": "cross attention", "cross_out": "cross attention"}
    parts |= {"mlp": "mlp", "mlp_out": "mlp", "embedding": "embedding", "head": "head", "head_bias": "head"}
    parts |= {"encoder_buckets": "attention", "decoder_buckets": "attention"}
    for name, p in model.named_parameters():
        words = name.split(".")
        counted[parts.get(words[2] if words[0] in ("encoder", "blocks") else words[0], "norm")] += p.numel()
    assert counted == cost.params_by_part


def test_executed_flops_are_those_that_torch_counts(config, attention):
    """Torch counts the causal core of rotary positions as a full square; Headway counts the causal half."""
    model = EncoderDecoder(config, attention, vocab_size=VOCAB, seed=1).eval()
    source, target = torch.randint(VOCAB, (2, SOURCE)), torch.randint(VOCAB, (2, TARGET))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(source, target)
    counted = counter.get_total_flops() / 2
    if config.positions == "rope":
        counted -= LAYERS * 4 * HEAD_DIM * HEADS * TARGET * (TARGET - (TARGET + 1) / 2)
    cost = cost_of(config, attention)
    assert cost.flops_per_token.executed * (SOURCE + TARGET) == pytest.approx(counted, rel=1e-12)
    masked = LAYERS * 4 * HEAD_DIM * HEADS * TARGET * (TARGET - 1) / 2 if config.positions == "relative_t5" else 0
    more = cost.flops_per_token.executed - cost.flops_per_token.useful
    assert more * (SOURCE + TARGET) == pytest.approx(masked, abs=1e-6)


def test_the_core_is_what_queries_see(config, attention):
    """Encoder: s keys for each of s queries; decoder: (t + 1) / 2 of its own and s of the source for each of t."""
    pairs = ENCODER * SOURCE * SOURCE + LAYERS * (TARGET * (TARGET + 1) / 2 + TARGET * SOURCE)
    core = cost_of(config, attention).attention_core_flops.useful * (SOURCE + TARGET)
    assert core == pytest.approx(4 * HEAD_DIM * HEADS * pairs, rel=1e-12)


def test_the_cache_is_what_decoding_keeps(config, attention):
    model = EncoderDecoder(config, attention, vocab_size=VOCAB, seed=1).eval()
    cache = model.new_cache(torch.randint(VOCAB, (3, SOURCE)))
    for piece in torch.randint(VOCAB, (3, TARGET)).split((2, 1, 2), 1):
        model.next_logits(piece, cache)
    bytes_held = cost_of(config, attention).kv_bytes_per_token * (SOURCE + TARGET) * 3
    assert cache.numbers * 4 == pytest.approx(bytes_held, rel=1e-12)
