"""Norms and losses of libraries: the calls and their arguments, and the messages if a library is missing."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headway.kernels import libraries
from headway.kernels.levers import LeverError
from headway.kernels.libraries import loss_of, norm_of
from headway.kernels.loss import linear_cross_entropy_sum
from headway.kernels.norm import rms_norm

BF16, FP32 = torch.bfloat16, torch.float32


def install(monkeypatch: pytest.MonkeyPatch, tops: tuple[str, ...], path: str, **names: Any) -> None:
    """A module `path` with `names`, and `tops` that look installed."""
    module = ModuleType(path)
    vars(module).update(names)
    for i in range(1, path.count(".") + 1):
        parent = ".".join(path.split(".")[:i])
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, path, module)
    monkeypatch.setattr(libraries, "importable", lambda name: name in tops)


def test_without_a_lever_norm_and_loss_are_our_own():
    assert norm_of("torch", device_type="cpu") is rms_norm
    assert loss_of("chunked", device_type="cpu", dtype=BF16) is linear_cross_entropy_sum


def test_apex_is_called_with_the_normalized_shape(monkeypatch):
    def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
        return F.rms_norm(input, normalized_shape, weight, eps)

    install(
        monkeypatch,
        libraries.APEX_MODULES,
        "apex.normalization.fused_layer_norm",
        fused_rms_norm_affine=fused_rms_norm_affine,
    )
    x, gain = torch.randn(3, 5, 7), torch.randn(7)
    assert torch.equal(norm_of("apex", device_type="cuda")(x, gain, 1e-5), rms_norm(x, gain, 1e-5))


def test_a_package_apex_without_the_fused_modules_is_not_apex(monkeypatch):
    monkeypatch.setattr(libraries, "importable", lambda name: name == "apex")
    with pytest.raises(LeverError, match=r"speed\.norm: apex needs NVIDIA apex .*fused_layer_norm_cuda.*norm: torch"):
        norm_of("apex", device_type="cuda")


def test_ligers_norm_rounds_once_and_leaves_gradients_alone(monkeypatch):
    class LigerRMSNormFunction:
        @staticmethod
        def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
            assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
            return F.rms_norm(X, (X.shape[-1],), W, eps)

    install(monkeypatch, ("liger_kernel",), "liger_kernel.ops.rms_norm", LigerRMSNormFunction=LigerRMSNormFunction)
    x, gain = torch.randn(3, 5, 7), torch.randn(7)
    assert torch.equal(norm_of("liger", device_type="cuda")(x, gain, 1e-5), rms_norm(x, gain, 1e-5))


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(67, 12, generator=g, dtype=dtype, requires_grad=True)  # [T, d]
    weight = torch.randn(41, 12, generator=g, dtype=dtype, requires_grad=True)  # [V, d]
    labels = torch.randint(0, 41, (67,), generator=g)
    labels[::5] = -100
    return hidden, weight, labels


def test_pytorchs_chunked_loss_is_ours_with_gradients():
    hidden, weight, labels = example(FP32)
    loss = loss_of("torch", device_type="cpu", dtype=FP32)
    both = []
    for function in (loss, linear_cross_entropy_sum):
        total = function(hidden, weight, labels)
        both.append([total, *torch.autograd.grad(total / 50, (hidden, weight))])
    for mine, theirs in zip(*both, strict=True):
        assert (mine - theirs).norm() <= 2e-6 * theirs.norm()
    assert not both[0][1][labels == -100].any()


def test_pytorchs_loss_of_ignored_labels_alone_is_zero():
    hidden, weight, labels = example(FP32)
    total = loss_of("torch", device_type="cpu", dtype=FP32)(hidden, weight, torch.full_like(labels, -100))
    assert total == 0 and not torch.autograd.grad(total, hidden)[0].any()


def test_pytorchs_loss_is_refused_in_bf16_and_where_it_is_missing(monkeypatch):
    with pytest.raises(LeverError, match=r"speed\.loss: torch rounds the loss to bf16.* chunked or liger"):
        loss_of("torch", device_type="cuda", dtype=BF16)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(LeverError, match=r"speed\.loss: torch needs PyTorch 2\.13"):
        loss_of("torch", device_type="cuda", dtype=FP32)


def test_ligers_loss_sums_in_fp32_and_ignores_what_we_ignore(monkeypatch):
    class LigerFusedLinearCrossEntropyLoss:
        def __init__(self, ignore_index=-100, reduction="mean", accum_dtype=None):
            assert (ignore_index, reduction, accum_dtype) == (-100, "sum", FP32)

        def __call__(self, lin_weight, _input, target, bias=None):
            return F.cross_entropy((_input @ lin_weight.T).float(), target, ignore_index=-100, reduction="sum")

    path = "liger_kernel.transformers.fused_linear_cross_entropy"
    install(monkeypatch, ("liger_kernel",), path, LigerFusedLinearCrossEntropyLoss=LigerFusedLinearCrossEntropyLoss)
    args = example(FP32)
    total = loss_of("liger", device_type="cuda", dtype=BF16)(*args)
    torch.testing.assert_close(total, linear_cross_entropy_sum(*args))


def test_recommended_alternatives_are_not_refused():  # torch's loss is refused in bf16
    for dtype, legal in ((FP32, "chunked or torch"), (BF16, "chunked")):
        with pytest.raises(LeverError, match=rf"use speed\.loss: {legal}$"):
            loss_of("liger", device_type="cpu", dtype=dtype)


@pytest.mark.parametrize(("key", "find"), [("norm", norm_of), ("loss", loss_of)])
def test_liger_on_the_cpu_and_a_missing_or_foreign_liger_say_what_to_use(monkeypatch, key, find):
    dtype = {"dtype": BF16} if key == "loss" else {}
    monkeypatch.setattr(libraries, "importable", lambda name: False)
    with pytest.raises(LeverError, match=rf"speed\.{key}: liger needs liger-kernel, which is not installed; use speed"):
        find("liger", device_type="cuda", **dtype)
    monkeypatch.setattr(libraries, "importable", lambda name: name == "liger_kernel")
    with pytest.raises(LeverError, match=rf"speed\.{key}: liger has kernels for GPUs alone.* use speed\.{key}: "):
        find("liger", device_type="cpu", **dtype)
    with pytest.raises(LeverError, match=rf"speed\.{key}: liger is installed without liger_kernel\."):
        find("liger", device_type="cuda", **dtype)
