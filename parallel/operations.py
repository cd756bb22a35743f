"""The operations that a spec's levers ask for, on the device it runs on."""

from __future__ import annotations

import torch

from headway.kernels.operations import Operations, make_operations
from headway.parallel.config import ParallelConfig, SpeedConfig


def operations_of(speed: SpeedConfig, parallel: ParallelConfig, device: torch.device) -> Operations:
    """Raises LeverError where a lever of `speed` cannot be used on this machine."""
    return make_operations(
        compile=speed.compile,
        attention=speed.attention,
        norm=speed.norm,
        loss=speed.loss,
        device=device,
        dtype=torch.bfloat16 if parallel.precision == "bf16" else torch.float32,
    )
