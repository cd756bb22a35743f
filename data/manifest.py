"""MANIFEST.json: what a built dataset is made of, and the hashes that prove it is still that.

A dataset folder holds MANIFEST.json, tokenizer.json, and for each split (`train/`, `validation/`) index.json and the
MDS shards of mosaicml-streaming and lengths.npy, the tokens of each document.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import Field, StringConstraints, ValidationError

from headway.data.config import DataError, StrictModel
from headway.data.places import looked_for

MANIFEST_NAME = "MANIFEST.json"
TOKENIZER_NAME = "tokenizer.json"
LENGTHS_NAME = "lengths.npy"
INDEX_NAME = "index.json"
VERIFIED_NAME = ".verified.json"
SPLITS = ("train", "validation")
SCHEMA_VERSION = 1

Split = Literal["train", "validation"]

# A name from a manifest or an index becomes a path: one optional known folder, then a basename. `..`, an absolute
# path, a backslash, a NUL or a hidden file cannot be written in it.
BASENAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
FileName = Annotated[str, StringConstraints(pattern=rf"^(?:(?:train|validation)/)?{BASENAME}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 56)]

_MAX_MANIFEST_BYTES = 64 << 20
_CHUNK_BYTES = 256 << 10  # stays in the cache of a core
_TICK_S = 0.02


class FileEntry(StrictModel):
    """Size and content hash of one file of the dataset."""

    bytes: Count
    xxh3_64: str = Field(pattern=r"^[0-9a-f]{16}$")


class SplitCounts(StrictModel):
    """What one split holds; `tokens` counts the end-of-document token of each document."""

    documents: Count
    tokens: Count
    text_bytes: Count


class LeftOut(StrictModel):
    """Documents of the corpus that are in neither split, by reason."""

    empty: Count = 0
    not_utf8: Count = 0
    too_short: Count = 0
    duplicate: Count = 0


class Manifest(StrictModel):
    """The whole description of a dataset. `fingerprint` covers what a run reads, not where it was built from."""

    schema_version: Literal[1]
    name: str
    settings: dict[str, Any]
    source_fingerprint: str
    python: str | None = Field(description="version of Python whose library was read, for the built-in corpus")
    train: SplitCounts
    validation: SplitCounts
    left_out: LeftOut
    tokenizer_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    vocab_size: int = Field(ge=1, le=1 << 24)
    eos_id: int = Field(ge=0, lt=1 << 24)
    dtype: Literal["uint16", "uint32"]
    unigram_entropy_nats: float = Field(description="validation tokens under the add-one train unigram, nats per token")
    validation_bytes_per_token: float
    files: dict[FileName, FileEntry] = Field(max_length=1_000_000)
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")

    def counts(self, split: Split) -> SplitCounts:
        return self.train if split == "train" else self.validation

    def expected_fingerprint(self) -> str:
        """sha256 of what a run reads: token counts, tokenizer, and the hash of every file."""
        keys = {"schema_version", "train", "validation", "tokenizer_sha256", "vocab_size", "eos_id", "dtype", "files"}
        return hashlib.sha256(canonical_json(self.model_dump(mode="json", include=keys))).hexdigest()


def canonical_json(value: Any) -> bytes:
    """One spelling for one value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def rebuild_hint(root: Path) -> str:
    """What a user does about a damaged dataset."""
    return f"build it again with `headway data build SPEC` (its settings are in {root / MANIFEST_NAME}), or restore it"


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write it in one piece: a reader sees the whole manifest or none."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True)
    replace_bytes(root / MANIFEST_NAME, text.encode() + b"\n")


