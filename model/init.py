"""Initial parameters, a function of (seed, full parameter name, shape) alone.

Two models that differ in mechanism start from equal values wherever name and shape agree, and so does the same model
under another layout: a rank draws the full tensor and keeps its slice.
"""

from __future__ import annotations

from collections.abc import Callable
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
def initialise(module: nn.Module, *, seed: int, prefix: str = "", draw: Callable[..., Tensor] = draw) -> None:
    """Draw every parameter: mean + normal with the std that its module states in `init_stds` and `init_means`.

    Vectors in neither are gains and become 1. Buffers named in `init_stds` are drawn too (fixed random routers). A
    module with `after_init` is told when its own are drawn. `prefix` is the module's place in the model
    ("blocks.0.attn."), for a module initialised on its own. Another `draw` serves measurements, where values do not
    matter; on the meta device there is nothing to draw.
    """
    for path, owner in module.named_modules():
        stds: dict[str, float] = getattr(owner, "init_stds", {})
        means: dict[str, float] = getattr(owner, "init_means", {})
        own = [
            *owner.named_parameters(recurse=False),
            *((n, b) for n, b in owner.named_buffers(recurse=False) if n in stds),
        ]
        for name, tensor in own:
            if tensor.is_meta:
                continue
            if tensor.ndim == 1 and name not in stds and name not in means:
                tensor.fill_(1.0)
                continue
            full_name = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
            drawn = draw(full_name, tensor.shape, std=stds[name], seed=seed)
            tensor.copy_(drawn + means[name] if name in means else drawn)
        if hasattr(owner, "after_init") and not any(tensor.is_meta for _, tensor in own):
            cast(Callable[[], None], owner.after_init)()
