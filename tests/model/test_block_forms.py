"""MLP types, biases, LayerNorm and positions: equal to independent implementations, and counted exactly."""

from typing import Any

import pytest
import torch
from llamas import transformers
from torch import Tensor, nn

from headway.kernels.rope import rope_tables
from headway.model.activations import Sharing, block_parameters, footprint, saved_storages
from headway.model.attention.gqa import GqaConfig, MhaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.base import Context
from headway.model.config import ModelConfig
from headway.model.cost import account
from headway.model.decoder import Block, Decoder, Placement
from headway.parallel.engine import parameter_groups

WIDTH, LAYERS, FFN, HEADS, HEAD, VOCAB, S = 48, 2, 80, 4, 12, 37, 11
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "gelu": {"mlp": "gelu"},
    "relu, biases": {"mlp": "relu", "mlp_biases": True},
    "swiglu, biases": {"mlp_biases": True},
    "layernorm": {"norm": "layernorm"},
    "none": {"positions": "none"},
    "head bias": {"head_bias": True},
    "gpt2": {
        "mlp": "gelu_tanh",
        "mlp_biases": True,
        "norm": "layernorm",
        "positions": "learned",
        "max_positions": 16,
    },
}


def model(form: dict[str, Any], **changes: Any) -> ModelConfig:
    base = {"width": WIDTH, "layers": LAYERS, "ffn_width": FFN, "init_std": 0.3}
    return ModelConfig.model_validate({**base, **form, **changes})


def mha(*, biases: bool = True) -> MhaConfig:
    return MhaConfig(heads=HEADS, head_dim=HEAD, biases=biases)


def decoder(form: dict[str, Any], attention: Any = None, **changes: Any) -> Any:
    """In float64, with biases that are not 0."""
    made = Decoder(model(form, **changes), attention or mha(), vocab_size=VOCAB, seed=1).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.ndim == 1 and not name.endswith("gain"):
                p.copy_(torch.linspace(-0.3, 0.4, len(p)))
    return made


