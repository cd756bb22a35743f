"""How strongly residual branches start: measured in a forward pass, and set to one ratio for every mechanism."""

import pytest
import torch

from headway.model.attention.gqa import GqaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Block, BranchScale, Decoder
from headway.model.measure.branch import branch_ratios, branch_scales, measured_branches, rms

VOCAB, TARGET = 37, 0.3
MODEL = ModelConfig(width=20, layers=3, ffn_width=28, init_std=0.05)
SEGMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2], dtype=torch.int32).expand(3, 11)


def scales(config, tokens, *, model=MODEL, target=TARGET, segments=None, seed=1):
    return branch_scales(model, config, vocab_size=VOCAB, seed=seed, tokens=tokens, segments=segments, target=target)


def blocks_of(decoder) -> dict[int, Block]:
    return {i: block for i, block in enumerate(decoder.blocks) if isinstance(block, Block)}


@torch.no_grad()
def ratios(decoder, tokens, segments=None):
    decoder.eval()
    with measured_branches(blocks_of(decoder)) as found:
        decoder(tokens, tokens, segments)
    return [branch_ratios(sums) for sums in found.values()]


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_every_mechanism_starts_with_the_ratio_that_is_asked_for(mechanism, tokens, segments):
    found = scales(mechanism, tokens, segments=segments)
    decoder = Decoder(MODEL, mechanism, vocab_size=VOCAB, seed=1, scales=found)
    for layer in ratios(decoder, tokens, segments):
        assert layer["attention"] == pytest.approx(TARGET, rel=3e-4)


def test_the_mlp_stays_as_drawn(mechanism, tokens):
    decoder = Decoder(MODEL, mechanism, vocab_size=VOCAB, seed=1, scales=scales(mechanism, tokens))
    drawn = dict(Decoder(MODEL, mechanism, vocab_size=VOCAB, seed=1).named_parameters())
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, drawn[name]) or ".attn.w_o" in name, name


def test_as_drawn_mechanisms_start_differently(mechanisms, tokens):
    starts = {
        name: ratios(Decoder(MODEL, config, vocab_size=VOCAB, seed=1), tokens)[0]["attention"]
        for name, config in mechanisms.items()
    }
    assert max(starts.values()) > 3 * min(starts.values())


def test_the_measured_ratio_is_that_of_the_branch_s_output_to_its_stream(tokens):
    decoder = Decoder(MODEL, GqaConfig(heads=4, kv_heads=2, head_dim=6), vocab_size=VOCAB, seed=1).eval()
    seen = []
    with torch.no_grad():
        hook = decoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        decoder(tokens, tokens)
        hook.remove()
        (x, context, *_), block = seen[0], blocks_of(decoder)[0]
        y = block.attn(block.attn_norm(x), context).y
        mlp = block.mlp(block.mlp_norm(x, y)[1])
    first = ratios(decoder, tokens)[0]
    assert first["attention"] == pytest.approx(rms(y) / rms(x), rel=1e-5)
    assert first["mlp"] == pytest.approx(rms(mlp) / rms(x + y), rel=1e-5)


@pytest.mark.parametrize("power", [-4, -2, 1, 3])
def test_a_power_of_two_in_the_drawn_output_matrix_changes_nothing(monkeypatch, tokens, power):
    """The intervention: W_O multiplied beforehand. Equal weights train to equal losses."""
    config = GqaConfig(heads=4, kv_heads=2, head_dim=6)
    drawn = scales(config, tokens)
    expected = Decoder(MODEL, config, vocab_size=VOCAB, seed=1, scales=drawn)
    import headway.model.decoder as module
    import headway.model.measure.branch as branch

    original = module.initialise

    def multiplied(block, *, prefix="", **options):
        original(block, prefix=prefix, **options)
        if prefix.startswith("blocks."):
            with torch.no_grad():
                block.attn.w_o.mul_(2.0**power)

    monkeypatch.setattr(module, "initialise", multiplied)
    monkeypatch.setattr(branch, "initialise", multiplied)
    again = scales(config, tokens)
    assert [s.attention * 2.0**power for s in again] == [s.attention for s in drawn]
    found = Decoder(MODEL, config, vocab_size=VOCAB, seed=1, scales=again)
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_factors_are_a_function_of_configs_seed_and_batch_alone(tokens):
    config = GqaConfig(heads=4, kv_heads=2, head_dim=6)
    first = scales(config, tokens)
    torch.manual_seed(123)
    assert scales(config, tokens) == first
    assert scales(config, tokens, seed=2) != first


def test_zero_makes_the_model_its_embedding(mechanism, tokens):
    found = scales(mechanism, tokens, target=0)
    assert found == [BranchScale(attention=0.0, mlp=0.0)] * MODEL.layers
    decoder = Decoder(MODEL, mechanism, vocab_size=VOCAB, seed=1, scales=found).eval()
    assert ratios(decoder, tokens) == [{"attention": 0.0, "mlp": 0.0}] * MODEL.layers
    hidden = decoder.norm(decoder.embedding[tokens])
    torch.testing.assert_close(decoder.logits(tokens), hidden @ decoder.embedding.T)


def test_a_branch_that_adds_nothing_is_refused(monkeypatch, tokens):
    config = GqaConfig(heads=4, kv_heads=2, head_dim=6)
    import headway.model.measure.branch as branch

    original = branch.initialise

    def silent(block, **options):
        original(block, **options)
        with torch.no_grad():
            block.attn.w_o.zero_()

    monkeypatch.setattr(branch, "initialise", silent)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: its output is 0 times"):
        scales(config, tokens)


def test_sums_of_parts_of_the_stream_give_the_ratio_of_the_whole(tokens):
    decoder = Decoder(MODEL, GqaConfig(heads=4, kv_heads=2, head_dim=6), vocab_size=VOCAB, seed=1).eval()
    sums = []
    with torch.no_grad():
        for part in (tokens[:1], tokens[1:]):
            with measured_branches(blocks_of(decoder)) as found:
                decoder(part, part)
            sums.append(found[1])
    added = {name: sums[0][name] + sums[1][name] for name in sums[0]}
    assert branch_ratios(added) == pytest.approx(ratios(decoder, tokens)[1], rel=1e-9)
