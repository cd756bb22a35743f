"""Dropout in the decoder: where the published blocks have it, from masks that only indices decide."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from llamas import transformers
from torch import Tensor, nn

from headway.kernels.dropout import dropout
from headway.kernels.operations import Operations
from headway.kernels.relative import sinusoids
from headway.kernels.rope import rope_tables
from headway.model.activations import Sharing, footprint, saved_storages
from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.base import Context
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.decoder import Block, Decoder, Placement
from headway.model.dropout import Dropout

WIDTH, LAYERS, FFN, HEADS, HEAD, VOCAB, B, S = 48, 2, 80, 4, 12, 37, 3, 11
P, SEED = 0.3, 1
ALL = ("embedding", "branches", "hidden", "head")
PLACES = [("embedding", "branches"), ("branches",), ("hidden",), ("embedding", "head"), ALL]


def model(**changes: Any) -> ModelConfig:
    base = {"width": WIDTH, "layers": LAYERS, "ffn_width": FFN, "init_std": 0.3, "dropout": P, "dropout_places": ALL}
    return ModelConfig.model_validate({**base, **changes})


def made(attention: Any = None, *, placement: Placement | None = None, **changes: Any) -> Any:
    """In float64, with biases that are not 0."""
    attention = attention or MhaConfig(heads=HEADS, head_dim=HEAD, biases=True)
    found = Decoder(model(**changes), attention, vocab_size=VOCAB, seed=SEED, placement=placement).double()
    with torch.no_grad():
        for name, p in found.named_parameters():
            if p.ndim == 1 and not name.endswith("gain"):
                p.copy_(torch.linspace(-0.3, 0.4, len(p)))
    return found


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (B, S), generator=torch.Generator().manual_seed(2))


def keys(*, trained: int = 0, first: int = 0, count: int = B, seed: int = SEED) -> Tensor:
    found = Dropout.of(model(), seed=seed)
    assert found is not None
    return found.keys(tokens=trained, first=first, count=count, device=torch.device("cpu"))


def gradients(decoder: Any, of: Tensor | None = None) -> list[Tensor]:
    ids = tokens()
    output = decoder(ids, ids.roll(-1, 1), None, keys() if of is None else of)
    loss = output.loss_sum + output.aux_loss
    leaves = list(decoder.parameters())
    return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def refused(*args: Any) -> Tensor:
    raise AssertionError("dropped")


# ---------------------------------------------------------------- off


@pytest.mark.parametrize("training", [True, False])
def test_without_dropout_nothing_is_done(training):
    never = Placement(operations=replace(Operations(), dropout=refused))
    plain, zero = (made(dropout=0.0, placement=placement).train(training) for placement in (None, never))
    assert zero.dropout is None
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(zero), strict=True))


def test_outside_of_training_nothing_is_dropped():
    never = Placement(operations=replace(Operations(), dropout=refused))
    dropped, plain = made(placement=never).eval(), made(dropout=0.0).eval()
    ids = tokens()
    assert torch.equal(dropped(ids, ids).loss_sum, plain(ids, ids).loss_sum)
    assert torch.equal(dropped.train().logits(ids), plain.logits(ids))  # logits are asked for by generation and export
    with pytest.raises(AssertionError, match="dropped"):
        dropped.train()(ids, ids)


def test_it_costs_no_parameters_and_no_counted_flops():
    attention = GqaConfig(heads=4, kv_heads=2, head_dim=12)
    assert account(model(), attention, vocab_size=VOCAB, seq_len=S) == account(
        model(dropout=0.0), attention, vocab_size=VOCAB, seq_len=S
    )


# ---------------------------------------------------------------- masks


def spied(attention: Any, of: Tensor | None = None, *, rows: slice = slice(None), **changes: Any) -> list[Tensor]:
    """The masks of a training pass, in the order in which they act."""
    masks = []

    def spy(x: Tensor, *args: Any) -> Tensor:
        masks.append(dropout(torch.ones_like(x), *args) != 0)
        return dropout(x, *args)

    placement = Placement(operations=replace(Operations(), dropout=spy))
    decoder, ids = made(attention, placement=placement, **changes).train(), tokens()[rows]
    decoder(ids, ids, None, keys() if of is None else of)
    return masks


MHA = MhaConfig(heads=HEADS, head_dim=HEAD)


@pytest.mark.parametrize("places", PLACES)
def test_it_acts_in_its_places_and_no_mask_occurs_twice(places):
    shapes = [tuple(mask.shape) for mask in spied(MHA, dropout_places=places)]
    stream, hidden = (B, S, WIDTH), (B, S, FFN)
    block = [stream] * ("branches" in places) + [hidden] * ("hidden" in places) + [stream] * ("branches" in places)
    expected = [stream] * ("embedding" in places) + LAYERS * block + [stream] * ("head" in places)
    assert shapes == expected
    masks = [mask[..., :WIDTH] for mask in spied(MHA, dropout_places=places)]
    rows = torch.cat([mask.reshape(-1, WIDTH) for mask in masks])  # of each place, sequence and position
    assert len(rows.unique(dim=0)) == len(rows)


def test_a_mask_depends_on_the_seed_of_the_run_the_step_and_the_sequence():
    found = [spied(MHA, k)[0] for k in (keys(), keys(seed=2), keys(trained=64), keys(first=1))]
    assert torch.equal(found[0], spied(MHA)[0])
    assert not any(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0][1:], found[3][:-1])  # the same sequences of the global batch


def test_variants_of_one_seed_share_their_masks():
    others = [
        GqaConfig(heads=4, kv_heads=2, head_dim=8),
        RgqaConfig(heads=4, kv_heads=2, head_dim=12, top_k=1),
        SwitchHeadConfig(kv_heads=2, head_dim=12, experts=3, top_k=2),
    ]
    masks = spied(MHA)
    for attention in others:
        assert all(torch.equal(a, b) for a, b in zip(masks, spied(attention), strict=True))
    for place, wider in zip(masks, spied(MHA, width=64, ffn_width=100), strict=True):
        assert torch.equal(place, wider[..., : place.shape[-1]])  # as far as the shapes are equal


def test_micro_batches_of_any_size_have_the_same_masks():
    whole = spied(MHA)
    parts = [spied(MHA, keys(first=n, count=1), rows=slice(n, n + 1)) for n in range(B)]
    for mask, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(mask, torch.cat(pieces))


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputed_activations_have_the_same_masks(mechanism, recompute):
    found = []
    for form in ("none", recompute):
        torch.manual_seed(3)  # of the routers
        placement = Placement(recompute=form)
        found.append(gradients(made(mechanism, placement=placement).float().train()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(gradient.any() for gradient in found[0][1:])


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("positions", ["rope", "relative_xl"])
def test_kept_bytes_are_those_of_autograd(recompute, places, positions):
    config, attention = model(dropout_places=places, positions=positions), MhaConfig(heads=HEADS, head_dim=HEAD)
    for count in (32, 64):
        block = Block(config, attention)
        block.place(Placement(recompute=recompute))
        with torch.no_grad():
            for p in block.parameters():
                p.fill_(0.05)
        x = torch.randn(1, count, WIDTH, requires_grad=True)
        rotated = attention.rotated if positions == "rope" else 0
        rope, distances = rope_tables(count, rotated, 1e4, x.device), sinusoids(count, WIDTH, x.device)
        found = Dropout.of(config, seed=SEED)
        assert found is not None
        drops = found.of_pass(keys(count=1), torch.zeros(1, count), start=0)
        known = [*block.parameters(), *rope, distances]
        with saved_storages(besides=known, selective=block.selective) as saved:
            block(x, Context(rope=rope, distances=distances), drops)
        sharing = Sharing(bf16=False, masked=False, device="cpu", seq_len=count, selective=recompute == "selective")
        assert footprint(config, attention, sharing).kept(count) == pytest.approx(sum(saved.values()), rel=0.02)


# ---------------------------------------------------------------- independent implementations


def _numbers(seed: Any, count: int) -> Any:
    """The first numbers of the streams of SplitMix64 with these seeds, in numpy; [...] -> [..., count] uint64."""
    z = np.asarray(seed)[..., None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def masks_of(sequences: Tensor) -> Callable[[int, int], Tensor]:
    """(place, channels) -> its mask [B, S, channels] over 1 - p. Places: embedding, head, then three of each layer."""
    places = _numbers(sequences.numpy().view(np.uint64), 2 + 3 * LAYERS)

    def mask(place: int, channels: int) -> Tensor:
        numbers = _numbers(_numbers(places[:, place], S), channels // 2)
        halves = np.stack([numbers & np.uint64(2**32 - 1), numbers >> np.uint64(32)], -1).reshape(B, S, channels)
        share = (halves.astype(np.uint32) ^ np.uint32(2**31)) / 2**32  # the comparison is of signed numbers
        return torch.from_numpy(share >= P).double() / (1 - P)

    return mask


class Given(nn.Module):
    """In the place of a dropout module: a factor."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def stacked(attention: Any) -> tuple[Tensor, Tensor]:
    weights = torch.cat([attention.w_q, attention.w_k, attention.w_v])
    return weights, torch.cat([attention.b_q, attention.b_k, attention.b_v])


