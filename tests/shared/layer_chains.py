"""Decoders whose layers take values, or keys and values, from earlier layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headway.model.attention.gqa import GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.sqa import SqaConfig
from headway.model.base import AttentionSection
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder, Placement, Recompute
from headway.model.mixed import MixedConfig

MODEL = ModelConfig(width=20, layers=5, ffn_width=28, init_std=0.3)
VOCAB, BATCH, SEQ = 37, 3, 11
SEGMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2], dtype=torch.int32).expand(BATCH, SEQ)

GROUPED: dict[str, Any] = {"heads": 6, "kv_heads": 2, "head_dim": 6}
UNEVEN: dict[str, Any] = {"heads": 12, "kv_heads": 4, "head_dim": 6, "group_sizes": [1, 5, 1, 5]}
DENSE: dict[str, GqaConfig] = {
    "fixed": GqaConfig(**GROUPED, value_residual="fixed", qk_norm=True),
    "learned": GqaConfig(**GROUPED, value_residual="learned", biases=True),
    "learned, windows": GqaConfig(**GROUPED, value_residual="learned", windows=[None, 4], gate="headwise"),
    "learned, uneven": GqaConfig(**UNEVEN, value_residual="learned", windows=[3, None, 3, None]),
    "shared": GqaConfig(**GROUPED, share_kv=2, qk_norm=True),
    "shared by 3": GqaConfig(**GROUPED, share_kv=3, biases=True, gate="elementwise"),
    "shared by all": GqaConfig(**GROUPED, share_kv=5, windows=4),
    "shared, windows": GqaConfig(**GROUPED, share_kv=2, windows=[None, 4], biases=True, qk_norm=True),
    "shared, uneven": GqaConfig(**UNEVEN, share_kv=2, windows=[3, None, 3, None]),
}
LOCAL = GqaConfig(**GROUPED, share_kv=2, windows=4)
FAR = GqaConfig(heads=4, kv_heads=2, head_dim=8, value_residual="learned", rope_base=300.0)
FORMS: dict[str, AttentionSection] = {
    **DENSE,
    "mha": MhaConfig(heads=4, head_dim=6, share_kv=2),
    "mqa": MqaConfig(heads=4, head_dim=6, value_residual="learned"),
    "sqa": SqaConfig(heads=8, kv_heads=2, kept=2, head_dim=6, share_kv=2),
    "mixed": MixedConfig(kinds={"local": LOCAL, "far": FAR}, pattern=["local", "far", "local"]),
}
each_dense = pytest.mark.parametrize("config", DENSE.values(), ids=list(DENSE))
each_form = pytest.mark.parametrize("config", FORMS.values(), ids=list(FORMS))


def made(config: AttentionSection, *, recompute: Recompute = "none", model: ModelConfig = MODEL) -> Decoder:
    """In float64, with gains, biases and mixing numbers that are not those of the start."""
    placement = Placement(recompute=recompute)
    decoder = Decoder(model, config, vocab_size=VOCAB, seed=1, placement=placement)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in decoder.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return decoder.double()


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(2))


def gradients(decoder: Decoder, logits: Tensor) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    named = dict(decoder.named_parameters())
    found = torch.autograd.grad((logits * weight).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, tol: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")
        assert wanted.abs().max() > 0, name


def plain(config: AttentionSection) -> AttentionSection:
    if isinstance(config, MixedConfig):
        return config.model_copy(update={"kinds": {name: plain(kind) for name, kind in config.kinds.items()}})
    return config.model_copy(update={"value_residual": "none", "share_kv": 1})