def tokens(count: int = S) -> Tensor:
    return torch.randint(0, VOCAB, (2, count), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted(form, biases, tied):
    config, attention = model(form, tied_embeddings=tied), GqaConfig(heads=4, kv_heads=2, head_dim=12, biases=biases)
    made = Decoder(config, attention, vocab_size=VOCAB, seed=1)
    said = account(config, attention, vocab_size=VOCAB, seq_len=S)
    assert said.num_params == sum(p.numel() for p in made.parameters())
    rank = block_parameters(config, attention, tensor=2)
    whole = block_parameters(config, attention, tensor=1)
    assert whole.total == sum(p.numel() for p in made.blocks[0].parameters())
    replicated = rank.replicated + rank.by_part["norm"]
    assert 2 * (rank.total - replicated) == whole.total - replicated


def test_flops_of_the_mlp_are_those_of_its_matrices():
    gated, plain = (account(model(f), mha(), vocab_size=VOCAB, seq_len=S) for f in ({}, {"mlp": "relu"}))
    assert gated.flops_per_token.useful - plain.flops_per_token.useful == LAYERS * 2 * WIDTH * FFN


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_biases_start_at_zero_and_gains_at_one_and_neither_decays(form):
    made = Decoder(model(form), mha(), vocab_size=VOCAB, seed=1)
    vectors = {name: p for name, p in made.named_parameters() if p.ndim == 1}
    for name, p in vectors.items():
        assert torch.all(p == (1 if name.endswith("gain") else 0)), name
    _, none = parameter_groups(made, 0.1)
    assert none["weight_decay"] == 0 and {id(p) for p in none["params"]} == {id(p) for p in vectors.values()}


def test_positions_reach_the_model_only_where_they_are_asked_for(mechanism):
    """Without positions and with one layer, the output of the last token does not depend on the order of the others.

    A layer without a softmax reads tokens one after another, so order enters without positions too.
    """
    order = torch.tensor([3, 0, 2, 1, 4])
    ids = tokens(5)
    for positions, differs in (("none", mechanism.score_maps == 0), ("rope", True), ("learned", True)):
        form = {"positions": positions, **({"max_positions": 8} if positions == "learned" else {})}
        made = decoder(form, mechanism, layers=1).eval()
        one, other = (made.logits(x, last=True) for x in (ids, ids[:, order]))
        assert torch.allclose(one, other, rtol=0, atol=1e-6) is not differs, positions


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_decoding_in_parts_is_the_whole_pass(form):
    made, ids = decoder(form).eval(), tokens()
    cache = made.new_cache()
    parts = [made.logits(part, cache=cache) for part in ids.split([4, 1, 5, 1], 1)]
    assert torch.allclose(torch.cat(parts, 1), made.logits(ids), rtol=0, atol=1e-12)


def test_a_token_beyond_the_learned_positions_is_refused():
    made = decoder(FORMS["gpt2"]).eval()
    with pytest.raises(ValueError, match=r"model\.max_positions: 16 positions are learned, and token 17 has none"):
        made.logits(tokens(17))


def gradients(form: dict[str, Any], attention: Any, recompute: Any) -> list[Tensor]:
    made = Decoder(model(form), attention, vocab_size=VOCAB, seed=1, placement=Placement(recompute=recompute)).train()
    ids = tokens()
    loss = made(ids, ids.roll(-1, 1)).loss_sum
    return [loss, *torch.autograd.grad(loss, list(made.parameters()))]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputation_changes_no_bit(form, recompute):
    plain, again = (gradients(form, mha(), r) for r in ("none", recompute))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("biases", [False, True])
def test_kept_bytes_are_those_of_autograd(form, recompute, biases):
    config, attention = model(form), mha(biases=biases)
    for count in (32, 64):
        block = Block(config, attention)
        block.place(Placement(recompute=recompute))
        with torch.no_grad():
            for p in block.parameters():
                p.fill_(0.05)
        x = torch.randn(1, count, WIDTH, requires_grad=True)
        rotated = attention.rotated if config.positions == "rope" else 0
        rope = rope_tables(count, rotated, attention.rope_base, x.device)
        with saved_storages(besides=[*block.parameters(), *rope], selective=block.selective) as saved:
            block(x, Context(rope=rope))
        sharing = Sharing(bf16=False, masked=False, device="cpu", seq_len=count, selective=recompute == "selective")
        assert footprint(config, attention, sharing).kept(count) == pytest.approx(sum(saved.values()), rel=0.02)


# ---------------------------------------------------------------- independent implementations


def _stacked(attention: Any) -> tuple[Tensor, Tensor]:
    weights = torch.cat([attention.w_q, attention.w_k, attention.w_v])
    return weights, torch.cat([attention.b_q, attention.b_k, attention.b_v])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_block_is_that_of_torch(activation):
    form = {"mlp": activation, "mlp_biases": True, "norm": "layernorm", "positions": "none"}
    made, ids = decoder(form, tied_embeddings=False), tokens()
    embedding = made.embedding.detach().clone().requires_grad_()
    x = embedding[ids]
    theirs = []
    for block in made.blocks:
        layer: Any = nn.TransformerEncoderLayer(
            WIDTH, HEADS, FFN, dropout=0.0, activation=activation, batch_first=True, norm_first=True
        ).double()
        with torch.no_grad():
            weights, biases = _stacked(block.attn)
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
        mask = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
        x = layer(x, src_mask=mask, is_causal=True)
        theirs.append(layer)
    norm = nn.LayerNorm(WIDTH).double()
    norm.weight.data.copy_(made.norm.gain)
    norm.bias.data.copy_(made.norm.bias)
    expected, got = norm(x) @ made.head.detach().T, made.logits(ids)
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    for block, layer in zip(made.blocks, theirs, strict=True):
        pairs = (
            (
                torch.cat([block.attn.w_q.grad, block.attn.w_k.grad, block.attn.w_v.grad]),
                layer.self_attn.in_proj_weight,
            ),
            (torch.cat([block.attn.b_q.grad, block.attn.b_k.grad, block.attn.b_v.grad]), layer.self_attn.in_proj_bias),
            (block.attn_out.bias.grad, layer.self_attn.out_proj.bias),
            (block.mlp.w_up.grad, layer.linear1.weight),
            (block.mlp.b_up.grad, layer.linear1.bias),
            (block.mlp_out.bias.grad, layer.linear2.bias),
            (block.mlp_norm.bias.grad, layer.norm2.bias),
            (block.attn_norm.gain.grad, layer.norm1.weight),
        )
        for mine, own in pairs:
            assert (mine - own.grad).abs().max() <= 1e-12 * max(1.0, float(own.grad.abs().max()))
    assert (made.embedding.grad - embedding.grad).abs().max() <= 1e-12 * embedding.grad.abs().max()


def test_the_model_is_gpt2_of_transformers():
    library = transformers()
    made, ids = decoder(FORMS["gpt2"]), tokens()
    config = library.GPT2Config(
        vocab_size=VOCAB,
        n_positions=16,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=FFN,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    gpt2 = library.GPT2LMHeadModel(config).double()
    mine: dict[str, Any] = {"transformer.wte.weight": made.embedding, "transformer.wpe.weight": made.positions.weight}
    mine |= {"transformer.ln_f.weight": made.norm.gain, "transformer.ln_f.bias": made.norm.bias}
    for i, block in enumerate(made.blocks):
        weights, biases = _stacked(block.attn)
        mine |= {
            f"transformer.h.{i}.{name}": tensor
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
    own = dict(gpt2.named_parameters())
    assert set(own) == set(mine) and sum(p.numel() for p in own.values()) == sum(p.numel() for p in made.parameters())
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(mine[name])
    got, expected = made.logits(ids), gpt2(ids).logits
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    leaves = list(made.parameters())
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    assert all(p.grad is not None for p in leaves)
    for mine_p, name in ((made.positions.weight, "transformer.wpe.weight"), (made.embedding, "transformer.wte.weight")):
        grad = own[name].grad
        assert (mine_p.grad - grad).abs().max() <= 1e-12 * grad.abs().max()


PUBLISHED: dict[str, tuple[tuple[int, int, int], Any, bool, int]] = {
    "SwitchHead RoPE, 44.51M": (
        (412, 16, 2092),
        SwitchHeadConfig(kv_heads=2, head_dim=64, experts=5, top_k=3, rope_fraction=0.5),
        False,
        44_505_336,
    ),
    "SwitchHead RoPE, 243.35M": (
        (1024, 18, 4136),
        SwitchHeadConfig(kv_heads=4, head_dim=100, experts=4, top_k=2, rope_fraction=0.5),
        False,
        243_347_984,
    ),
    "dense Transformer-XL, 47.26M": (
        (412, 16, 2053),
        MhaConfig(heads=10, head_dim=41, rope_fraction=0.0),
        True,
        47_260_104,
    ),
    "dense Transformer-XL with the heads of SwitchHead, 47.26M": (
        (412, 16, 2053),
        MhaConfig(heads=2, head_dim=205, rope_fraction=0.0),
        True,
        47_260_104,
    ),
    "SwitchHead Transformer-XL, 47.25M": (
        (412, 16, 2080),
        SwitchHeadConfig(kv_heads=2, head_dim=76, experts=5, top_k=3),
        True,
        47_247_416,
    ),
    "SwitchHead Transformer-XL (C4, peS2o), 262.37M": (
        (1024, 18, 4188),
        SwitchHeadConfig(kv_heads=4, head_dim=112, experts=4, top_k=2),
        True,
        262_370_744,
    ),
    "dense Transformer-XL, 262.48M": ((1024, 18, 4110), MhaConfig(heads=16, head_dim=64), True, 262_479_932),
}
"""Models of Csordas et al. (2024, arXiv 2312.07987v3): (d, L, F), attention, relative positions or RoPE, and the
number of parameters.

They print 47.26M, which of these only the dense models with u and v have (without: 47.25M), and 262.4M, which only
SwitchHead without u and v has. Their dense layers have two more scalars, of the scores, which are not counted here.
"""


def printed(name: str) -> float:
    return float(name.rpartition(" ")[2].removesuffix("M"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_number_of_parameters(name):
    (width, layers, ffn), attention, relative, total = PUBLISHED[name]
    config = ModelConfig(
        width=width,
        layers=layers,
        ffn_width=ffn,
        mlp="relu",
        mlp_biases=True,
        norm="layernorm",
        tied_embeddings=False,
        head_bias=True,
        positions="relative_xl" if relative else "rope",
    )
    found = account(config, attention, vocab_size=8000, seq_len=512).num_params
    assert found == total
    assert round(found / 1e6, 2) == printed(name)
    with torch.device("meta"):
        made = Decoder(config, attention, vocab_size=8000, seed=1)
    assert sum(p.numel() for p in made.parameters()) == total
