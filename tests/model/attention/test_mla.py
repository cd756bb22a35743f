"""Latent attention: the equation, its absorbed form, the cache, its relatives, and the published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llamas import transformers
from pydantic import ValidationError
from torch import Tensor

from headway.kernels.documents import Documents
from headway.kernels.rope import apply_rope, rope_tables
from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.attention.mla import LatentAttention, MlaConfig
from headway.model.base import Context
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.decoder import Decoder
from headway.model.kv_cache import KVCache

WIDTH, SEQ, BATCH = 20, 11, 2
FORMS = {
    "mla": MlaConfig(heads=4, head_dim=6, latent=8, rope_dim=4),
    "low-rank queries": MlaConfig(heads=4, head_dim=6, latent=8, query_latent=10, rope_dim=4),
    "gla": MlaConfig(heads=6, head_dim=5, latent=7, latents=3, rope_dim=2),
    "no positions": MlaConfig(heads=3, head_dim=6, latent=9, rope_dim=0),
    "no norm": MlaConfig(heads=4, head_dim=6, latent=8, latents=2, rope_dim=4, latent_norm=False),
}
each_form = pytest.mark.parametrize("config", FORMS.values(), ids=list(FORMS))


def made(config: MlaConfig) -> LatentAttention:
    module = config.build(width=WIDTH, layers=2, init_std=0.3, norm_eps=1e-5)
    assert isinstance(module, LatentAttention)
    generator = torch.Generator().manual_seed(5)
    for p in module.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.4, generator=generator)
    return module.double()


def inputs(config: MlaConfig, *, packed: bool = False) -> tuple[Tensor, Context]:
    x = torch.randn(BATCH, SEQ, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    segments = torch.zeros(BATCH, SEQ, dtype=torch.int32)
    segments[0, 4:], segments[1, 9:] = 1, 1
    documents = Documents.of(segments) if packed else None
    return x, Context(rope=rope_tables(SEQ, config.rotated, config.rope_base, x.device), documents=documents)


def normed(x: Tensor, module: torch.nn.Module | None) -> Tensor:
    if module is None:
        return x
    (gain,) = module.parameters()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def by_the_equation(module: LatentAttention, config: MlaConfig, x: Tensor, visible: Tensor) -> Tensor:
    """Head by head, with keys and values written out. visible [B, S, S]."""
    rope = rope_tables(SEQ, config.rotated, config.rope_base, x.device)
    size, rotated, rank = config.head_dim, config.rope_dim, config.latent
    low = x if config.query_latent is None else normed(x @ module.w_dq.T, module.query_norm)
    w_q = module.w_q if config.query_latent is None else module.w_uq
    key = None if module.w_kr is None else apply_rope((x @ module.w_kr.T).unsqueeze(2), rope).squeeze(2)
    heads = []
    for h in range(config.heads):
        latent = h // (config.heads // config.latents)
        c = normed(x @ module.w_dkv[latent * rank : (latent + 1) * rank].T, module.latent_norm)
        q = low @ w_q[h * (size + rotated) : (h + 1) * (size + rotated)].T
        rows = slice(h * size, (h + 1) * size)
        scores = q[..., :size] @ (c @ module.w_uk[rows].T).transpose(1, 2)
        if key is not None:
            scores = scores + apply_rope(q[..., size:].unsqueeze(2), rope).squeeze(2) @ key.transpose(1, 2)
        weights = (scores / (size + rotated) ** 0.5).masked_fill(~visible, float("-inf")).softmax(-1)
        heads.append(weights @ (c @ module.w_uv[rows].T))
    return torch.cat(heads, -1) @ module.w_o.T


@each_form
@pytest.mark.parametrize("packed", [False, True])
def test_the_module_computes_the_equation(config: MlaConfig, packed: bool) -> None:
    module, (x, context) = made(config), inputs(config, packed=packed)
    visible = torch.ones(SEQ, SEQ, dtype=torch.bool).tril().expand(BATCH, SEQ, SEQ).clone()
    if packed:
        visible[0, 4:, :4] = visible[1, 9:, :9] = False
    assert torch.allclose(module(x, context).y, by_the_equation(module, config, x, visible), atol=1e-12)


@each_form
def test_the_absorbed_form_is_the_same_function(config: MlaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and all gradients, for prompts and single tokens."""
    module = made(config)
    found = []
    for absorbed in (False, True):
        monkeypatch.setattr(LatentAttention, "cheaper_absorbed", lambda self, q, k, absorbed=absorbed: absorbed)
        module.zero_grad()
        x, context = inputs(config)
        x.requires_grad_(True)
        y = module(x, Context(rope=context.rope, cache=KVCache())).y
        y.square().sum().backward()
        grads = [p.grad for p in module.parameters()]
        found.append([y, x.grad, *grads])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and torch.allclose(a, b, atol=1e-11)