def read_manifest(root: Path, name: str = MANIFEST_NAME) -> Manifest:
    """Read and check MANIFEST.json of `root`.

    Raises DataError when it is missing, not a manifest, or does not match its own fingerprint.
    """
    path = root / name
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise DataError(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes, so not a manifest; {rebuild_hint(root)}")
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{root}: no dataset here ({MANIFEST_NAME} is missing{looked_for(root)}); make it with "
            "`headway data build SPEC`, or set data.source.path to the folder of a built dataset"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {rebuild_hint(root)}") from error
    try:
        known = json.loads(text)
        # Before pydantic sees them: it makes a message for each.
        if isinstance(known, dict) and (unknown := sorted(known.keys() - Manifest.model_fields.keys())):
            raise DataError(f"{path}: not a manifest of this version (unknown key {unknown[0]!r:.80}); build it again")
        manifest = Manifest.model_validate_json(text)
    except (ValidationError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: not a manifest of this version ({where}: {first['msg']}); build it again") from None
    if manifest.expected_fingerprint() != manifest.fingerprint:
        raise DataError(f"{path}: content does not match its own fingerprint; {rebuild_hint(root)}")
    return manifest


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all (a temporary file beside it, synced, then renamed)."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staging.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def clear_staging(path: Path) -> None:
    """Remove what killed processes left of `path` while it was written or fetched: `.NAME.PID`, `.NAME.PID.tmp`.

    For the holder of the lock of `path`, or where losing a write does no harm. Files that cannot be removed stay.
    """
    own = re.compile(rf"\.{re.escape(path.name)}\.[0-9]+(\.tmp)?")
    with contextlib.suppress(OSError):
        for left in [entry for entry in path.parent.iterdir() if own.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                left.unlink()


FileState = tuple[int, int, int, int]
"""Inode, size, modification and change time (ns). Who writes to a file changes its last one, whatever else is restored;
no program can set it, and a clock that was set back makes it another one too."""


def state_of(found: os.stat_result) -> FileState:
    """The part of what the system says about a file that tells whether it was written to."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def settled_state(descriptor: int) -> FileState:
    """The state of an open file, at a moment from which on every write changes it.

    The kernel stamps files with a clock that ticks every 1 to 10 ms: a write within the tick of the one before it
    leaves the times as they are. So a file that was just changed is given time.
    """
    if abs(time.time() - os.fstat(descriptor).st_ctime) < _TICK_S:
        time.sleep(_TICK_S)
    return state_of(os.fstat(descriptor))


def hash_file(path: Path) -> FileEntry:
    """Size and xxh3_64 of a file."""
    digest, size, chunk = xxhash.xxh3_64(), 0, memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while got := stream.readinto(chunk):
            digest.update(chunk[:got])
            size += got
    return FileEntry(bytes=size, xxh3_64=digest.hexdigest())


class VerifiedFiles:
    """Remembers, beside the dataset, which files were already hashed, so that a run does not hash them again.

    A file counts as unchanged while its `FileState` is the same. Nothing is trusted for being old or new: times are
    compared for equality alone.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / VERIFIED_NAME
        self._known: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            known = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(known, dict):
                self._known = known
        self._changed = False

    def remembered(self, name: str, state: FileState) -> str | None:
        """xxh3_64 of the file `name` as it was hashed in this state; None where it was not."""
        known = self._known.get(name)
        if isinstance(known, list) and len(known) == 5 and known[:4] == [*state] and isinstance(known[4], str):
            return known[4]
        return None

    def hash(self, path: Path, name: str) -> str:
        """xxh3_64 of `path`, from memory where its state is the one remembered under `name`."""
        with path.open("rb") as stream:
            digest = self.remembered(name, state_of(os.fstat(stream.fileno())))
            if digest is None:
                # The state before: a write during the hashing makes another one, and is found the next time.
                state = settled_state(stream.fileno())
                digest = hash_file(path).xxh3_64
                self._known[name] = [*state, digest]
                self._changed = True
        return digest

    def save(self) -> None:
        """Remember what was hashed. A folder that cannot be written to is hashed anew each time."""
        if self._changed:
            clear_staging(self._path)
            with contextlib.suppress(OSError):
                replace_bytes(self._path, json.dumps(self._known).encode())


def check_file(root: Path, name: str, manifest: Manifest, verified: VerifiedFiles, *, hint: str | None = None) -> None:
    """Raise DataError unless the file `name` is there, inside the dataset's folder, with its size and hash.

    `hint`: what to do about a file that is not; by default, to build the dataset again.
    """
    path, expected, hint = root / name, manifest.files.get(name), hint or rebuild_hint(root)
    if expected is None:
        raise DataError(f"{root}: the manifest does not name {name}; {hint}")
    try:
        if not path.is_file():
            raise DataError(f"{path}: missing; {hint}")
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(f"{path}: a link out of the dataset's folder; replace it by the file itself")
        size = path.stat().st_size
        if size != expected.bytes:
            raise DataError(
                f"{path}: {size:,} bytes, but the manifest says {expected.bytes:,}: cut short or replaced; {hint}"
            )
        digest = verified.hash(path, name)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); mend disk or rights, or {hint}"
        ) from error
    if digest != expected.xxh3_64:
        raise DataError(
            f"{path}: content changed since the dataset was built (hash {digest}, manifest {expected.xxh3_64}); {hint}"
        )
