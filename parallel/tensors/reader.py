"""Read the tensors of a checkpoint, whole or in the spans of any layout. Bytes that are not needed are not read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headway.parallel.config import CheckpointError, StrictModel
from headway.parallel.manifest import Checkpoint
from headway.parallel.tensors.image import SPANS
from headway.parallel.tensors.spans import Span, copy_shared, shared, whole

_MOMENTS = ("exp_avg/", "exp_avg_sq/")


class _Entry(StrictModel):
    """A span in the metadata of a file."""

    shape: list[int] = Field(max_length=8)
    dim: int = Field(default=0, ge=0)
    ranks: int = Field(default=1, ge=1)
    rank: int = Field(default=0, ge=0)
    start: int = Field(ge=0)


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by key, loaded lazily.

    Raises CheckpointError if a file is not safetensors, or if the spans of a tensor do not add up to the whole.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path, self._open = checkpoint.path, dict[Path, Any]()
        self._whole: dict[str, Path] = {}
        self._spans: dict[str, list[tuple[Span, Path]]] = {}
        for name, entry in checkpoint.manifest.files.items():
            self._whole |= dict.fromkeys(entry.tensors, checkpoint.path / name)
            if entry.spans:
                self._add_spans(checkpoint.path / name, entry.spans)
        for key, found in self._spans.items():
            self._check(key, found)

    def __getitem__(self, key: str) -> Tensor:
        if key in self._whole:
            return self._stored(key, self._whole[key])
        shape = self.shape(key)
        tensor = torch.empty(shape, dtype=self._stored(key, self._spans[key][0][1]).dtype)
        self.copy(key, whole(shape), tensor.view(-1))
        return tensor

    def copy(self, key: str, span: Span, target: Tensor) -> None:
        """Copy the elements of a span to `target`, [span.size], contiguous.

        Raises CheckpointError if the tensor has another shape than that of the span.
        """
        shape = self.shape(key)
        if shape != span.shape:
            raise CheckpointError(
                f"{self._path}: {key} is {list(shape)}, not {list(span.shape)}; use the spec it was trained with"
            )
        held = [(whole(shape), self._whole[key])] if key in self._whole else self._spans[key]
        if span.ranks > 1 and held[0][0].ranks > 1 and span.dim != held[0][0].dim:
            copy_shared(self[key].view(-1), target, shared(whole(shape), span))
            return
        for source, path in held:
            if blocks := shared(source, span):
                copy_shared(self._stored(key, path).view(-1), target, blocks)

    def __iter__(self) -> Iterator[str]:
        yield from self._whole
        yield from self._spans

    def __len__(self) -> int:
        return len(self._whole) + len(self._spans)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without loading it."""
        if key not in self._whole:
            return self._spans[key][0][0].shape
        path = self._whole[key]
        file = self._file(path)
        try:
            return tuple(file.get_slice(key).get_shape())
        except SafetensorError as e:
            raise CheckpointError(f"{path}: {key} cannot be read ({e})") from e

    def _stored(self, key: str, path: Path) -> Tensor:
        file = self._file(path)
        try:
            return file.get_tensor(key)
        except SafetensorError as e:
            raise CheckpointError(f"{path}: {key} cannot be read ({e})") from e

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"{path}: not a safetensors file ({e}); restore it from a copy") from e
        return self._open[path]

    def _add_spans(self, path: Path, count: int) -> None:
        """Add the spans that a file says it holds."""
        file = self._file(path)
        try:
            found = json.loads((file.metadata() or {})[SPANS])
            entries = {key: _Entry.model_validate(value) for key, value in found.items()}
            spans = {key: _span(entry, file.get_slice(key).get_shape()) for key, entry in entries.items()}
        except (ValidationError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            why = f"{type(e).__name__}: {e!s:.200}"
            raise CheckpointError(f"{path}: its list of spans is not valid ({why}); restore it from a copy") from e
        if len(spans) != count:
            raise CheckpointError(f"{path}: {len(spans)} spans, the manifest says {count}; restore it from a copy")
        for key, span in spans.items():
            self._spans.setdefault(key, []).append((span, path))

    def _check(self, key: str, found: list[tuple[Span, Path]]) -> None:
        """Check that the spans of a tensor, sorted, follow each other without gaps and without overlaps."""
        found.sort(key=lambda item: (item[0].rank, item[0].start))
        first = found[0][0]
        rank, at = 0, 0
        for span, path in found:
            if (span.shape, span.dim, span.ranks) != (first.shape, first.dim, first.ranks) or key in self._whole:
                raise CheckpointError(f"{path}: {key} differs from what other files hold of it; restore it from a copy")
            if at == first.part_size:
                rank, at = rank + 1, 0
            if (span.rank, span.start) != (rank, at):
                break
            at = span.stop
        else:
            if (rank, at) == (first.ranks - 1, first.part_size):
                return
        raise CheckpointError(
            f"{self._path}: the files do not hold every element of {key} exactly once (rank {rank} of {first.ranks}, "
            f"element {at}); use another checkpoint"
        )


class FreshMoments(Tensors):
    """The tensors of a checkpoint with optimizer moments of 0, which are not read."""

    def __getitem__(self, key: str) -> Tensor:
        return torch.zeros(self.shape(key)) if key.startswith(_MOMENTS) else super().__getitem__(key)

    def copy(self, key: str, span: Span, target: Tensor) -> None:
        if key.startswith(_MOMENTS):
            target.zero_()
        else:
            super().copy(key, span, target)


def _span(entry: _Entry, stored: list[int]) -> Span:
    """Raises ValueError if the entry contradicts itself or the size of what is stored."""
    shape, dim, ranks = tuple(entry.shape), entry.dim, entry.ranks
    if len(stored) != 1 or min(shape, default=1) < 1 or entry.rank >= ranks:
        raise ValueError(f"shape {list(shape)}, rank {entry.rank} of {ranks}, stored as {stored}")
    if ranks > 1 and (dim >= len(shape) or shape[dim] % ranks):
        raise ValueError(f"shape {list(shape)} is not cut into {ranks} along dimension {dim}")
    span = Span(shape=shape, dim=dim, ranks=ranks, rank=entry.rank, start=entry.start, stop=entry.start + stored[0])
    if span.stop > span.part_size:
        raise ValueError(f"elements up to {span.stop} of {span.part_size}")
    return span


def copy_span(tensors: Mapping[str, Tensor], key: str, span: Span, target: Tensor) -> None:
    """Copy the elements of a span of `tensors[key]` to `target`, [span.size]. Reads a checkpoint only where needed."""
    if isinstance(tensors, Tensors):
        tensors.copy(key, span, target)
    else:
        tensor = tensors[key]
        copy_shared(tensor.reshape(-1), target, shared(whole(tuple(tensor.shape)), span))
