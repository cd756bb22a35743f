"""Constants and helpers for launching Triton kernels. Does not import Triton."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

LARGEST_HEAD = 128
"""Maximum channels of one expert in routed matmuls. Accumulators of wider experts do not fit into registers."""

_ELEMENTS = 4096
"""Elements per tile of kernels that only move data: 32 for each of 128 threads."""


TILE_PAIRS = 128
"""(Token, expert) pairs per tile of the routed projection."""

CHUNK_STEP = 64
"""Lengths of chunks in the routed weight gradient are multiples of it, and so of every kernel's tile."""


class ScheduleSizes(NamedTuple):
    """Sizes of the schedule of the routed kernels. They depend on shapes only, so nothing is read from the device."""

    chunk: int  # pairs per program of the weight gradient: twice the mean length of a list
    tiles: int  # entries for tiles of the projection, unused ones included
    items: int  # entries for chunks of the weight gradient, unused ones included


def schedule_sizes(pairs: int, experts: int) -> ScheduleSizes:
    """Sizes for P `pairs` in lists of H `experts`."""
    chunk = max(1, -(-2 * pairs // (experts * CHUNK_STEP))) * CHUNK_STEP
    return ScheduleSizes(chunk, pairs // TILE_PAIRS + experts, pairs // chunk + experts)


@dataclass(frozen=True)
class Shipped:
    """A kernel with its launch configuration, for compilation without a GPU.

    signature: Triton type ("*bf16", "i32") of each argument that is not a constant.
    tensor_cores: Whether its matmuls must use tensor cores.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 1
    tensor_cores: bool = False


def padded(channels: int) -> int:
    """`channels` rounded up to a power of two, at least 16."""
    return max(16, 1 << max(0, channels - 1).bit_length())


def rows_per_program(channels: int) -> int:
    """Rows of `channels` channels per program, a power of two."""
    return max(1, min(64, _ELEMENTS // padded(channels)))


def on_device_of_first(launch: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorator: run a launch function with the device of its first tensor argument as the current device.

    Triton launches on the current device and its stream, whatever the device of the tensors. On a CPU nothing is set.
    """

    @functools.wraps(launch)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first = next(argument for argument in args if isinstance(argument, Tensor))
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            return launch(*args, **kwargs)

    return guarded
