"""Small decoders and what their conversions must equal."""

from __future__ import annotations

from typing import Any

import torch

from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.config import ModelConfig
from headway.model.convert.decoder import (
    convert_decoder,
)

HEADS, D = 6, 10
MODEL = ModelConfig(width=20, layers=2, ffn_width=28, init_std=0.3)  # the decoder of tests/model/conftest.py
SHAPE: dict[str, Any] = {"heads": HEADS, "head_dim": D, "rope_fraction": 0.6}
ONE = {"rtol": 0, "atol": 1e-11}


def mha(**fields):
    return MhaConfig(**SHAPE, **fields)


def gqa(groups, **fields):
    return GqaConfig(**SHAPE, kv_heads=groups, **fields)


def converted(decoder, config, target, **options):
    source = decoder(config).eval()
    with torch.no_grad():  # biases and gates that are not their start
        for tensor in source.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    return source, convert_decoder(source, MODEL, target, **options)


def same(a, b, tokens):
    with torch.no_grad():
        torch.testing.assert_close(a.logits(tokens), b.logits(tokens), **ONE)


def differ(a, b, tokens):
    with torch.no_grad():
        assert (a.logits(tokens) - b.logits(tokens)).abs().max() > 1e-3
