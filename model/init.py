"""Initial parameters, a function of (seed, full parameter name, shape) alone.

Two models that differ in mechanism start from equal values wherever name and shape agree, and so does the same model
under another layout: a rank draws the full tensor and keeps its slice.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import cast

import torch
from torch import Tensor, nn


def draw(name: str, shape: torch.Size, *, std: float, seed: int) -> Tensor:
    """Normal(0, std^2), fp32, on CPU; keyed by blake2b of seed and name."""
    key = blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(module: nn.Module, *, seed: int, prefix: str = "") -> None:
    """Gains (vectors) become 1; a matrix is drawn with the std that its module states in `init_stds`.

    `prefix` is the module's place in the model ("blocks.0.attn."), for a module initialised on its own.
    """
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            stds = cast(dict[str, float], owner.init_stds)  # nn.Module calls every attribute a Tensor or Module
            full_name = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
            parameter.copy_(draw(full_name, parameter.shape, std=stds[name], seed=seed))
