"""Which of two equal forms of an operation takes a tensor: a Triton kernel, or its twin in PyTorch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)  # bf16 in the kernels
_ALLOWED = ContextVar("allowed", default=True)


@contextlib.contextmanager
def twins() -> Iterator[None]:
    """Within this context the twins in PyTorch are taken on a GPU too: the form that measurements compare with."""
    token = _ALLOWED.set(False)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capable(index: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= _CAPABILITY


def fused(tensor: Tensor) -> bool:
    """Whether Triton kernels take this tensor: on an NVIDIA GPU of compute capability 8.0 or more, fp32 or narrower.

    Always False on the CPU, so that results there depend on PyTorch alone, and where Triton is absent.
    """
    if tensor.device.type != "cuda" or tensor.dtype not in _DTYPES or not has_triton() or not _ALLOWED.get():
        return False
    return _capable(tensor.device.index or 0)
