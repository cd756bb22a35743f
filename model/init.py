"""Parameter initialization, which depends only on the seed, the full parameter name and the shape.

Models with different mechanisms therefore start from equal values wherever name and shape agree. The same model starts
equal under any parallel layout, because a rank draws the full tensor and keeps its shard.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import cast

import torch
from torch import Tensor, nn


def draw(name: str, shape: torch.Size, *, std: float, seed: int) -> Tensor:
    """Sample Normal(0, std^2) in fp32 on the CPU. The generator is seeded with blake2b of `seed` and `name`."""
    key = blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(module: nn.Module, *, seed: int, prefix: str = "", draw: Callable[..., Tensor] = draw) -> None:
    """Initialize every parameter in place: normal, with std and mean from `init_stds` and `init_means` of its module.

    Vectors in neither are gains and are set to 1. Buffers named in `init_stds` are initialized too (fixed random
    routers). Tensors on the meta device are skipped. `after_init` of a module, if it exists, is called when the
    module's own tensors are initialized.

    `prefix`: full name of `module` in the model with a trailing dot ("blocks.0."), to initialize it on its own.
    `draw`: replaces the sampling function, for measurements in which values do not matter.
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
