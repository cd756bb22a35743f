"""The decoder: loss, labels, precision, and that it learns."""

import pytest
import torch
import torch.nn.functional as F

from headway.model.attention.gqa import GqaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder

GQA = GqaConfig(heads=4, kv_heads=2, head_dim=6)
RGQA = RgqaConfig(heads=8, kv_heads=2, head_dim=6, top_k=1)


@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_the_cross_entropy_of_the_logits(decoder, tokens, tied):
    model = decoder(GQA, tied=tied)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    out = model(tokens, labels)
    expected = F.cross_entropy(model.logits(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(out.loss_sum, expected, rtol=1e-13, atol=0)
    assert out.targets.dtype == torch.int64 and out.targets.item() == 30
    assert out.aux_loss.item() == 0.0


def test_ignored_labels_change_neither_loss_nor_gradient(decoder, tokens):
    model = decoder(GQA)
    labels = torch.full_like(tokens, -100)
    labels[1, 4] = 7
    model(tokens, labels).loss_sum.backward()
    gradient = model.embedding.grad.clone()
    model.zero_grad()
    (-torch.log_softmax(model.logits(tokens)[1, 4], -1)[7]).backward()
    torch.testing.assert_close(model.embedding.grad, gradient, rtol=0, atol=1e-12)
    nothing = model(tokens, torch.full_like(tokens, -100))
    assert nothing.loss_sum.item() == 0 and nothing.targets.item() == 0


def test_aux_loss_is_the_sum_over_layers(decoder, tokens):
    model = decoder(RGQA)
    seen = []
    for layer in model.attention_layers():
        layer.register_forward_hook(lambda *args: seen.append(args[-1].aux_loss))
    out = model(tokens, tokens)
    assert len(seen) == 2
    torch.testing.assert_close(out.aux_loss, seen[0] + seen[1])


def test_outputs_are_fp32_in_a_bf16_model(decoder, tokens):
    model = decoder(RGQA).bfloat16()
    out = model(tokens, tokens, torch.zeros_like(tokens))
    assert out.loss_sum.dtype == out.aux_loss.dtype == torch.float32
    exact = decoder(RGQA)(tokens, tokens)
    assert out.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=0.02)  # bf16 has 8 bits


def test_rotary_tables_stay_fp32_when_the_model_is_cast(decoder, tokens):
    model = decoder(GQA).bfloat16()
    model.logits(tokens)
    model.bfloat16()
    cos, _ = model._contexts.of(tokens, None, dtype=torch.bfloat16).at(0).rope
    assert cos.dtype == torch.float32
    assert not any("rope" in name for name in model.state_dict())


def test_sequences_of_several_lengths_share_the_tables(decoder, tokens):
    model = decoder(GQA)
    long, short = model.logits(tokens), model.logits(tokens[:, :5])
    torch.testing.assert_close(short, long[:, :5], rtol=0, atol=1e-12)
    torch.testing.assert_close(decoder(GQA).logits(tokens), model.logits(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("config", [GQA, RGQA], ids=["gqa", "rgqa"])
def test_learns_to_copy(config):
    """Each sequence is a random half, twice: the second half is predictable by looking back, not from one token."""
    model = Decoder(ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.1), config, vocab_size=16, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(200):
        half = torch.randint(0, 16, (16, 8), generator=generator)
        tokens = torch.cat([half, half], 1)
        labels = tokens.roll(-1, 1)
        labels[:, :7] = -100
        labels[:, -1] = -100
        out = model(tokens, labels)
        optimizer.zero_grad()
        (out.loss_sum / out.targets + out.aux_loss).backward()
        optimizer.step()
        losses.append(out.loss_sum.item() / out.targets.item())
    assert losses[0] == pytest.approx(torch.tensor(16.0).log().item(), abs=0.4)
    assert sum(losses[-10:]) / 10 < 0.7
