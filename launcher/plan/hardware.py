"""Assumptions of a plan about GPUs, networks and software: one table each, with the source of every row.

This project measured none of these numbers. The datasheet figures are upper limits. `ASSUMPTIONS` gives the share of
them that training is expected to reach, as a low and a high value, and every estimate of a plan is a range between the
two. The shares were set by hand, with knowledge of published speeds near 1B parameters.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from headway.launcher.base.errors import SpecError

GIB = float(1 << 30)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator. FLOP/s are for dense matrix products, in the formats of `parallel.precision`."""

    name: str
    bf16_flops: float
    fp32_flops: float  # without TF32, which PyTorch disables by default
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float  # to another GPU of the host, per direction
    per_host: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network between hosts. Every GPU has an equal share of its host's adapters."""

    name: str
    bytes_per_s: float  # per GPU and direction
    source: str


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Shares of the datasheet's figures that are reached, and times that no datasheet states."""

    matmul: float  # share of the matrix rate, for all matrix products except the attention core's
    core: float  # the same, for the attention core with flash attention
    document_core: float  # the same, within documents: one call of variable length, or a call per document
    memory: float  # share of the memory rate, for element-wise work
    passes_over_kept: float  # times each byte kept for the backward pass is read or written by element-wise work
    exchange: float  # share of a link's or network's rate
    hidden: float  # share of the exchanges that overlap with the passes (`parallel.overlap`) that takes no time
    latency_s: float  # latency of one exchange between ranks
    launch_s: float  # least time of a block's forward and backward pass: launching its kernels


LOW = Assumptions(
    matmul=0.48,
    core=0.25,
    document_core=0.15,
    memory=0.70,
    passes_over_kept=5.0,
    exchange=0.50,
    hidden=0.30,
    latency_s=40e-6,
    launch_s=1.5e-3,
)
HIGH = Assumptions(
    matmul=0.66,
    core=0.40,
    document_core=0.35,
    memory=0.90,
    passes_over_kept=3.0,
    exchange=0.85,
    hidden=0.80,
    latency_s=15e-6,
    launch_s=0.6e-3,
)
ASSUMPTIONS = (LOW, HIGH)

RESERVED_BYTES = 2.0 * GIB
"""CUDA context, communication buffers and workspaces of libraries: assumed, not measured."""

USABLE = 0.94
"""Share of the remaining memory that can be used despite fragmentation: assumed, not measured."""

_SHEET = "NVIDIA datasheet, dense; not measured here"

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",
            bf16_flops=989e12,
            fp32_flops=67e12,
            memory_bytes=80e9,
            memory_bytes_per_s=3.35e12,
            link_bytes_per_s=450e9,
            per_host=8,
            source=f"H100 SXM5 80 GB: {_SHEET}",
        ),
        Gpu(
            name="h200",
            bf16_flops=989e12,
            fp32_flops=67e12,
            memory_bytes=141e9,
            memory_bytes_per_s=4.8e12,
            link_bytes_per_s=450e9,
            per_host=8,
            source=f"H200 SXM 141 GB: {_SHEET}",
        ),
        Gpu(
            name="a100",
            bf16_flops=312e12,
            fp32_flops=19.5e12,
            memory_bytes=80e9,
            memory_bytes_per_s=2.039e12,
            link_bytes_per_s=300e9,
            per_host=8,
            source=f"A100 SXM4 80 GB: {_SHEET}",
        ),
        Gpu(
            name="l40s",
            bf16_flops=362e12,
            fp32_flops=91.6e12,
            memory_bytes=48e9,
            memory_bytes_per_s=864e9,
            link_bytes_per_s=32e9,
            per_host=8,
            source=f"L40S 48 GB, PCIe 4 x16: {_SHEET}",
        ),
        Gpu(
            name="rtx3090",
            bf16_flops=71e12,
            fp32_flops=35.6e12,
            memory_bytes=24e9,
            memory_bytes_per_s=936e9,
            link_bytes_per_s=32e9,
            per_host=8,
            source=f"GeForce RTX 3090 24 GB, PCIe 4 x16: {_SHEET}",
        ),
    )
}

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network(name="ndr", bytes_per_s=50e9, source="InfiniBand NDR, 400 Gb/s per GPU: line rate; not measured here"),
        Network(name="hdr", bytes_per_s=25e9, source="InfiniBand HDR, 200 Gb/s per GPU: line rate; not measured here"),
        Network(
            name="ethernet",
            bytes_per_s=12.5e9 / 8,
            source="Ethernet, 100 Gb/s per host of 8 GPUs: line rate; not measured here",
        ),
    )
}

T = TypeVar("T")


def find_gpu(name: str) -> Gpu:
    """Row of `GPUS` by name. Raises SpecError with the known names."""
    return _find(GPUS, name, "--gpu")


def find_network(name: str) -> Network:
    """Row of `NETWORKS` by name. Raises SpecError with the known names."""
    return _find(NETWORKS, name, "--network")


def usable_bytes(gpu: Gpu) -> float:
    """The part of a GPU's memory that a run can use, by assumption."""
    return (gpu.memory_bytes - RESERVED_BYTES) * USABLE


def _find(table: Mapping[str, T], name: str, option: str) -> T:
    if name.lower() in table:
        return table[name.lower()]
    close = difflib.get_close_matches(name.lower(), table, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise SpecError(f"{option}: {name!r} is not known.{hint} Use one of: {', '.join(table)}")