@each_form
def test_decoding_reads_the_cache_and_gives_the_whole_pass(config: MlaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(width=WIDTH, layers=2, ffn_width=16, init_std=0.4)
    decoder = Decoder(model, config, vocab_size=30, seed=2).double().eval()
    tokens = torch.randint(0, 30, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    absorbed: list[int] = []  # queries of each absorbed pass of a layer
    plain = LatentAttention.attend_absorbed
    monkeypatch.setattr(
        LatentAttention, "attend_absorbed", lambda *given: absorbed.append(given[1].shape[1]) or plain(*given)
    )
    with torch.no_grad():
        cache = decoder.new_cache(SEQ)
        parts = [decoder.logits(tokens[:, :3], cache=cache)]
        parts += [decoder.logits(tokens[:, i : i + 1], cache=cache) for i in range(3, SEQ)]
        assert torch.allclose(torch.cat(parts, 1), decoder.logits(tokens), atol=1e-12)
    assert absorbed.count(1) >= 2 * (SEQ - 5)  # in two layers; with few keys the other form is cheaper
    assert cache.numbers == BATCH * SEQ * 2 * config.cached
    cost = account(model, config, vocab_size=30, seq_len=SEQ, bytes_per_element=8)
    assert cost.kv_bytes_per_token == 2 * 8 * (config.latents * config.latent + config.rope_dim)


def test_single_tokens_are_absorbed_and_prompts_are_not() -> None:
    module = made(MlaConfig(heads=4, head_dim=16, latent=48, rope_dim=8))
    assert module.cheaper_absorbed(1, 100) and not module.cheaper_absorbed(100, 100)


def test_without_compression_norm_and_positions_it_is_mha() -> None:
    """The latent is x: W_UK and W_UV are then the matrices of keys and values."""
    heads, size = 5, 4
    mla = made(MlaConfig(heads=heads, head_dim=size, latent=WIDTH, rope_dim=0, latent_norm=False))
    mha = MhaConfig(heads=heads, head_dim=size, rope_fraction=0.0).build(
        width=WIDTH, layers=2, init_std=0.3, norm_eps=1e-5
    )
    mha = mha.double()
    with torch.no_grad():
        mla.w_dkv.copy_(torch.eye(WIDTH))
        for ours, theirs in (("w_q", "w_q"), ("w_k", "w_uk"), ("w_v", "w_uv"), ("w_o", "w_o")):
            mha.get_parameter(ours).copy_(mla.get_parameter(theirs))
    x, context = inputs(FORMS["no positions"])
    assert torch.allclose(mla(x, context).y, mha(x, context).y, atol=1e-12)


def test_a_latent_as_wide_as_a_group_is_gqa_without_positions() -> None:
    """GLA whose W_UK and W_UV are identities on halves of the latent: keys and values of a KV head."""
    groups, members, size = 2, 3, 5
    gla = made(
        MlaConfig(heads=groups * members, head_dim=size, latent=2 * size, latents=groups, rope_dim=0, latent_norm=False)
    )
    gqa = GqaConfig(heads=groups * members, kv_heads=groups, head_dim=size, rope_fraction=0.0)
    module = gqa.build(width=WIDTH, layers=2, init_std=0.3, norm_eps=1e-5).double()
    eye, zero = torch.eye(size).double(), torch.zeros(size, size).double()
    with torch.no_grad():
        gla.w_uk.copy_(torch.cat([torch.cat([eye, zero], 1)] * groups * members))
        gla.w_uv.copy_(torch.cat([torch.cat([zero, eye], 1)] * groups * members))
        both = gla.w_dkv.unflatten(0, (groups, 2, size))
        module.get_parameter("w_k").copy_(both[:, 0].flatten(0, 1))
        module.get_parameter("w_v").copy_(both[:, 1].flatten(0, 1))
        for name in ("w_q", "w_o"):
            module.get_parameter(name).copy_(gla.get_parameter(name))
    x, context = inputs(FORMS["no positions"])
    assert torch.allclose(gla(x, context).y, module(x, context).y, atol=1e-12)


def test_published_sizes_of_deepseek_v2() -> None:
    """arXiv 2405.04434, sections 2.1.4 and 3.1.2: d 5120, 128 heads, the cache of GQA with 2.25 groups."""
    config = MlaConfig(heads=128, head_dim=128, latent=512, query_latent=1536, rope_dim=64)
    assert config.kv_bytes_per_token(seq_len=1, bytes_per_element=1) == 4.5 * 128 == 2.25 * 2 * 128
    named = {"W_DQ": 5120 * 1536, "W_UQ, W_QR": 1536 * 128 * (128 + 64), "W_DKV, W_KR": 5120 * (512 + 64)}
    named |= {"W_UK, W_UV": 2 * 512 * 128 * 128, "W_O": 128 * 128 * 5120, "norms": 512 + 1536}
    assert config.num_params(width=5120) == sum(named.values())


def test_transformers_attention_of_deepseek_v3_gives_the_same_outputs() -> None:
    """Its rotated channels are pairs (2i, 2i + 1), ours halves; rows of the matrices are moved accordingly."""
    transformers()
    from transformers.models.deepseek_v3 import configuration_deepseek_v3 as configuration
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    size, rotated, rank, low, heads = 6, 4, 8, 10, 4
    theirs_config = configuration.DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_lora_rank=rank,
        q_lora_rank=low,
        qk_rope_head_dim=rotated,
        v_head_dim=size,
        qk_nope_head_dim=size,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    theirs_config._attn_implementation = "eager"
    theirs = deepseek.DeepseekV3Attention(theirs_config, 0).double().eval()
    theirs.q_a_layernorm.variance_epsilon = theirs.kv_a_layernorm.variance_epsilon = 1e-5
    config = FORMS["low-rank queries"]
    ours = made(config)
    halves = [*range(0, rotated, 2), *range(1, rotated, 2)]  # our row -> theirs
    with torch.no_grad():
        ours.w_dq.copy_(theirs.q_a_proj.weight)
        queries = theirs.q_b_proj.weight.unflatten(0, (heads, size + rotated))
        order = [*range(size), *(size + i for i in halves)]
        ours.w_uq.copy_(queries[:, order].flatten(0, 1))
        down = theirs.kv_a_proj_with_mqa.weight
        assert ours.w_kr is not None
        ours.w_dkv.copy_(down[:rank])
        ours.w_kr.copy_(down[rank:][halves])
        up = theirs.kv_b_proj.weight.unflatten(0, (heads, 2 * size))
        ours.w_uk.copy_(up[:, :size].flatten(0, 1))
        ours.w_uv.copy_(up[:, size:].flatten(0, 1))
        ours.w_o.copy_(theirs.o_proj.weight)
        for mine, other in ((ours.query_norm, theirs.q_a_layernorm), (ours.latent_norm, theirs.kv_a_layernorm)):
            assert mine is not None
            next(mine.parameters()).copy_(other.weight)
        x, context = inputs(config)
        embedding = deepseek.DeepseekV3RotaryEmbedding(theirs_config)
        mask = torch.full((SEQ, SEQ), float("-inf"), dtype=torch.float64).triu(1)[None, None]
        positions = torch.arange(SEQ)[None]
        found = theirs(x, position_embeddings=embedding(x, positions), attention_mask=mask)[0]
        assert (found - ours(x, context).y).abs().max() < 1e-6  # their tables are fp32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": 3}, r"latents: 4 heads do not divide among 3 latents; use latents 2 or 4, or heads 6"),
        ({"rope_fraction": 0.5}, r"rope_fraction: 0.5, but mla rotates channels of their own; leave rope_fraction out"),
        ({"qk_norm": True}, r"qk_norm: mla normalizes the latents instead .* use qk_norm false"),
        ({"rope_dim": 3}, r"rope_dim"),
    ],
)
def test_what_it_has_no_form_for_is_refused(change: dict[str, Any], message: str) -> None:
    legal = {"type": "mla", "heads": 4, "head_dim": 6, "latent": 8, "rope_dim": 4}
    assert MlaConfig.model_validate(legal).shards()["w_uk"].units == 4
    with pytest.raises(ValidationError, match=message):
        MlaConfig.model_validate(legal | change)
