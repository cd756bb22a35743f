"""Memory-bound functions of a block, as pure functions that a compiler can fuse.

Legend: d width, F FFN width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headway.kernels.norm import rms_norm


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., F]: the inner part of SwiGLU (Shazeer, 2020, arXiv 2002.05202)."""
    return F.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function of x (Hendrycks and Gimpel, 2016, arXiv 1606.08415)."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the authors' tanh approximation, as in GPT-2."""
    return F.gelu(x, approximate="tanh")


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, both [..., F]: the inner part of GEGLU (Shazeer, 2020, arXiv 2002.05202), as in T5 v1.1."""
    return F.gelu(gate, approximate="tanh") * up


def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return F.relu(x)


def add_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and its RMSNorm; x, y [..., d], gain [d]. One pass over memory if compiled."""
    added = x + y
    return added, rms_norm(added, gain, eps)


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * gain + bias over the last dimension (Ba et al., 2016, arXiv 1607.06450).

    x [..., d], gain and bias [d].
    """
    return F.layer_norm(x, (x.shape[-1],), gain, bias, eps)


def add_layer_norm(x: Tensor, y: Tensor, gain: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and its LayerNorm; x, y [..., d], gain and bias [d]."""
    added = x + y
    return added, layer_norm(added, gain, bias, eps)