CLOSE = 1e-9
"""Largest relative difference in float64. The factor is that of p in steps of 2^-32, which is 1e-10 off."""


def test_a_block_is_that_of_torch_with_the_same_masks():
    """The four places of Transformer-XL, T5 and SwitchHead, with PyTorch's own layer, whose dropouts are replaced."""
    form: Any = {"mlp": "relu", "mlp_biases": True, "norm": "layernorm", "positions": "none", "tied_embeddings": False}
    decoder, ids, mask = made(**form).train(), tokens(), masks_of(keys())
    embedding = decoder.embedding.detach().clone().requires_grad_()
    x = embedding[ids] * mask(0, WIDTH)
    theirs = []
    for i, block in enumerate(decoder.blocks):
        layer: Any = nn.TransformerEncoderLayer(WIDTH, HEADS, FFN, dropout=0.0, batch_first=True, norm_first=True)
        layer.double()
        layer.dropout1, layer.dropout2 = Given(mask(2 + 3 * i, WIDTH)), Given(mask(3 + 3 * i, WIDTH))
        layer.dropout = Given(mask(4 + 3 * i, FFN))
        with torch.no_grad():
            weights, biases = stacked(block.attn)
            for own, mine in (
                (layer.self_attn.in_proj_weight, weights),
                (layer.self_attn.in_proj_bias, biases),
                (layer.self_attn.out_proj.weight, block.attn.w_o),
                (layer.self_attn.out_proj.bias, block.attn_out.bias),
                (layer.linear1.weight, block.mlp.w_up),
                (layer.linear1.bias, block.mlp.b_up),
                (layer.linear2.weight, block.mlp.w_down),
                (layer.linear2.bias, block.mlp_out.bias),
                (layer.norm1.weight, block.attn_norm.gain),
                (layer.norm1.bias, block.attn_norm.bias),
                (layer.norm2.weight, block.mlp_norm.gain),
                (layer.norm2.bias, block.mlp_norm.bias),
            ):
                own.copy_(mine)
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64), is_causal=True)
        theirs.append(layer)
    norm = nn.LayerNorm(WIDTH).double()
    norm.weight.data.copy_(decoder.norm.gain)
    norm.bias.data.copy_(decoder.norm.bias)
    logits = (norm(x) * mask(1, WIDTH)) @ decoder.head.detach().T
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="sum")
    got = decoder(ids, ids.roll(-1, 1), None, keys()).loss_sum
    assert abs(got.item() - expected.item()) <= CLOSE * expected.item()
    got.backward()
    expected.backward()
    pairs: list[tuple[Tensor, Tensor]] = [(decoder.embedding, embedding)]
    for block, layer in zip(decoder.blocks, theirs, strict=True):
        pairs += [
            (block.attn.w_o, layer.self_attn.out_proj.weight),
            (block.attn_out.bias, layer.self_attn.out_proj.bias),
            (block.mlp.w_up, layer.linear1.weight),
            (block.mlp.w_down, layer.linear2.weight),
            (block.mlp_out.bias, layer.linear2.bias),
            (block.attn_norm.gain, layer.norm1.weight),
        ]
    for mine, own in pairs:
        assert mine.grad is not None and own.grad is not None
        assert (mine.grad - own.grad).abs().max() <= CLOSE * max(1.0, float(own.grad.abs().max()))


