"""RMSNorm equals its formula, and takes its mean in fp32."""

import torch

from headway.kernels.norm import rms_norm


def formula(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def test_equals_the_formula_with_gradients():
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(7, dtype=torch.float64, requires_grad=True)
    out, expected = rms_norm(x, gain, 1e-5), formula(x, gain, 1e-5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    upstream = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, (x, gain), upstream), torch.autograd.grad(expected, (x, gain), upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_bf16_takes_the_mean_in_fp32():
    x, gain = torch.randn(4, 513).bfloat16() * 50, torch.ones(513).bfloat16()
    wide = formula(x.float(), gain.float(), 1e-5)
    # one rounding to bf16 (8 bits) of the fp32 result
    torch.testing.assert_close(rms_norm(x, gain, 1e-5).float(), wide, rtol=2**-8, atol=0)
