"""Copies of tensors in the host's memory, laid out as the safetensors file that is written from them.

The memory is kept between saves. New memory costs several times as much as the copy, because the kernel clears each of
its pages when it is first written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from headway.parallel.tensors.spans import Span

SPANS = "spans"
"""Key of the file's metadata: JSON with the span of each tensor of which the file holds a part."""
_BLOCK = 8 << 20  # bytes that are written and hashed at once
_TYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class Image:
    """A safetensors file in memory: its header, and its data as bytes. `whole`: keys of tensors that it holds in full;
    `spans`: number of the others.
    """

    header: bytes
    data: Tensor
    whole: list[str]
    spans: int


class HostBuffer:
    """Memory of the host that grows to the largest image. `pinned`: page-locked where the host allows it,
    for copies from a GPU.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned, self._memory = pinned, torch.empty(0, dtype=torch.uint8)

    def image(self, held: Mapping[str, tuple[Span, Tensor]]) -> Image:
        """Copy tensors, each [span.size] or of the whole shape. The previous image becomes invalid."""
        # As the safetensors library does it: larger types first, so that all elements are aligned.
        keys = sorted(held, key=lambda key: (-held[key][1].element_size(), key))
        header, end = dict[str, Any](), 0
        places: dict[str, slice] = {}
        for key in keys:
            span, tensor = held[key]
            shape = list(span.shape) if span.is_whole else [span.size]
            begin, end = end, end + tensor.nbytes
            header[key] = {"dtype": _TYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
            places[key] = slice(begin, end)
        spans = {key: _json(span) for key, (span, _) in sorted(held.items()) if not span.is_whole}
        about = {"__metadata__": {SPANS: json.dumps(spans, separators=(",", ":"))}} if spans else {}
        self._reserve(end)
        for key in keys:
            tensor = held[key][1]
            copy = self._memory[places[key]].view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor, non_blocking=self._pinned)
        if self._pinned:
            torch.cuda.synchronize()
        return Image(
            header=_padded(json.dumps(about | header, separators=(",", ":")).encode()),
            data=self._memory[:end],
            whole=sorted(held.keys() - spans.keys()),
            spans=len(spans),
        )

    def _reserve(self, size: int) -> None:
        if self._memory.numel() < size:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free it first
            try:
                self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            except RuntimeError:
                if not self._pinned:
                    raise
                self._pinned = False  # the host does not allow to lock so much
                self._memory = torch.empty(size, dtype=torch.uint8)


def write_image(path: Path, image: Image) -> tuple[int, str]:
    """Write a new file. Returns its size in bytes and its xxh3-128 hash, that of the memory it was written from."""
    data: Any = image.data.numpy()
    digest = xxhash.xxh3_128(image.header)
    with path.open("xb") as file:
        file.write(image.header)
        for begin in range(0, len(data), _BLOCK):
            block = data[begin : begin + _BLOCK]
            file.write(block)
            digest.update(block)
    return len(image.header) + len(data), digest.hexdigest()


def _json(span: Span) -> dict[str, Any]:
    cut = {"dim": span.dim, "ranks": span.ranks, "rank": span.rank} if span.ranks > 1 else {}
    return {"shape": list(span.shape), **cut, "start": span.start}


def _padded(header: bytes) -> bytes:
    """With its length before it, and with spaces up to a multiple of 8 bytes."""
    size = -(-len(header) // 8) * 8
    return size.to_bytes(8, "little") + header.ljust(size)
