"""GQA against attention written out, and its two ends."""

import pytest
import torch

from headway.model.attention.gqa import GqaConfig, MhaConfig, MqaConfig


def written_out(module, x, groups):
    """No rotation; head h reads KV head h // M."""
    heads = module.w_q.shape[0] // 10
    q, k, v = ((x @ w.T).unflatten(-1, (-1, 10)) for w in (module.w_q, module.w_k, module.w_v))
    out = torch.zeros_like(x)
    causal = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    for h in range(heads):
        g = h // (heads // groups)
        scores = torch.einsum("bsd,btd->bst", q[:, :, h], k[:, :, g]) / 10**0.5
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        out = out + (weights @ v[:, :, g]) @ module.w_o[:, h * 10 : (h + 1) * 10].T
    return out


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_equals_attention_written_out(layer, context, x, groups):
    config = GqaConfig(heads=6, kv_heads=groups, head_dim=10, rope_fraction=0.0)
    module = layer(config)
    torch.testing.assert_close(module(x, context(config)).y, written_out(module, x, groups), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("end", "kv_heads"), [(MhaConfig(heads=6, head_dim=10), 6), (MqaConfig(heads=6, head_dim=10), 1)]
)
def test_mha_and_mqa_are_its_ends(decoder, tokens, end, kv_heads):
    gqa = GqaConfig(heads=6, kv_heads=kv_heads, head_dim=10)
    assert torch.equal(decoder(end).logits(tokens), decoder(gqa).logits(tokens))
    assert end.num_params(width=20) == gqa.num_params(width=20)
    assert end.kv_bytes_per_token(seq_len=64, bytes_per_element=2) == gqa.kv_bytes_per_token(
        seq_len=64, bytes_per_element=2
    )


def test_qk_norm_makes_scores_independent_of_the_scale_of_queries(layer, context, x):
    config = GqaConfig(heads=6, kv_heads=2, head_dim=10, qk_norm=True)
    module = layer(config)
    before = module(x, context(config)).y
    with torch.no_grad():
        module.w_q.mul_(3.0)
    after = module(x, context(config)).y
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)  # up to eps inside the norm
    with torch.no_grad():
        module.q_rope.norm.gain.mul_(3.0)
    assert (module(x, context(config)).y - before).abs().max() > 1e-2
