"""Which of two equal forms of an operation takes a tensor: a Triton kernel, or its twin in PyTorch."""

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
    """What is in force in the whole process: autograd runs the backward pass of a GPU in threads of its own, which see
    no context variable of the caller, and `torch.compile` cannot trace one.
    """

    twins_alone = False
    interpreted = False


_FORMS = _Forms()


@contextlib.contextmanager
def twins() -> Iterator[None]:
    """Within this context the twins in PyTorch are taken on a GPU too: the form that measurements compare with."""
    before, _FORMS.twins_alone = _FORMS.twins_alone, True
    try:
        yield
    finally:
        _FORMS.twins_alone = before


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within this context kernels take tensors of a CPU too: for checks, where TRITON_INTERPRET=1."""
    before, _FORMS.interpreted = _FORMS.interpreted, True
    try:
        yield
    finally:
        _FORMS.interpreted = before


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported for that."""
    return _TRITON


def _constant(function: _Function) -> _Function:
    """What torch.compiler.assume_constant_result does, without importing the compiler for it: that takes seconds, and
    makes a folder for compiled code in the temporary one before a launcher could say where it belongs.
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
    """Whether Triton kernels take this tensor: on an NVIDIA GPU of compute capability 8.0 or more, fp32 or narrower.

    Always False on the CPU (but for checks of kernels), so that results there depend on PyTorch alone, and where Triton
    is absent.
    """
    if tensor.dtype not in _DTYPES or not has_triton() or _FORMS.twins_alone:
        return False
    if tensor.device.type != "cuda":
        return tensor.device.type == "cpu" and _FORMS.interpreted
    return _capable(tensor.device.index or 0)


def architecture(device: torch.device) -> str:
    """The word "cpu", or the GPU's, such as "sm_90"."""
    if device.type != "cuda":
        return device.type
    return _architecture(device.index or 0)


@_constant
def _architecture(index: int) -> str:
    major, minor = _capability(index)
    return f"sm_{major}{minor}"
