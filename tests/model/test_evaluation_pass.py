"""The decoder counts correct predictions (hits) only if gradients are disabled."""

import torch

from headway.model.attention.gqa import GqaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder


def decoder() -> Decoder:
    model = ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.2)
    return Decoder(model, GqaConfig(type="gqa", heads=4, kv_heads=2, head_dim=8), vocab_size=7, seed=3).eval()


def test_hits_are_the_targets_whose_largest_logit_is_the_label():
    model, tokens = decoder(), torch.randint(0, 7, (3, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        guesses = model.logits(tokens).argmax(-1)
        labels = guesses.clone()
        labels[:, ::2] = (labels[:, ::2] + 1) % 7
        labels[0] = -100
        out = model(tokens, labels)
    assert out.by_token is not None
    assert torch.equal(out.by_token.hits, (guesses == labels) & (labels != -100))
    assert (int(out.by_token.hits.sum()), int(out.targets)) == (2 * 6, 2 * 13)


def test_the_loss_is_that_of_training_and_only_training_counts_no_hits():
    model, tokens = decoder(), torch.randint(0, 7, (3, 13), generator=torch.Generator().manual_seed(1))
    training = model(tokens[:, :-1], tokens[:, 1:])
    with torch.no_grad():
        evaluation = model(tokens[:, :-1], tokens[:, 1:])
    assert training.by_token is None and evaluation.by_token is not None
    torch.testing.assert_close(evaluation.by_token.losses.sum(), evaluation.loss_sum, rtol=1e-6, atol=0)
    # fp32 sums of 36 terms in another order
    torch.testing.assert_close(evaluation.loss_sum, training.loss_sum.detach(), rtol=1e-6, atol=0)
