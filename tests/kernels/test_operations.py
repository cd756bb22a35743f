"""Replaceable operations: the defaults are those of PyTorch, and compiled ones agree, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from headway.kernels import operations as module
from headway.kernels.attention import core, core_of_blocks
from headway.kernels.dropout import Rate, dropout, mix
from headway.kernels.elementwise import add_norm, silu_mul
from headway.kernels.levers import LeverError
from headway.kernels.loss import linear_cross_entropy_sum
from headway.kernels.norm import rms_norm
from headway.kernels.operations import Operations, compile_on, compiled, make_operations, with_norm
from headway.kernels.rope import apply_rope, rope_tables

CPU, FP32 = torch.device("cpu"), torch.float32


def test_the_defaults_are_the_plain_functions():
    made = make_operations(device=CPU, dtype=FP32)
    assert made == Operations()
    assert (made.norm, made.rope, made.silu_mul, made.add_norm) == (rms_norm, apply_rope, silu_mul, add_norm)
    assert (made.core, made.loss) == (core, linear_cross_entropy_sum)


def test_pieces_are_their_formulas_bit_by_bit():
    a, b, gain = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5)
    assert torch.equal(silu_mul(a, b), F.silu(a) * b)
    added, normed = add_norm(a, b, gain, 1e-5)
    assert torch.equal(added, a + b) and torch.equal(normed, rms_norm(a + b, gain, 1e-5))


def test_a_librarys_norm_is_used_after_the_addition_too_and_is_not_compiled(monkeypatch):
    def norm(x, gain, eps):
        return rms_norm(x, gain, eps)

    a, b, gain = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5)
    given = with_norm(Operations(), norm)
    both = given.add_norm(a, b, gain, 1e-5), add_norm(a, b, gain, 1e-5)
    assert all(torch.equal(x, y) for x, y in zip(*both, strict=True))
    monkeypatch.setattr(module, "_compile", lambda function: ("compiled", function))
    made = compiled(given)
    assert made.norm is norm and made.add_norm is given.add_norm
    assert (made.silu_mul, made.rope) == (("compiled", silu_mul), ("compiled", apply_rope))


def test_a_compiler_that_fails_is_found_before_training_and_named(monkeypatch):
    def broken(function):
        def fail(*args):
            raise RuntimeError("no such compiler\nand a long trace")

        return fail

    monkeypatch.setattr(module, "_compile", broken)
    with pytest.raises(LeverError, match=r"no such compiler\); use speed\.compile: none, or install") as caught:
        make_operations(compile="elementwise", device=CPU, dtype=FP32)
    assert "trace" not in str(caught.value) and caught.value.exit_code == 64


def test_blocks_are_compiled_on_a_cpu_alone():
    assert make_operations(compile="block", device=CPU, dtype=FP32) == Operations(core=core_of_blocks)
    with pytest.raises(LeverError, match=r"speed\.compile: block is for the CPU.*on cuda; use speed\.compile: auto"):
        make_operations(compile="block", device=torch.device("cuda"), dtype=torch.bfloat16)


def test_auto_compiles_on_a_gpu_and_not_on_the_cpu(monkeypatch):
    assert [compile_on(device, "auto") for device in ("cuda", "cpu")] == ["elementwise", "none"]
    for device in ("cuda", "cpu"):
        assert [compile_on(device, chosen) for chosen in ("none", "elementwise")] == ["none", "elementwise"]
    monkeypatch.setattr(module, "_compile", lambda function: ("compiled", function))
    tried = []
    monkeypatch.setattr(module, "try_elementwise", lambda operations, device, dtype: tried.append(device))
    made = make_operations(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert made.rope == ("compiled", apply_rope) and made.silu_mul == ("compiled", silu_mul)
    assert made.norm == ("compiled", rms_norm) and made.add_norm == ("compiled", add_norm)
    assert tried == [torch.device("cuda")]
    assert make_operations(device=CPU, dtype=FP32) == Operations() and len(tried) == 1


def test_auto_never_falls_back_in_silence(monkeypatch):
    def no_compiler(*args):
        raise RuntimeError("Cannot find a working triton installation")

    monkeypatch.setattr(module, "try_elementwise", no_compiler)
    message = r"speed\.compile: auto \(elementwise on cuda\) does not compile here.*triton.*use speed\.compile: none"
    with pytest.raises(LeverError, match=message):
        make_operations(device=torch.device("cuda"), dtype=torch.bfloat16)
    assert make_operations(device=torch.device("cuda"), dtype=torch.bfloat16, compile="none").rope is apply_rope


@pytest.fixture(scope="module")
def fused() -> Operations:
    return make_operations(compile="elementwise", device=CPU, dtype=FP32)


def test_compiled_pieces_have_the_values_and_gradients_of_the_plain_ones(fused):
    g = torch.Generator().manual_seed(3)
    x, y, z = (torch.randn(2, 3, 2, 10, generator=g, requires_grad=True) for _ in range(3))
    gain = torch.randn(10, generator=g, requires_grad=True)
    rope = rope_tables(3, 6, 100.0, CPU)

    def run(operations: Operations) -> list[torch.Tensor]:
        added, normed = operations.add_norm(x, y, gain, 1e-5)
        turned = operations.rope(operations.norm(normed, gain, 1e-5), rope)
        out = operations.silu_mul(turned, z) + added
        return [out, *torch.autograd.grad((out * out.detach().cos()).sum(), (x, y, z, gain))]

    for mine, plain in zip(run(fused), run(Operations()), strict=True):
        assert (mine - plain).norm() <= 2e-6 * plain.norm()
    with torch.no_grad():
        assert torch.allclose(fused.silu_mul(x, z), silu_mul(x, z), rtol=1e-5, atol=1e-6)


def test_compiled_dropout_has_the_bits_of_the_plain_one(fused):
    """Its integers wrap around in 64 bits, also where the compiler could compute with indices of its own."""
    x, seeds = torch.randn(5, 12, 22, requires_grad=True), mix(torch.arange(5))
    found = []
    for operations in (fused, Operations()):
        y = operations.dropout(x, seeds, *Rate.of(0.1), 3, 5)
        found.append([y, *torch.autograd.grad(y.square().sum(), x)])
    assert fused.dropout is not dropout
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
