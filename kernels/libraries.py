"""Norms and losses of optional libraries, with the signatures of our own.

Legend: T tokens, d width, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.levers import APEX_MODULES, LIGER_MODULE, LeverError, importable
from headway.kernels.loss import IGNORED, VocabularyPart, linear_cross_entropy_sum
from headway.kernels.norm import rms_norm

Norm = Literal["torch", "apex", "liger"]
Loss = Literal["chunked", "torch", "liger"]


def norm_of(name: Norm, *, device_type: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """RMSNorm of PyTorch or a library. Raises LeverError (64) if the library is not available."""
    if name == "torch":
        return rms_norm
    present = all(map(importable, APEX_MODULES)) if name == "apex" else importable(LIGER_MODULE)
    _check("norm", name, present, device_type, "use speed.norm: torch, or torch with speed.compile: elementwise")
    if name == "apex":
        fused = _attribute("norm", name, "apex.normalization.fused_layer_norm", "fused_rms_norm_affine")
        return lambda x, gain, eps: fused(x, gain, (x.shape[-1],), eps)
    function = _attribute("norm", name, "liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    # "gemma" multiplies by the gain in fp32 and rounds once, as PyTorch does. in_place is False, because other
    # operations may still read the gradient of the norm's output.
    return lambda x, gain, eps: cast(Tensor, function.apply(x, gain, eps, 0.0, "gemma", False))


def loss_of(name: Loss, *, device_type: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """`linear_cross_entropy_sum`, or the equivalent of PyTorch or a library, which do not support a sharded vocabulary.

    PyTorch's function returns the loss, and scales the gradient, in the dtype of the hidden states. In bf16 that has
    only 8 bits, so bf16 is refused. Raises LeverError (64) if the function is not available.
    """
    if name == "chunked":
        return linear_cross_entropy_sum
    other = "liger" if name == "torch" else "torch" if dtype == torch.float32 else None
    legal = "use speed.loss: chunked" + (f" or {other}" if other else "")
    if name == "torch":
        if dtype != torch.float32:
            raise LeverError(f"speed.loss: torch rounds the loss to bf16 in parallel.precision: bf16; {legal}")
        if not hasattr(F, "linear_cross_entropy"):
            raise LeverError(f"speed.loss: torch needs PyTorch 2.13 or later, this is {torch.__version__}; {legal}")
        return torch_loss
    _check("loss", name, importable(LIGER_MODULE), device_type, legal)
    module = _attribute(
        "loss", name, "liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss"
    )
    fused = module(ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32)

    def liger_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, part: VocabularyPart | None = None) -> Tensor:
        _whole(part)
        return cast(Tensor, fused(weight, hidden, labels))

    return liger_loss


def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, part: VocabularyPart | None = None) -> Tensor:
    """hidden [T, d], weight [V, d], labels [T] -> scalar. PyTorch's chunked loss; gradients in the forward pass."""
    _whole(part)
    functional: Any = F  # the function exists in PyTorch 2.13 and later
    nn: Any = torch.nn
    options = nn.LinearCrossEntropyOptions(acc_policy="accurate")
    return cast(
        Tensor,
        functional.linear_cross_entropy(hidden, weight, labels, reduction="sum", ignore_index=IGNORED, options=options),
    )


def _whole(part: VocabularyPart | None) -> None:
    assert part is None, "with a sharded vocabulary, the spec check allows only the chunked loss"


def _check(key: str, name: str, present: bool, device_type: str, legal: str) -> None:
    if not present:
        what = f"NVIDIA apex with {' and '.join(APEX_MODULES)}" if name == "apex" else "liger-kernel"
        raise LeverError(f"speed.{key}: {name} needs {what}, which is not installed; {legal}")
    if device_type != "cuda":
        raise LeverError(f"speed.{key}: {name} has kernels for GPUs alone, and this run is on {device_type}; {legal}")


def _attribute(key: str, name: str, module: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, OSError) as error:
        raise LeverError(
            f"speed.{key}: {name} is installed without {module}.{attribute} ({error}); install another release, or "
            f"leave speed.{key} out"
        ) from error
