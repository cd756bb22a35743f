"""Small layers in float64, and the decoders around them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from headway.kernels.rope import rope_tables
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.balance import BalanceConfig
from headway.model.base import Attention, AttentionConfig, Context
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.model.init import initialise

WIDTH = 20
VOCAB = 37

MECHANISMS: dict[str, AttentionConfig] = {
    "gqa": GqaConfig(heads=6, kv_heads=2, head_dim=10, qk_norm=True, rope_fraction=0.6),
    "rgqa": RgqaConfig(heads=6, kv_heads=2, head_dim=10, top_k=2),
    "rgqa-k1": RgqaConfig(heads=8, kv_heads=2, head_dim=6, top_k=1, gate="detached_renorm", qk_norm=True),
    "rgqa-always-on": RgqaConfig(
        heads=6, kv_heads=2, head_dim=6, top_k=1, always_on=1, balance=BalanceConfig(loss_free_rate=1e-3)
    ),
    "switchhead": SwitchHeadConfig(kv_heads=2, head_dim=10, experts=3, top_k=2, rope_fraction=0.4),
}


@pytest.fixture(params=list(MECHANISMS))
def mechanism(request: pytest.FixtureRequest) -> AttentionConfig:
    return MECHANISMS[request.param]


@pytest.fixture
def layer() -> Callable[..., Attention]:
    """One layer's attention in float64, with weights large enough that gates and scores matter."""

    def make(config: AttentionConfig, *, seed: int = 1, std: float = 0.4) -> Attention:
        router = getattr(config, "router", None)
        if router is not None and hasattr(router, "init_std"):
            config = config.model_copy(update={"router": router.model_copy(update={"init_std": std})})
        module = config.build(width=WIDTH, layers=1, init_std=std, norm_eps=1e-5)
        initialise(module, seed=seed, prefix="blocks.0.attn.")
        return module.double()

    return make


@pytest.fixture
def decoder() -> Callable[..., Decoder]:
    """Two blocks, float64."""

    def make(config: AttentionConfig, *, seed: int = 1, tied: bool = True, init_std: float = 0.3) -> Decoder:
        model = ModelConfig(width=WIDTH, layers=2, ffn_width=28, tied_embeddings=tied, init_std=init_std)
        return Decoder(model, config, vocab_size=VOCAB, seed=seed).double()

    return make


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 11, WIDTH, dtype=torch.float64)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (3, 11))


@pytest.fixture
def context(tokens: Tensor) -> Callable[..., Context]:
    """`context(config, seq_len=11, mask=None)`: positions 0 .. seq_len - 1."""

    def make(config: AttentionConfig, seq_len: int = 11, mask: Tensor | None = None) -> Context:
        rope = rope_tables(seq_len, config.rotated, config.rope_base, torch.device("cpu"))
        return Context(rope=rope, mask=mask, tokens=tokens[:, :seq_len])

    return make
