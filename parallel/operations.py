"""Selects kernels according to the `speed` section of a spec and the device."""

from __future__ import annotations

from typing import Any

import torch

from headway.kernels.operations import Operations, compile_on, make_operations
from headway.parallel.config import ParallelConfig, SpeedConfig


def settled(speed: SpeedConfig, device_type: str) -> dict[str, Any]:
    """The options with the value that `auto` of `compile` has on this device, for records of a run."""
    return speed.model_dump(mode="json") | {"compile": compile_on(device_type, speed.compile)}


def operations_of(speed: SpeedConfig, parallel: ParallelConfig, device: torch.device) -> Operations:
    """The operations that `speed` selects. Raises LeverError if an option is not available on this machine."""
    return make_operations(
        compile=speed.compile,
        attention=speed.attention,
        norm=speed.norm,
        loss=speed.loss,
        matmul=speed.matmul,
        device=device,
        dtype=torch.bfloat16 if parallel.precision == "bf16" else torch.float32,
    )
