"""Initial parameters depend only on seed and name."""

import torch

from headway.model.attention.gqa import GqaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.model.init import draw
from headway.model.router import LinearRouterConfig


def build(attention, *, seed=1, **fields):
    shape = {"width": 48, "layers": 3, "ffn_width": 80, "init_std": 0.05, "tied_embeddings": False, **fields}
    return Decoder(ModelConfig(**shape), attention, vocab_size=90, seed=seed)


GQA = GqaConfig(heads=8, kv_heads=2, head_dim=6)
RGQA = RgqaConfig(heads=8, kv_heads=2, head_dim=6, top_k=1, router=LinearRouterConfig(init_std=0.7))


def test_common_parameters_start_equal_in_all_mechanisms():
    gqa, rgqa = dict(build(GQA).named_parameters()), dict(build(RGQA).named_parameters())
    assert set(rgqa) - set(gqa) == {f"blocks.{i}.attn.router.w" for i in range(3)}
    assert set(gqa) <= set(rgqa)
    for name, parameter in gqa.items():
        assert torch.equal(parameter, rgqa[name]), name
    switchhead = dict(build(SwitchHeadConfig(kv_heads=2, head_dim=6, experts=4, top_k=2)).named_parameters())
    for name in ("embedding", "head", "blocks.2.mlp.w_down", "blocks.1.attn.w_k"):
        assert torch.equal(switchhead[name], gqa[name]), name


def test_a_wider_mlp_does_not_change_other_initial_parameters():
    wide, plain = dict(build(GQA, ffn_width=96).named_parameters()), dict(build(GQA).named_parameters())
    for name, parameter in plain.items():
        assert ".mlp." in name or torch.equal(parameter, wide[name]), name


def test_seeds_and_names_give_different_numbers():
    model, other = dict(build(GQA).named_parameters()), dict(build(GQA, seed=2).named_parameters())
    matrices = [name for name, parameter in model.items() if parameter.ndim == 2]
    for name in matrices:
        assert not torch.equal(model[name], other[name]), name
    firsts = {model[name].flatten()[0].item() for name in matrices}
    assert len(firsts) == len(matrices)


def test_neither_threads_nor_the_global_generator_matter():
    before = draw("blocks.0.attn.w_q", torch.Size([65, 33]), std=0.02, seed=3)
    torch.manual_seed(99)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(draw("blocks.0.attn.w_q", torch.Size([65, 33]), std=0.02, seed=3), before)
    finally:
        torch.set_num_threads(threads)


def test_standard_deviations_are_those_of_the_config():
    model = build(RGQA)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        std = 0.05
        if name.endswith(("w_o", "w_down")):
            std = 0.05 / 6**0.5
        if name.endswith("router.w"):
            std = 0.7
        # a sample std of n numbers is off by 1/sqrt(2n); four of those
        assert abs(parameter.std().item() / std - 1) < 4 / (2 * parameter.numel()) ** 0.5, name
        assert abs(parameter.mean().item()) < 4 * std / parameter.numel() ** 0.5, name
