"""Selects kernels according to the `speed` section of a spec and the device."""

from __future__ import annotations

from typing import Any

import torch

from headway.kernels.delta.library import delta_on
from headway.kernels.operations import Operations, compile_on, make_operations
from headway.parallel.config import ParallelConfig, SpeedConfig


def settled(speed: SpeedConfig, parallel: ParallelConfig, device_type: str) -> dict[str, Any]:
    """The options with the values that `auto` of `compile` and `delta` have on this device, for records of a run."""
    found = {"compile": compile_on(device_type, speed.compile)}
    found["delta"] = delta_on(device_type, speed.delta, _dtype(parallel))
    return speed.model_dump(mode="json") | found


def _dtype(parallel: ParallelConfig) -> torch.dtype:
    return torch.bfloat16 if parallel.precision == "bf16" else torch.float32


def operations_of(speed: SpeedConfig, parallel: ParallelConfig, device: torch.device) -> Operations:
    """The operations that `speed` selects. Raises LeverError if an option is not available on this machine."""
    return make_operations(
        compile=speed.compile,
        attention=speed.attention,
        norm=speed.norm,
        loss=speed.loss,
        matmul=speed.matmul,
        delta=speed.delta,
        device=device,
        dtype=_dtype(parallel),
    )
