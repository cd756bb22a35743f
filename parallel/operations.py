"""Selects kernels according to the `speed` section of a spec and the device."""

from __future__ import annotations

import torch

from headway.kernels.operations import Operations, make_operations
from headway.parallel.config import ParallelConfig, SpeedConfig


def operations_of(speed: SpeedConfig, parallel: ParallelConfig, device: torch.device) -> Operations:
    """The operations that `speed` selects. Raises LeverError if an option is not available on this machine."""
    return make_operations(
        compile=speed.compile,
        attention=speed.attention,
        norm=speed.norm,
        loss=speed.loss,
        device=device,
        dtype=torch.bfloat16 if parallel.precision == "bf16" else torch.float32,
    )
