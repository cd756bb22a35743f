"""Products in 8-bit floating point: numerics by an emulation, which matrices they replace, where they are refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headway.kernels import fp8
from headway.kernels import operations as operations_module
from headway.kernels.fp8 import E4M3, E5M2, check_fp8, emulated_product, fp8_linear, quantised
from headway.kernels.levers import LeverError
from headway.kernels.operations import Operations, make_operations
from headway.model.attention.block_sparse import BlockSparseConfig
from headway.model.attention.gated_delta import GatedDeltaConfig
from headway.model.attention.gqa import GqaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.mla import MlaConfig
from headway.model.attention.moa import MoaConfig
from headway.model.attention.moh import MohConfig
from headway.model.attention.namoh import NamohConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder, Placement

BF16 = torch.bfloat16
POOL: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 16}
TAKEN = {
    "gqa": GqaConfig(**POOL),
    "gqa-gated": GqaConfig(**POOL, gate="headwise", qk_norm=True),
    "rgqa-k1": RgqaConfig(**POOL, top_k=1),
    "rgqa-always-on": RgqaConfig(**POOL, top_k=1, always_on=1),
    "gqe": GqeConfig(**POOL, top_k=1),
    "gqe-dedicated": GqeConfig(**POOL, top_k=1, shared_head="dedicated"),
    "switchhead": SwitchHeadConfig(kv_heads=2, head_dim=16, experts=4, top_k=2),
    "hybrid": HybridConfig(**POOL, top_k=1, value_experts=4, value_top_k=2),
    "moa": MoaConfig(heads=4, head_dim=16, top_k=2),
    "moh": MohConfig(**POOL, shared_heads=2, top_k=2),
    "namoh": NamohConfig(heads=8, head_dim=16, top_k=2, shared_heads=2),
    "block-sparse": BlockSparseConfig(**POOL, block=8, blocks=1),
    "gated_delta": GatedDeltaConfig(heads=2, value_heads=4, head_dim=16),
    "mla": MlaConfig(heads=4, head_dim=16, latent=48, query_latent=32, rope_dim=16),
}


def relative(found, expected):
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def drawn(*shape, seed, dtype=BF16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("kind", "error"), [(E4M3, 2**-4), (E5M2, 2**-3)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_numbers_are_rounded_by_at_most_half_a_step_of_the_format(kind, error, size):
    x = drawn(64, 48, seed=1, dtype=torch.float32) * size
    found, scale = quantised(x, kind)
    assert found.dtype == kind and found.float().abs().max() == torch.finfo(kind).max
    smallest = scale * torch.finfo(kind).smallest_normal
    assert ((found.float() * scale - x).abs() <= error * x.abs().clamp_min(smallest)).all()


def test_zeros_and_extremes_stay_finite():
    for kind in (E4M3, E5M2):
        found, scale = quantised(torch.zeros(4, 4, dtype=BF16), kind)
        assert (found.float() == 0).all() and torch.isfinite(scale)
        huge = torch.tensor([torch.finfo(BF16).max, -1.0], dtype=BF16)
        found, scale = quantised(huge, kind)
        assert torch.isfinite(found.float()).all() and found[0].float() > 0


@pytest.mark.parametrize("tokens", [64, 37])
def test_errors_of_a_linear_layer_are_those_of_the_format(tokens):
    """Rounding operands by 2^-4 (e4m3) and 2^-3 (e5m2) at most gives a few per cent in a sum of random terms."""
    x, weight, upstream = drawn(2, tokens, 128, seed=1), drawn(96, 128, seed=2), drawn(2, tokens, 96, seed=3)
    found, exact = [], []
    for outs, dtype, linear in (
        (found, BF16, lambda a, b: fp8_linear(a, b, emulated_product)),
        (exact, torch.float32, F.linear),
    ):
        a, b = (t.to(dtype).requires_grad_() for t in (x, weight))
        y = linear(a, b)
        outs += [y, *torch.autograd.grad(y, (a, b), upstream.to(dtype))]
    errors = [relative(a, b) for a, b in zip(found, exact, strict=True)]
    assert [t.dtype for t in found] == [BF16] * 3 and [t.shape for t in found] == [t.shape for t in exact]
    # Measured: 0.038 forward, 0.058 and 0.059 for the gradients. Below 0.01, nothing was rounded to 8 bits.
    assert 0.01 < errors[0] < 0.05 and all(0.02 < error < 0.08 for error in errors[1:]), errors


def test_the_gpu_product_gets_layouts_and_scales_that_it_takes(monkeypatch):
    calls = []

    def scaled_mm(a, b, *, scale_a, scale_b, out_dtype):
        assert a.dtype in (E4M3, E5M2) and b.dtype == E4M3
        assert a.stride(1) == 1 and b.stride(0) == 1, "row-major times column-major"
        assert not any(side % 16 for side in (a.shape[1], *b.shape))
        assert scale_a.dtype == scale_b.dtype == torch.float32 and scale_a.numel() == scale_b.numel() == 1
        calls.append((tuple(a.shape), tuple(b.shape)))
        return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    x, weight = drawn(3, 7, 32, seed=1).requires_grad_(), drawn(48, 32, seed=2).requires_grad_()
    results = []
    for product in (fp8.scaled_product, emulated_product):
        y = fp8_linear(x, weight, product)
        results.append([y, *torch.autograd.grad(y, (x, weight), drawn(3, 7, 48, seed=3))])
    assert calls == [((21, 32), (32, 48)), ((21, 48), (48, 32)), ((48, 32), (32, 32))]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_product_of_pytorch_has_the_numbers_of_the_emulation(device):
    """PyTorch multiplies fp8 on some CPUs too."""
    shapes = ((24, 64), (48, 64), (24, 48))
    x, weight, upstream = (drawn(*shape, seed=i).to(device) for i, shape in enumerate(shapes))
    try:
        fp8_linear(x, weight)
    except (RuntimeError, NotImplementedError) as error:
        if device != "cpu":
            raise
        pytest.skip(f"torch._scaled_mm does not run here: {error}")
    results = []
    for product in (fp8.scaled_product, emulated_product):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = fp8_linear(a, b, product)
        results.append([y, *torch.autograd.grad(y, (a, b), upstream)])
    assert all(relative(a, b) < 4e-3 for a, b in zip(*results, strict=True))  # one rounding to bf16


# ---------------------------------------------------------------- in a model


def model(attention, *, chosen=emulated_product, **sizes):
    defaults: dict[str, Any] = {"width": 64, "layers": 2, "ffn_width": 96, "vocab_size": 48}
    config = ModelConfig(**(defaults | sizes))
    placement = Placement(operations=replace(Operations(), fp8=chosen))
    made = Decoder(config, attention, vocab_size=48, seed=1, placement=placement).to(BF16).train()
    made.before_step(0)
    return made


def one_pass(made):
    tokens = torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(4))
    out = made(tokens, tokens)
    (out.loss_sum / tokens.numel() + out.aux_loss).backward()
    return out.loss_sum.detach() / tokens.numel()


def is_small(name):
    """Matrices of routers, gates and decays, with a row per head or expert, stay in bf16, and taps of convolutions."""
    return (
        "router" in name
        or name.split(".")[1] in ("source", "destination", "w_shared", "w_stage")
        or name
        in (
            "attn.w_gate",
            "attn.w_always_on",
            "attn.w_a",
            "attn.w_b",
        )
        or name.startswith("attn.conv_")
    )


@pytest.mark.parametrize("name", TAKEN)
def test_every_mechanism_has_its_projections_and_its_mlp_in_fp8_and_nothing_else(name, monkeypatch):
    weights = []
    original = fp8.fp8_linear

    def watched(x, weight, product):
        weights.append(weight)
        return original(x, weight, product)

    monkeypatch.setattr(fp8, "fp8_linear", watched)
    made, plain = model(TAKEN[name]), model(TAKEN[name], chosen=None)
    found, expected = one_pass(made), one_pass(plain)
    names = {id(p): n for n, p in made.named_parameters()}
    used = {names[id(w)] for w in weights}
    for block in range(2):
        inside = {n.split(".", 2)[2] for n in used if n.startswith(f"blocks.{block}.")}
        every = {n for n, p in made.blocks[block].named_parameters() if p.dim() == 2 and not is_small(n)}
        inputs = {"attn.w_dq", "attn.w_kr", "attn.w_uk"} if name == "mla" else {"attn.w_q", "attn.w_v"}
        assert inside == every and {"mlp.w_gate", "mlp.w_down", "attn.w_o"} | inputs <= inside
    assert all(n.startswith("blocks.") for n in used)  # never the embedding or the head
    assert 0 < abs(found - expected) < 0.05
    for (parameter_name, a), b in zip(made.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and a.grad.dtype == BF16 and torch.isfinite(a.grad).all(), parameter_name
        assert torch.equal(a.detach(), b.detach())  # parameters stay what they were, under their names


def test_a_product_without_a_form_in_fp8_is_refused_not_left_out():
    grouped_latents = MlaConfig(heads=4, head_dim=16, latent=32, latents=2, rope_dim=16)
    for config in (WgqaConfig(**POOL), RgqaConfig(**POOL, top_k=1, projections="grouped"), grouped_latents):
        with pytest.raises(LeverError, match=r"speed\.matmul: fp8 has no form of the products with attn\.w_"):
            one_pass(model(config))
    with pytest.raises(LeverError, match=r"mlp\.w_gate is 72 x 64; change the sizes of the model"):
        one_pass(model(TAKEN["gqa"], ffn_width=72))


def test_matrices_of_other_names_are_projections_too():
    """Those of a mechanism of a package, in modules of its own too: in fp8, or the run ends."""
    made = model(GqaConfig(**POOL))
    for layer in made.attention_layers():
        layer.mixer = torch.nn.Linear(64, 32, bias=False, dtype=BF16)
    with pytest.raises(LeverError, match=r"no form of the products with attn\.mixer\.weight in this mechanism"):
        one_pass(made)


def test_checkpoints_have_plain_tensors():
    made = model(TAKEN["gqa"])
    one_pass(made)
    state = made.state_dict()
    assert {type(t) for t in state.values()} == {torch.Tensor}
    other = model(TAKEN["gqa"], chosen=None)
    other.load_state_dict(state)
    assert state.keys() == other.state_dict().keys()


# ---------------------------------------------------------------- where it runs


def test_where_fp8_does_not_run_the_reason_is_given(monkeypatch):
    check_fp8("cuda", BF16, (8, 9))
    check_fp8("cuda", BF16, (9, 0))
    with pytest.raises(LeverError, match=r"runs on NVIDIA GPUs, and this run is on cpu; use speed\.matmul: none"):
        make_operations(device=torch.device("cpu"), dtype=BF16, matmul="fp8")
    with pytest.raises(LeverError, match=r"8\.9 or higher, this GPU has 8\.0"):
        check_fp8("cuda", BF16, (8, 0))
    with pytest.raises(LeverError, match=r"parallel\.precision: bf16"):
        check_fp8("cuda", torch.float32, (9, 0))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    gpu = torch.device("cuda")
    assert make_operations(device=gpu, dtype=BF16, compile="none", matmul="fp8").fp8 is fp8.scaled_product
    assert make_operations(device=gpu, dtype=BF16, compile="none").fp8 is None
    assert operations_module.Matmul.__args__ == ("none", "fp8")
