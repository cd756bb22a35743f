"""Dispatch between the two equivalent forms of an operation: a Triton kernel, or its PyTorch twin."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., object])
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)  # bf16 in the kernels
_TRITON = importlib.util.find_spec("triton") is not None


class _Forms:
    """Process-wide flags. Context variables do not work here: autograd runs the backward pass of a GPU in other
    threads, which do not see those of the caller, and `torch.compile` cannot trace them.
    """

    twins_alone = False
    interpreted = False


_FORMS = _Forms()


@contextlib.contextmanager
def twins() -> Iterator[None]:
    """Context manager that uses the PyTorch twins on a GPU too, as the baseline of measurements."""
    before, _FORMS.twins_alone = _FORMS.twins_alone, True
    try:
        yield
    finally:
        _FORMS.twins_alone = before


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Context manager that runs kernels on CPU tensors too, for tests with TRITON_INTERPRET=1."""
    before, _FORMS.interpreted = _FORMS.interpreted, True
    try:
        yield
    finally:
        _FORMS.interpreted = before


def has_triton() -> bool:
    """Whether Triton is installed. Does not import it."""
    return _TRITON


def _constant(function: _Function) -> _Function:
    """Same as torch.compiler.assume_constant_result, without importing the compiler.

    That import takes seconds, and it creates a cache folder in the temporary folder before the launcher can set its
    location.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@_constant
def _capable(index: int) -> bool:
    return torch.version.cuda is not None and _capability(index) >= _CAPABILITY


def fused(tensor: Tensor) -> bool:
    """Whether Triton kernels run on this tensor: fp32, bf16 or fp16 on an NVIDIA GPU with compute capability >= 8.0.

    False without Triton, and always on the CPU (except in kernel tests), so that results on the CPU depend only on
    PyTorch.
    """
    if tensor.dtype not in _DTYPES or not has_triton() or _FORMS.twins_alone:
        return False
    if tensor.device.type != "cuda":
        return tensor.device.type == "cpu" and _FORMS.interpreted
    return _capable(tensor.device.index or 0)


def architecture(device: torch.device) -> str:
    """Architecture of a device: "cpu", or that of the GPU, such as "sm_90"."""
    if device.type != "cuda":
        return device.type
    return _architecture(device.index or 0)


@_constant
def _architecture(index: int) -> str:
    major, minor = _capability(index)
    return f"sm_{major}{minor}"
