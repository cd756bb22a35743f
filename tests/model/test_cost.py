"""Costs of the proposed sizes, against numbers worked out independently from the formulas of each mechanism."""

import pytest
import torch

from headway.model.attention.gqa import GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.config import ModelConfig
from headway.model.cost import account

SIZES = {"82M": (768, 9, 12, 3), "162M": (1024, 12, 16, 4), "250M": (1024, 20, 16, 4), "940M": (2048, 20, 32, 8)}

# size, mechanism, FFN width, attention parameters per layer, all parameters, forward MFLOPs per token at 2048 tokens
ROWS = [
    ("82M", "mha", 1744, 2_359_296, 81_987_840, 192.3),
    ("82M", "mqa", 2208, 1_277_952, 81_877_248, 192.1),
    ("82M", "gqa", 2128, 1_474_560, 81_987_840, 192.3),
    ("82M", "rgqa-k1", 2128, 1_483_776, 82_070_784, 155.3),
    ("82M", "rgqa-k2", 2128, 1_483_776, 82_070_784, 167.7),
    ("82M", "switchhead", 2128, 1_492_992, 82_153_728, 160.8),
    ("162M", "mha", 2144, 4_194_304, 162_161_664, 374.6),
    ("162M", "mqa", 2784, 2_228_224, 162_161_664, 374.6),
    ("162M", "gqa", 2656, 2_621_440, 162_161_664, 374.6),
    ("162M", "rgqa-k1", 2640, 2_637_824, 161_768_448, 298.3),
    ("162M", "rgqa-k2", 2640, 2_637_824, 161_768_448, 323.5),
    ("162M", "switchhead", 2640, 2_654_208, 161_965_056, 311.3),
    ("250M", "mha", 2176, 4_194_304, 250_389_504, 584.6),
    ("250M", "mqa", 2816, 2_228_224, 250_389_504, 584.6),
    ("250M", "gqa", 2688, 2_621_440, 250_389_504, 584.6),
    ("250M", "rgqa-k1", 2672, 2_637_824, 249_734_144, 457.5),
    ("250M", "rgqa-k2", 2672, 2_637_824, 249_734_144, 499.4),
    ("250M", "switchhead", 2672, 2_654_208, 250_061_824, 479.1),
    ("940M", "mha", 4384, 16_777_216, 939_870_208, 2047.4),
    ("940M", "mqa", 5712, 8_650_752, 940_525_568, 2048.7),
    ("940M", "gqa", 5408, 10_485_760, 939_870_208, 2047.4),
    ("940M", "rgqa-k1", 5392, 10_551_296, 939_214_848, 1668.6),
    ("940M", "rgqa-k2", 5392, 10_551_296, 939_214_848, 1794.4),
    ("940M", "switchhead", 5392, 10_616_832, 940_525_568, 1755.2),
]


def mechanism(name, heads, groups):
    if name == "mha":
        return MhaConfig(heads=heads, head_dim=64)
    if name == "mqa":
        return MqaConfig(heads=heads, head_dim=64)
    if name == "gqa":
        return GqaConfig(heads=heads, kv_heads=groups, head_dim=64)
    if name == "switchhead":
        return SwitchHeadConfig(kv_heads=groups, experts=heads // groups, head_dim=64, top_k=2)
    return RgqaConfig(heads=heads, kv_heads=groups, head_dim=64, top_k=int(name[-1]))


@pytest.mark.parametrize(("size", "name", "ffn_width", "attention_params", "params", "mflops"), ROWS)
def test_proposed_sizes(size, name, ffn_width, attention_params, params, mflops):
    width, layers, heads, groups = SIZES[size]
    config = mechanism(name, heads, groups)
    model = ModelConfig(width=width, layers=layers, ffn_width=ffn_width)
    cost = account(model, config, vocab_size=32_000, seq_len=2048)
    assert config.num_params(width=width) == attention_params
    assert cost.num_params == params
    assert round(cost.flops_per_token.useful / 1e6, 1) == mflops
    with torch.device("meta"):
        module = config.build(width=width, layers=layers, init_std=0.02, norm_eps=1e-5)
    assert sum(p.numel() for p in module.parameters()) == attention_params


def test_routing_shrinks_the_core_in_proportion_and_leaves_the_cache():
    model = ModelConfig(width=768, layers=9, ffn_width=2128)
    gqa, k1, k2, switchhead = (
        account(model, mechanism(name, 12, 3), vocab_size=32_000, seq_len=8192)
        for name in ("gqa", "rgqa-k1", "rgqa-k2", "switchhead")
    )
    cores = [cost.attention_core_flops.useful for cost in (gqa, k1, k2, switchhead)]
    assert cores[1] * 4 == cores[2] * 2 == cores[0]
    assert cores[3] == cores[1]
    assert cores[0] == 9 * 4 * 64 * 12 * 8193 / 2
    assert len({cost.kv_bytes_per_token for cost in (gqa, k1, k2, switchhead)}) == 1
    assert gqa.kv_bytes_per_token == 9 * 2 * 3 * 64 * 2


def test_executed_counts_the_dense_projections():
    model = ModelConfig(width=768, layers=9, ffn_width=2128)
    gqa, k1 = (account(model, mechanism(n, 12, 3), vocab_size=32_000, seq_len=2048) for n in ("gqa", "rgqa-k1"))
    assert gqa.flops_per_token.useful == gqa.flops_per_token.executed
    skipped = 9 * 4 * 768 * (12 - 3) * 64  # query and output slices of the heads that are not chosen
    assert k1.flops_per_token.executed - k1.flops_per_token.useful == skipped


def test_untied_embeddings_add_a_head():
    config = mechanism("gqa", 4, 2)
    tied, untied = (
        account(ModelConfig(width=64, layers=2, ffn_width=96, tied_embeddings=t), config, vocab_size=100, seq_len=32)
        for t in (True, False)
    )
    assert untied.num_params - tied.num_params == untied.params_by_part["head"] == 6400
    assert untied.flops_per_token == tied.flops_per_token