def test_the_model_is_gpt2_of_transformers_with_the_same_masks():
    library = transformers()
    form: Any = {"mlp": "gelu_tanh", "mlp_biases": True, "norm": "layernorm", "positions": "learned"}
    decoder = made(**form, max_positions=16, dropout_places=("embedding", "branches")).train()
    ids, mask = tokens(), masks_of(keys())
    sizes = {"n_positions": 16, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": FFN}
    sizes |= {"vocab_size": VOCAB, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = library.GPT2Config(**sizes, attn_implementation="eager")
    gpt2 = library.GPT2LMHeadModel(config).double().train()
    own: dict[str, Any] = {"wte.weight": decoder.embedding, "wpe.weight": decoder.positions.weight}
    own |= {"ln_f.weight": decoder.norm.gain, "ln_f.bias": decoder.norm.bias}
    gpt2.transformer.drop = Given(mask(0, WIDTH))
    for i, block in enumerate(decoder.blocks):
        weights, biases = stacked(block.attn)
        their = gpt2.transformer.h[i]
        their.attn.resid_dropout, their.mlp.dropout = Given(mask(2 + 3 * i, WIDTH)), Given(mask(3 + 3 * i, WIDTH))
        own |= {
            f"h.{i}.{name}": tensor
            for name, tensor in {
                "ln_1.weight": block.attn_norm.gain,
                "ln_1.bias": block.attn_norm.bias,
                "attn.c_attn.weight": weights.T,
                "attn.c_attn.bias": biases,
                "attn.c_proj.weight": block.attn.w_o.T,
                "attn.c_proj.bias": block.attn_out.bias,
                "ln_2.weight": block.mlp_norm.gain,
                "ln_2.bias": block.mlp_norm.bias,
                "mlp.c_fc.weight": block.mlp.w_up.T,
                "mlp.c_fc.bias": block.mlp.b_up,
                "mlp.c_proj.weight": block.mlp.w_down.T,
                "mlp.c_proj.bias": block.mlp_out.bias,
            }.items()
        }
    with torch.no_grad():
        for name, p in gpt2.transformer.named_parameters():
            p.copy_(own[name])
    labels = ids.roll(-1, 1)
    expected = nn.functional.cross_entropy(gpt2(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum")
    got = decoder(ids, labels, None, keys()).loss_sum
    assert abs(got.item() - expected.item()) <= CLOSE * expected.item()
    got.backward()
    expected.backward()
    for mine, name in ((decoder.positions.weight, "wpe.weight"), (decoder.embedding, "wte.weight")):
        grad = gpt2.transformer.get_parameter(name).grad
        assert (mine.grad - grad).abs().max() <= CLOSE * grad.abs().max()
