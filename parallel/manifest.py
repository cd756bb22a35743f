"""What a checkpoint folder must be: its manifest, the hash of every file, its tensors.

The folder `step-NNNNNNNNNN` holds safetensors files and MANIFEST.json, which names each of them with size and hash and
has a hash of its own. Nothing that is not named may be there. Nothing is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import xxhash
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open

from headway.parallel.config import CheckpointError, StrictModel

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
MANIFEST = "MANIFEST.json"
_MAX_BYTES = 8 << 20  # 100,000 tensors; what a hostile one of this size costs to read is a second and 200 MB
_STEP = re.compile(r"step-(\d{10})")
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class FileEntry(StrictModel):
    """One file: its size, its hash, the keys of its tensors."""

    bytes: int = Field(ge=0)
    xxh3_128: _Hash
    tensors: list[Annotated[str, Field(max_length=512)]]


class Manifest(StrictModel):
    """`about`: which run and attempt wrote it, with what spec, code, versions and data; empty in format 1."""

    format: Literal[1, 2]
    step: int = Field(ge=0)
    layout: dict[str, int]
    state: dict[str, Any]
    files: dict[_Name, FileEntry] = Field(max_length=1 << 20)
    about: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One committed checkpoint. `state` is what the trainer asked to keep (step, tokens, seconds, counters)."""

    path: Path
    step: int
    manifest: Manifest

    @property
    def state(self) -> dict[str, Any]:
        return self.manifest.state

    @property
    def bytes(self) -> int:
        """Of all its tensor files."""
        return sum(entry.bytes for entry in self.manifest.files.values())


def file_hash(path: Path) -> str:
    """xxh3-128 of a file, hexadecimal; a symbolic link is an OSError."""
    digest = xxhash.xxh3_128()
    with _open(path) as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _open(path: Path) -> BinaryIO:
    """A file itself: neither a link nor a pipe, which would wait for a writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(f"{path} is no file")
    return file


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, last through a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def steps_on_disk(root: Path) -> list[Path]:
    """Checkpoint folders, newest step first, valid or not. Their names alone count: clocks may be wrong."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()), reverse=True)


def step_of(path: Path) -> int:
    """Of a folder that `steps_on_disk` gave."""
    return int(path.name.removeprefix("step-"))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Into the folder; it lasts when this returns. Raises CheckpointError for one too large to be read back."""
    path, value = folder / MANIFEST, manifest.model_dump(mode="json")
    text = json.dumps({"xxh3_128": own_hash(value), "manifest": value}, indent=1, sort_keys=True)
    if len(text) > _MAX_BYTES:
        raise CheckpointError(
            f"{path}: {len(text)} bytes are more than the {_MAX_BYTES >> 20} MiB that are read back; use fewer layers, "
            "or shorter values in the spec"
        )
    path.write_text(text)
    fsync(path)


def own_hash(value: Any) -> str:
    """Of a manifest, as it stands in MANIFEST.json beside it."""
    # Compact, which is fast; format 1 was not.
    old = isinstance(value, dict) and value.get("format") == 1
    text = json.dumps(value, sort_keys=True, indent=1 if old else None, separators=None if old else (",", ":"))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def read_manifest(path: Path, *, run: str | None = None) -> Manifest:
    """The manifest of a checkpoint folder: its own hash, every file's presence and size, and nothing else there.

    `run`: the run that it must be of. Raises CheckpointError naming the file that is wrong.
    """
    try:
        with _open(path / MANIFEST) as f:
            text = f.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise CheckpointError(f"{path / MANIFEST}: larger than {_MAX_BYTES >> 20} MiB, so not a manifest")
        outer = json.loads(text)
        value = outer["manifest"]
        if outer["xxh3_128"] != own_hash(value):
            raise CheckpointError(f"{path / MANIFEST}: its own hash does not match")
        if value["format"] not in (1, FORMAT):
            raise CheckpointError(
                f"{path}: format {value['format']!r:.20} is not {FORMAT}; use the release that wrote it"
            )
        manifest = Manifest.model_validate(value)
        _check_folder(path, manifest, run)
        return manifest
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path / MANIFEST}: {where!r:.200}: {first['msg']}") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{path}: not a whole checkpoint ({type(e).__name__}: {e!s:.300})") from e


def _check_folder(path: Path, manifest: Manifest, run: str | None) -> None:
    match = _STEP.fullmatch(path.name)
    if match is None or int(match[1]) != manifest.step:
        raise CheckpointError(f"{path}: the manifest is that of step {manifest.step}")
    written_by = manifest.about.get("run")
    if run is not None and written_by is not None and written_by != run:
        raise CheckpointError(f"{path}: it was written by another run ({written_by!r:.40}, this one is {run})")
    if path.is_symlink():
        raise CheckpointError(f"{path}: a link, not a checkpoint")
    for name, entry in manifest.files.items():
        size = (path / name).lstat().st_size
        if (path / name).is_symlink() or size != entry.bytes:
            raise CheckpointError(f"{path / name}: {size} bytes, the manifest says {entry.bytes}")
    unknown = sorted({p.name for p in path.iterdir()} - manifest.files.keys() - {MANIFEST})
    if unknown:
        raise CheckpointError(f"{path / unknown[0]}: the manifest does not name it; move it elsewhere")


def verify_hashes(
    path: Path, manifest: Manifest, *, rank: int = 0, size: int = 1, checked: Callable[[int], object] | None = None
) -> None:
    """Check the hash of every `size`-th file, beginning with `rank`. Raises CheckpointError naming the file.

    `checked` is told the bytes of each file that is as it was written.
    """
    for i, (name, entry) in enumerate(sorted(manifest.files.items())):
        if i % size == rank and file_hash(path / name) != entry.xxh3_128:
            raise CheckpointError(f"{path / name}: its contents changed after it was written (hash differs)")
        if i % size == rank and checked is not None:
            checked(entry.bytes)


class Tensors(Mapping[str, "Tensor"]):
    """The tensors of a checkpoint by key, read when asked for. Raises CheckpointError where a file is none of ours."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._where = {
            key: checkpoint.path / name for name, entry in checkpoint.manifest.files.items() for key in entry.tensors
        }
        self._open: dict[Path, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        file = self._file(key)
        try:
            return file.get_tensor(key)
        except SafetensorError as e:
            raise CheckpointError(f"{self._where[key]}: {key} cannot be read ({e})") from e

    def shape(self, key: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        file = self._file(key)
        try:
            return tuple(file.get_slice(key).get_shape())
        except SafetensorError as e:
            raise CheckpointError(f"{self._where[key]}: {key} cannot be read ({e})") from e

    def _file(self, key: str) -> Any:
        path = self._where[key]
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"{path}: no safetensors file ({e})") from e
        return self._open[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
