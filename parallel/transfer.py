"""Copies of a step's inputs to the device: on a GPU ahead of the step, from pinned memory in a stream of its own.

A copy from ordinary memory in the stream of the passes makes the host wait for all kernels that are queued. On a CPU
inputs are used where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Transfer(Protocol):
    """Brings host tensors to the device of the passes. `key`: identifies the tensors of one micro-batch."""

    ahead: bool  # whether `begin` does anything

    def begin(self, key: object, tensors: Sequence[Tensor]) -> None:
        """Start to copy tensors that `take` will ask for later."""
        ...

    def take(self, key: object, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors on the device, for the current stream: the copies of `begin`, or copied now."""
        ...

    def drop(self) -> None:
        """Forget copies that were not taken. The middle stages of a pipeline take none."""
        ...


class InPlace:
    """For a CPU: the tensors themselves."""

    ahead = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self, key: object, tensors: Sequence[Tensor]) -> None:
        """Do nothing."""

    def take(self, key: object, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.to(self._device) for t in tensors]

    def drop(self) -> None:
        """Do nothing."""


class SideStream:
    """For a GPU. `cuda`: `torch.cuda`, or a stand-in with its `Stream`, `Event`, `stream` and `current_stream`."""

    ahead = True

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda, self._stream = device, cuda, cuda.Stream(device)
        self._copies: dict[int, tuple[object, list[Tensor], Any]] = {}

    def begin(self, key: object, tensors: Sequence[Tensor]) -> None:
        # `key` is kept, so that no other object gets its id.
        with self._cuda.stream(self._stream):
            # torch keeps the pinned memory until the copy from it has completed.
            copies = [t.pin_memory().to(self._device, non_blocking=True) for t in tensors]
            copied = self._cuda.Event()
            copied.record(self._stream)
        self._copies[id(key)] = (key, copies, copied)

    def take(self, key: object, tensors: Sequence[Tensor]) -> list[Tensor]:
        if id(key) not in self._copies:
            self.begin(key, tensors)
        _, copies, copied = self._copies.pop(id(key))
        current = self._cuda.current_stream(self._device)
        current.wait_event(copied)
        for copy in copies:
            # Without this, freed memory would be used for the next copy while kernels still read it.
            copy.record_stream(current)
        return copies

    def drop(self) -> None:
        self._copies.clear()


def transfer_to(device: torch.device) -> Transfer:
    """The way in which inputs come to this device."""
    return SideStream(device) if device.type == "cuda" else InPlace(device)
