"""What the launches of Triton kernels have in common; needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LARGEST_HEAD = 128
"""Channels of one expert that routed products take; accumulators of wider ones do not fit into registers."""
_ELEMENTS = 4096
"""Of one tile of a kernel that only moves data: 32 for each of 128 threads."""


@dataclass(frozen=True)
class Shipped:
    """A kernel with the types, constants and warps with which it is launched, for compilation without a GPU.

    `signature`: of each argument that is no constant, its type in Triton's words ("*bf16", "i32"). `tensor_cores`:
    whether its products must run on them.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 1
    tensor_cores: bool = False


def padded(channels: int) -> int:
    """The power of two that holds so many channels; at least 16."""
    return max(16, 1 << max(0, channels - 1).bit_length())


def rows_per_program(channels: int) -> int:
    """Rows of so many channels that one program takes: a power of two."""
    return max(1, min(64, _ELEMENTS // padded(channels)))
