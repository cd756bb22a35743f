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


def add_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and its RMSNorm; x, y [..., d], gain [d]. One pass over memory if compiled."""
    added = x + y
    return added, rms_norm(added, gain, eps)
