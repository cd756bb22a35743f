"""Format of a checkpoint folder: manifest and file hashes. `headway.parallel.tensors.reader` reads the tensors.

The folder `step-NNNNNNNNNN` contains safetensors files and MANIFEST.json, which lists each file with its size and hash
and has a hash of its own. Files that are not listed are errors. There are no pickles.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import xxhash
from pydantic import Field, ValidationError

from headway.parallel.config import CheckpointError, StrictModel

FORMAT = 3
_READABLE = (1, 2, FORMAT)
MANIFEST = "MANIFEST.json"
_MAX_BYTES = 8 << 20  # 100,000 tensors; reading a hostile manifest of this size takes 1 s and 200 MB
_STEP = re.compile(r"step-(\d{10})")
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class ForeignCheckpointError(CheckpointError):
    """A checkpoint that another run wrote. Loading it would give weights of another training."""


class FileEntry(StrictModel):
    """Size and hash of one file, and what it holds.

    tensors: Keys of the tensors that it holds in full.
    spans: Number of tensors of which it holds a part, which its metadata describes. 0 before format 3.
    """

    bytes: int = Field(ge=0)
    xxh3_128: _Hash
    tensors: list[Annotated[str, Field(max_length=512)]]
    spans: int = Field(default=0, ge=0)


class Manifest(StrictModel):
    """MANIFEST.json. `about`: run, attempt, spec, code, versions and data of the writer; empty in format 1."""

    format: Literal[1, 2, 3]
    step: int = Field(ge=0)
    layout: dict[str, int]
    state: dict[str, Any]
    files: dict[_Name, FileEntry] = Field(max_length=1 << 20)
    about: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One committed checkpoint. `state` is the trainer's state (step, tokens, seconds, counters)."""

    path: Path
    step: int
    manifest: Manifest

    @property
    def state(self) -> dict[str, Any]:
        return self.manifest.state

    @property
    def bytes(self) -> int:
        """Total size of the tensor files."""
        return sum(entry.bytes for entry in self.manifest.files.values())


def file_hash(path: Path) -> str:
    """xxh3-128 of a file, hexadecimal. Raises OSError for a symbolic link."""
    digest = xxhash.xxh3_128()
    with _open(path) as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _open(path: Path) -> BinaryIO:
    """Open a regular file. Raises OSError for a link or a pipe (opening a pipe would wait for a writer)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(f"{path} is not a regular file")
    return file


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def steps_on_disk(root: Path) -> list[Path]:
    """Checkpoint folders, newest step first, valid or not. Sorted by name, because clocks may be wrong."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()), reverse=True)


def step_of(path: Path) -> int:
    """The step of a folder returned by `steps_on_disk`."""
    return int(path.name.removeprefix("step-"))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and fsync MANIFEST.json. Raises CheckpointError if it is larger than `read_manifest` accepts."""
    path, value = folder / MANIFEST, manifest.model_dump(mode="json")
    text = json.dumps({"xxh3_128": own_hash(value), "manifest": value}, indent=1, sort_keys=True)
    if len(text) > _MAX_BYTES:
        raise CheckpointError(
            f"{path}: {len(text)} bytes exceed the limit of {_MAX_BYTES >> 20} MiB; use fewer layers, "
            "or shorter values in the spec"
        )
    path.write_text(text)
    fsync(path)


def own_hash(value: Any) -> str:
    """Hash of a manifest, which MANIFEST.json stores beside it."""
    # Compact JSON is faster. Format 1 used indented JSON.
    old = isinstance(value, dict) and value.get("format") == 1
    text = json.dumps(value, sort_keys=True, indent=1 if old else None, separators=None if old else (",", ":"))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def read_manifest(path: Path, *, run: str | None = None) -> Manifest:
    """Read the manifest of a checkpoint folder and check its hash, the size of every file, and that no file is extra.

    `run`: id of the run that must have written it. Raises CheckpointError, which names the invalid file, and
    ForeignCheckpointError, which names both runs.
    """
    try:
        with _open(path / MANIFEST) as f:
            text = f.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise CheckpointError(f"{path / MANIFEST}: larger than {_MAX_BYTES >> 20} MiB, so it is not a manifest")
        outer = json.loads(text)
        value = outer["manifest"]
        if outer["xxh3_128"] != own_hash(value):
            raise CheckpointError(f"{path / MANIFEST}: its own hash does not match")
        if value["format"] not in _READABLE:
            raise CheckpointError(
                f"{path / MANIFEST}: format {value['format']!r:.20} is not {FORMAT}; use the release that wrote it"
            )
        manifest = Manifest.model_validate(value)
        _check_folder(path, manifest, run)
        return manifest
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path / MANIFEST}: {where!r:.200}: {first['msg']}") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        # The error of a file that the manifest lists names that file.
        named = e.filename if isinstance(e, OSError) and e.filename else path / MANIFEST
        raise CheckpointError(f"{named}: not a complete checkpoint ({type(e).__name__}: {e!s:.300})") from e


def _check_folder(path: Path, manifest: Manifest, run: str | None) -> None:
    match = _STEP.fullmatch(path.name)
    if match is None or int(match[1]) != manifest.step:
        raise CheckpointError(f"{path / MANIFEST}: it is for step {manifest.step}, not for the folder's")
    written_by = manifest.about.get("run")
    if run is not None and written_by is not None and written_by != run:
        raise ForeignCheckpointError(
            f"{path / MANIFEST}: it was written by another run ({written_by!r:.40}, this run is {run!r:.40}), so its "
            "weights are not those of this run; move the folder to its run, and restore this run's own checkpoint"
        )
    if path.is_symlink():
        raise CheckpointError(f"{path}: a link, not a checkpoint")
    for name, entry in manifest.files.items():
        size = (path / name).lstat().st_size
        if (path / name).is_symlink() or size != entry.bytes:
            raise CheckpointError(f"{path / name}: {size} bytes, the manifest says {entry.bytes}")
    unknown = sorted({p.name for p in path.iterdir()} - manifest.files.keys() - {MANIFEST})
    if unknown:
        raise CheckpointError(f"{path / unknown[0]}: not listed in the manifest; move it elsewhere")


def verify_hashes(
    path: Path, manifest: Manifest, *, rank: int = 0, size: int = 1, checked: Callable[[int], object] | None = None
) -> None:
    """Check the hash of every `size`-th file, starting at `rank`. Raises CheckpointError, which names the file.

    `checked` is called with the size in bytes of each file whose hash is correct.
    """
    for i, (name, entry) in enumerate(sorted(manifest.files.items())):
        if i % size == rank and file_hash(path / name) != entry.xxh3_128:
            raise CheckpointError(f"{path / name}: its contents changed after it was written (hash differs)")
        if i % size == rank and checked is not None:
            checked(entry.bytes)
