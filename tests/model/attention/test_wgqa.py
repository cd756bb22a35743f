"""Weighted GQA: initialization, folding to GQA, and published parameter counts."""

import pytest
import torch
from pydantic import ValidationError

from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.config import ModelConfig
from headway.model.convert.heads import fold_decoder, mean_pool
from headway.model.cost import account

WIDTH, HEADS, D = 20, 8, 6
FORMS = ["scalar", "column", "row"]


def wgqa(kv_heads=2, **fields):
    return WgqaConfig(heads=HEADS, head_dim=D, kv_heads=kv_heads, **fields)


def perturb(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("_weights"):
                parameter.add_(torch.randn_like(parameter))


def gradients(y, wanted):
    torch.manual_seed(5)
    return torch.autograd.grad(y, wanted, torch.randn_like(y))


def written_out(module, x, kv_heads):
    """The published training form: keys and values of all H heads, merged afterwards; no rotation, no norm."""
    per_head = module.k_weights.numel() // HEADS
    out = torch.zeros_like(x)
    causal = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    size = HEADS // kv_heads
    for h in range(HEADS):
        k, v = torch.zeros(()), torch.zeros(())
        for member in range(h // size * size, (h // size + 1) * size):
            rows, own = slice(member * D, (member + 1) * D), slice(member * per_head, (member + 1) * per_head)
            a, b = module.k_weights[own], module.v_weights[own]
            if per_head == WIDTH:
                k, v = k + (x * a) @ module.w_k[rows].T, v + (x * b) @ module.w_v[rows].T
            else:
                k, v = k + (x @ module.w_k[rows].T) * a, v + (x @ module.w_v[rows].T) * b
        q = x @ module.w_q[h * D : (h + 1) * D].T
        scores = (q @ k.transpose(1, 2) / D**0.5).masked_fill(~causal, float("-inf"))
        out = out + scores.softmax(-1) @ v @ module.w_o[:, h * D : (h + 1) * D].T
    return out


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_equals_the_merge_of_projected_heads_written_out(layer, context, x, weights, kv_heads):
    config = wgqa(kv_heads, weights=weights, start="random", rope_fraction=0.0)
    module = layer(config)
    x.requires_grad_()
    y, expected = module(x, context(config)).y, written_out(module, x, kv_heads)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    wanted = [x, *module.parameters()]
    for a, b in zip(gradients(y, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])  # 8, 4 and 2 heads merged: 1/M has no rounding
def test_at_the_mean_start_it_is_mha_with_mean_pooled_heads(layer, context, x, weights, kv_heads):
    config, mha = wgqa(kv_heads, weights=weights), layer(MhaConfig(heads=HEADS, head_dim=D))
    module, pooled = layer(config), layer(config.folded)
    kept, missing = module.load_state_dict(mha.state_dict(), strict=False)
    assert set(kept) == {"k_weights", "v_weights"} and not missing
    pooled.load_state_dict(mean_pool(mha.state_dict(), kv_heads, head_dim=D))
    x.requires_grad_()
    y, expected = module(x, context(config)).y, pooled(x, context(config)).y
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    mine = gradients(y, [x, module.w_q, module.w_o, module.w_k, module.w_v])
    theirs = gradients(expected, [x, pooled.w_q, pooled.w_o, pooled.w_k, pooled.w_v])
    for a, b in zip(mine[:3], theirs[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)
    for a, b in zip(mine[3:], theirs[3:], strict=True):  # a pooled head's gradient is shared out evenly
        each = b.unflatten(0, (kv_heads, 1, D)).expand(-1, HEADS // kv_heads, -1, -1) * kv_heads / HEADS
        torch.testing.assert_close(a, each.flatten(0, 2), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_folded_layer_is_gqa_and_equals_the_trained_one(layer, context, x, weights, kv_heads):
    config = wgqa(kv_heads, weights=weights, qk_norm=True, rope_base=500.0, rope_fraction=2 / 3)
    module, folded = layer(config), layer(config.folded)
    perturb(module)
    folded.load_state_dict(module.folded_weights())
    assert folded.w_k.shape == (kv_heads * D, WIDTH)
    x.requires_grad_()
    y, expected = module(x, context(config)).y, folded(x, context(config.folded)).y
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        gradients(y, [x, module.w_q, module.w_o]), gradients(expected, [x, folded.w_q, folded.w_o]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)
    ours, theirs = module.pool(x, context(config)), folded.pool(x, context(config))
    torch.testing.assert_close(ours.outputs, theirs.outputs, rtol=0, atol=1e-12)


def test_folding_leaves_the_trained_layer_alone(layer):
    module = layer(wgqa())
    before = module.w_q.detach().clone()
    for tensor in module.folded_weights().values():
        assert not tensor.requires_grad
        tensor.zero_()
    assert torch.equal(module.w_q, before) and module.w_q.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_a_folded_decoder_has_equal_logits_and_the_size_of_gqa(decoder, tokens, tied):
    attention = wgqa(weights="column", start="random", qk_norm=True)
    model = ModelConfig(width=WIDTH, layers=2, ffn_width=28, tied_embeddings=tied)
    trained = decoder(attention, tied=tied).eval()
    folded = fold_decoder(trained, model)
    assert folded.attention == attention.folded and not folded.training
    torch.testing.assert_close(folded.logits(tokens), trained.logits(tokens), rtol=0, atol=1e-12)
    cost = account(model, GqaConfig(heads=HEADS, head_dim=D, kv_heads=2, qk_norm=True), vocab_size=37, seq_len=11)
    assert sum(p.numel() for p in folded.parameters()) == cost.num_params
    training = account(model, attention, vocab_size=37, seq_len=11)
    assert training.num_params - cost.num_params == 2 * (2 * WIDTH * (HEADS - 2) * D + 2 * HEADS * D)
    assert training.flops_per_token == cost.flops_per_token
    assert training.kv_bytes_per_token == cost.kv_bytes_per_token
    with torch.no_grad():
        folded.embedding.zero_()
    assert trained.embedding.abs().max() > 0


def test_a_decoder_of_another_mechanism_is_not_folded(decoder):
    mha = decoder(MhaConfig(heads=HEADS, head_dim=D))
    with pytest.raises(ValueError, match=r"^decoder: .*type mha.*use the decoder unchanged, or .* wgqa"):
        fold_decoder(mha, ModelConfig(width=WIDTH, layers=2, ffn_width=28))


@pytest.mark.parametrize(("weights", "extra"), [("scalar", 576), ("column", 36_864), ("row", 442_368)])
def test_extra_parameters_are_the_published_ones_of_t5_base(weights, extra):
    """12 heads of 64 channels at width 768; 12 decoder layers with self- and cross-attention."""
    mha = MhaConfig(heads=12, head_dim=64)
    config = WgqaConfig(heads=12, kv_heads=6, head_dim=64, weights=weights)
    assert 24 * (config.num_params(width=768) - mha.num_params(width=768)) == extra


@pytest.mark.parametrize("weights", FORMS)
def test_the_start_is_the_mean_or_standard_normal(layer, weights):
    mean = layer(WgqaConfig(heads=6, kv_heads=2, head_dim=D, weights=weights))
    assert (mean.k_weights.float() == 1 / 3).all() and (mean.v_weights.float() == 1 / 3).all()
    config = WgqaConfig(heads=600, kv_heads=2, head_dim=D, weights=weights, start="random")
    drawn = layer(config)
    for vector in (drawn.k_weights, drawn.v_weights):
        assert abs(vector.mean()) < 0.15 and abs(vector.std() - 1) < 0.1  # 600 numbers at least: 3.7 standard errors
    assert not torch.equal(drawn.k_weights, drawn.v_weights)


def test_parameters_shared_with_mha_start_equal_to_mha(decoder):
    mha = dict(decoder(MhaConfig(heads=HEADS, head_dim=D)).named_parameters())
    weighted = dict(decoder(wgqa()).named_parameters())
    assert {name for name in weighted if name not in mha} == {
        f"blocks.{i}.attn.{kind}_weights" for i in range(2) for kind in "kv"
    }
    assert all(torch.equal(parameter, weighted[name]) for name, parameter in mha.items())


@pytest.mark.parametrize("weights", FORMS)
def test_the_merge_weights_are_vectors_without_weight_decay(layer, weights):
    module = layer(wgqa(weights=weights))
    assert module.k_weights.ndim == module.v_weights.ndim == 1


def test_heads_are_added_in_fp32_in_a_bf16_model(layer):
    module = layer(wgqa(1, start="random")).bfloat16()
    merged = module.merged(module.w_k, module.k_weights)
    products = module.w_k.unflatten(0, (HEADS, D)).double() * module.k_weights.double()[:, None, None]
    assert merged.dtype == torch.bfloat16
    rounded_once = products.float().sum(0).bfloat16()
    assert (merged == rounded_once).float().mean() > 0.98  # fp32 order of the sum decides the others


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_heads": 3}, ["kv_heads: 8 heads", "3 groups", "use kv_heads 2 or kv_heads 4, or heads 9"]),
        ({"kv_heads": 5}, ["kv_heads: 8 heads", "5 groups", "use kv_heads 4, or heads 10"]),
        ({"kv_heads": 16}, ["kv_heads: 8 heads", "16 groups", "use kv_heads 4, or heads 32"]),
        ({"kv_heads": 8}, ["kv_heads: ", "nothing to merge", "use kv_heads 4, or heads 16"]),
        ({"heads": 1, "kv_heads": 1}, ["kv_heads: ", "nothing to merge", "use type mha, or heads 2"]),
        ({"kv_heads": 2, "head_dim": 7}, ["rope_fraction: ", "7 channels", "rope_fraction 0.0", "head_dim 8"]),
    ],
)
def test_impossible_combinations_say_what_is_possible(fields, words):
    with pytest.raises(ValidationError) as refusal:
        WgqaConfig.model_validate({"heads": 8, "head_dim": 6, **fields})
    message = refusal.value.errors()[0]["msg"].removeprefix("Value error, ")
    assert message.startswith(words[0])
    for word in words[1:]:
        assert word in message


@pytest.mark.parametrize("fields", [{"weights": "matrix"}, {"start": "zero"}, {"weights": 1}, {"kv_heads": 0}])
def test_unknown_forms_are_refused(fields):
    with pytest.raises(ValidationError):
        WgqaConfig.model_validate({"heads": 8, "kv_heads": 2, "head_dim": 6, **fields})
