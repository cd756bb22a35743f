"""MANIFEST.json: the description of a dataset, with hashes to detect changes.

A dataset folder contains MANIFEST.json, tokenizer.json and, for each split (`train/`, `validation/`), the index.json
and MDS shards of mosaicml-streaming, and lengths.npy (number of tokens per document). A dataset of pairs has
prompts.npy too: how many tokens of each document belong to the prompt, separator included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import Field, StringConstraints, ValidationError

from headway.data.config import MAX_VOCABULARY, DataError, StrictModel
from headway.data.places import looked_for

MANIFEST_NAME = "MANIFEST.json"
TOKENIZER_NAME = "tokenizer.json"
LENGTHS_NAME = "lengths.npy"
PROMPTS_NAME = "prompts.npy"
INDEX_NAME = "index.json"
VERIFIED_NAME = ".verified.json"
SPLITS = ("train", "validation")
SCHEMA_VERSION = 1

Split = Literal["train", "validation"]

# File names in a manifest or an index become paths: one optional known folder, then a basename. The pattern excludes
# `..`, absolute paths, backslashes, NUL and hidden files.
BASENAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
FileName = Annotated[str, StringConstraints(pattern=rf"^(?:(?:train|validation)/)?{BASENAME}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 56)]

_MAX_MANIFEST_BYTES = 64 << 20
_MAX_VALUES = 20_000  # apart from files and settings; pydantic makes an error of a kilobyte for each that is wrong
_CHUNK_BYTES = 256 << 10  # fits into a core's cache
_TICK_S = 0.02


class FileEntry(StrictModel):
    """Size and content hash of one file of the dataset."""

    bytes: Count
    xxh3_64: str = Field(pattern=r"^[0-9a-f]{16}$")


class SplitCounts(StrictModel):
    """Size of one split. `tokens` includes the end-of-document tokens."""

    documents: Count
    tokens: Count
    text_bytes: Count


class LeftOut(StrictModel):
    """Number of skipped documents of the corpus, by reason."""

    empty: Count = 0
    not_utf8: Count = 0
    binary: Count = 0
    empty_prompt: Count | None = None
    empty_target: Count | None = None
    one_line: Count | None = Field(default=None, description="articles without a second line; None for other corpora")
    too_short: Count = 0
    duplicate: Count = 0
    in_validation: Count | None = Field(
        default=None, description="training documents that are in the validation files too; None without such files"
    )


class CorpusFiles(StrictModel):
    """Files of the corpus that were read, and those that were left out: their number by reason, and examples."""

    taken: Count
    left_out: dict[str, Count] = Field(default_factory=dict)
    examples: list[str] = Field(default_factory=list)


class Lossy(StrictModel):
    """Documents that their tokens do not give back (`tokenizer.lossy: allow`), and the first of them."""

    documents: Count
    example: str


class PairCounts(StrictModel):
    """What tells a dataset of pairs from one of texts. A target's tokens include the end-of-document token.

    separator_ids: Token ids between prompt and target, the last ones of every prompt.
    """

    separator: str
    separator_ids: list[Annotated[int, Field(ge=0, lt=MAX_VOCABULARY)]] = Field(max_length=4096)
    train_target_tokens: Count
    validation_target_tokens: Count
    validation_target_bytes: Count


class Manifest(StrictModel):
    """The contents of MANIFEST.json. `fingerprint` covers the data that a run reads, not the source of the build."""

    schema_version: Literal[1]
    name: str
    settings: dict[str, Any]
    source_fingerprint: str
    python: str | None = Field(description="for the built-in corpus: Python version of the standard library")
    train: SplitCounts
    validation: SplitCounts
    left_out: LeftOut
    corpus_files: CorpusFiles | None = Field(default=None, description="None for hub datasets and older manifests")
    tokenizer_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    vocab_size: int = Field(ge=1, le=MAX_VOCABULARY)
    eos_id: int = Field(ge=0, lt=MAX_VOCABULARY)
    max_token_id: int | None = Field(default=None, ge=0, description="largest token id; None in older manifests")
    dtype: Literal["uint16", "uint32"]
    unigram_entropy_nats: float = Field(description="validation tokens under the add-one train unigram, nats per token")
    validation_bytes_per_token: float | None = Field(description="None if the tokenizer loses text")
    pairs: PairCounts | None = Field(default=None, description="None for a dataset of texts")
    lossy: Lossy | None = Field(default=None, description="None if the tokens of every document give its text")
    files: dict[FileName, FileEntry] = Field(max_length=1_000_000)
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    facts_sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="hash of what `fingerprint` leaves out; None if older"
    )

    def metadata(self) -> tuple[str, ...]:
        """Names of the files that a dataset has besides its shards."""
        per_split = (INDEX_NAME, LENGTHS_NAME) if self.pairs is None else (INDEX_NAME, LENGTHS_NAME, PROMPTS_NAME)
        return TOKENIZER_NAME, *(f"{split}/{name}" for split in SPLITS for name in per_split)

    def counts(self, split: Split) -> SplitCounts:
        return self.train if split == "train" else self.validation

    def expected_fingerprint(self) -> str:
        """sha256 of the data that a run reads: token counts, tokenizer, and the hash of every file."""
        keys = {"schema_version", "train", "validation", "tokenizer_sha256", "vocab_size", "eos_id", "dtype", "files"}
        keys |= set() if self.pairs is None else {"pairs"}
        return hashlib.sha256(canonical_json(self.model_dump(mode="json", include=keys))).hexdigest()

    def expected_facts(self) -> str:
        """sha256 of what is told about the data: settings and source of the build, what was left out, statistics."""
        keys = {"name", "settings", "source_fingerprint", "python", "left_out", "corpus_files", "lossy"}
        keys |= {"unigram_entropy_nats", "validation_bytes_per_token"}
        facts = self.model_dump(mode="json", include=keys)
        # Reasons that are None: as in manifests without these fields.
        facts["left_out"] = {reason: count for reason, count in facts["left_out"].items() if count is not None}
        return hashlib.sha256(canonical_json(facts)).hexdigest()

    def content(self) -> dict[str, Any]:
        """The content of the file. Earlier versions refuse keys that they do not know, so texts have none of pairs."""
        content = self.model_dump(mode="json")
        content["left_out"] = {reason: count for reason, count in content["left_out"].items() if count is not None}
        if self.pairs is None:
            del content["pairs"]
        return content

    def sealed(self) -> Manifest:
        """This manifest with the hashes of its content."""
        hashes = {"fingerprint": self.expected_fingerprint(), "facts_sha256": self.expected_facts()}
        return self.model_copy(update=hashes)


def canonical_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def rebuild_hint(root: Path) -> str:
    """Next step for the user of a damaged dataset, for error messages."""
    return f"build it again with `headway data build SPEC` (its settings are in {root / MANIFEST_NAME}), or restore it"


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write MANIFEST.json atomically."""
    text = json.dumps(manifest.content(), indent=1, sort_keys=True)
    replace_bytes(root / MANIFEST_NAME, text.encode() + b"\n")


def read_manifest(root: Path, name: str = MANIFEST_NAME) -> Manifest:
    """Read and check MANIFEST.json of `root`.

    Raises DataError if it is missing, is not a manifest, or does not match its own fingerprint.
    """
    path = root / name
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise DataError(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes, so not a manifest; {rebuild_hint(root)}")
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{root}: no dataset here ({MANIFEST_NAME} is missing{looked_for(root)}); build it with "
            "`headway data build SPEC`, or set data.source.path to the folder of a built dataset"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {rebuild_hint(root)}") from error
    try:
        known = json.loads(text)
        if isinstance(known, dict) and (wrong := _excess(known)):
            raise DataError(f"{path}: not a manifest of this version ({wrong}); build it again")
        manifest = Manifest.model_validate_json(text)
    except (ValidationError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: not a manifest of this version ({where}: {first['msg']}); build it again") from None
    largest = max(manifest.eos_id, manifest.max_token_id or 0)
    if largest >= manifest.vocab_size:
        raise DataError(
            f"{path}: its token ids go up to {largest:,}, beyond its vocabulary of {manifest.vocab_size:,}; "
            f"{rebuild_hint(root)}"
        )
    if manifest.expected_fingerprint() != manifest.fingerprint:
        raise DataError(f"{path}: content does not match its own fingerprint; {rebuild_hint(root)}")
    _check_facts(path, manifest, root)
    return manifest


def _excess(known: dict[str, Any]) -> str | None:
    """What a manifest has too much of. Checked before pydantic, which would create a message for every wrong value."""
    if unknown := sorted(known.keys() - Manifest.model_fields.keys()):
        return f"unknown key {unknown[0]!r:.80}"
    files, keys = known.get("files"), FileEntry.model_fields.keys()
    for name, entry in files.items() if isinstance(files, dict) else ():
        if not isinstance(entry, dict) or entry.keys() != keys:
            return f"files.{name:.80} has not the keys {' and '.join(keys)}"
    waiting, count = [{key: value for key, value in known.items() if key not in ("files", "settings")}], 0
    while waiting and count <= _MAX_VALUES:
        inner = waiting.pop()
        count += len(inner)
        waiting += [v for v in (inner.values() if isinstance(inner, dict) else inner) if isinstance(v, dict | list)]
    return f"more than {_MAX_VALUES:,} values" if count > _MAX_VALUES else None


def _check_facts(path: Path, manifest: Manifest, root: Path) -> None:
    """Raise DataError if facts that the fingerprint leaves out were changed or cannot be true.

    Manifests of earlier versions have no hash of them. `headway data verify` also computes the entropy anew.
    """
    if manifest.facts_sha256 is not None and manifest.facts_sha256 != manifest.expected_facts():
        raise DataError(
            f"{path}: its settings or statistics were changed after it was written (facts_sha256); {rebuild_hint(root)}"
        )
    counts, told = manifest.validation, manifest.validation_bytes_per_token
    if told is not None and counts.tokens and not math.isclose(told, counts.text_bytes / counts.tokens, rel_tol=1e-9):
        raise DataError(
            f"{path}: validation_bytes_per_token is {told:.6g}, but {counts.text_bytes:,} bytes in {counts.tokens:,} "
            f"tokens are {counts.text_bytes / counts.tokens:.6g}; {rebuild_hint(root)}"
        )
    # Shares of tokens are between 1 and T + 1 of T + V.
    tokens, entropy = manifest.train.tokens, manifest.unigram_entropy_nats
    low, high = (math.log((tokens + manifest.vocab_size) / most) for most in (tokens + 1, 1))
    if not 0.999999 * low <= entropy <= 1.000001 * high:
        raise DataError(
            f"{path}: unigram_entropy_nats is {entropy:.6g}, which no text has under {tokens:,} training tokens of a "
            f"vocabulary of {manifest.vocab_size:,} ({low:.3g} to {high:.3g}); {rebuild_hint(root)}"
        )


def replace_bytes(path: Path, data: bytes | bytearray) -> None:
    """Write a file atomically: to a temporary file in the same folder, fsync, then rename."""
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
    """Delete temporary files of `path` that killed processes left: `.NAME.PID`, `.NAME.PID.tmp`.

    The caller must hold the lock of `path`, unless losing a concurrent write is harmless. Errors are ignored.
    """
    own = re.compile(rf"\.{re.escape(path.name)}\.[0-9]+(\.tmp)?")
    with contextlib.suppress(OSError):
        for left in [entry for entry in path.parent.iterdir() if own.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                left.unlink()


FileState = tuple[int, int, int, int]
"""Inode, size, modification time and change time (ns). Every write changes the change time. Programs cannot set it, and
it also differs after the clock was set back."""


def state_of(found: os.stat_result) -> FileState:
    """The `FileState` of a stat result. It changes if the file is written to."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def settled_state(descriptor: int) -> FileState:
    """The state of an open file. Every write after this call changes the state.

    File timestamps have a resolution of 1 to 10 ms, so two writes within one tick have the same times. If the file
    changed within the last tick, this function waits for the next one.
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
    """Cache of file hashes, stored in the dataset folder, so that a run does not hash unchanged files again.

    A file is unchanged if its `FileState` is equal. Times are only compared for equality, never for order.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._path = root, root / VERIFIED_NAME
        self._is_link: dict[str, bool] = {}  # by folder
        self._known: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            known = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(known, dict):
                self._known = known
        self._changed = False

    def remembered(self, name: str, state: FileState) -> str | None:
        """Cached xxh3_64 of the file `name` in this state, or None."""
        known = self._known.get(name)
        if isinstance(known, list) and len(known) == 5 and known[:4] == [*state] and isinstance(known[4], str):
            return known[4]
        return None

    def is_unchanged(self, name: str, expected: FileEntry) -> bool:
        """Whether a file has the expected size and, by the cache, the expected hash. False if it or its folder is
        a link.

        This is one system call, which does not open the file: a dataset may have 100,000 of them.
        """
        folder = name.rpartition("/")[0]
        if folder not in self._is_link:
            self._is_link[folder] = bool(folder) and (self._root / folder).is_symlink()
        found = os.lstat(f"{self._root}/{name}")
        if self._is_link[folder] or not stat.S_ISREG(found.st_mode) or found.st_size != expected.bytes:
            return False
        return self.remembered(name, state_of(found)) == expected.xxh3_64

    def hash(self, path: Path, name: str) -> str:
        """xxh3_64 of `path`, from the cache if the file's state is the one stored under `name`."""
        with path.open("rb") as stream:
            digest = self.remembered(name, state_of(os.fstat(stream.fileno())))
            if digest is None:
                # Take the state before hashing, so that a write during hashing is detected the next time.
                state = settled_state(stream.fileno())
                digest = hash_file(path).xxh3_64
                self._known[name] = [*state, digest]
                self._changed = True
        return digest

    def save(self) -> None:
        """Write the cache. If the folder is not writable, files are hashed again each time."""
        if self._changed:
            clear_staging(self._path)
            with contextlib.suppress(OSError):
                replace_bytes(self._path, json.dumps(self._known).encode())


def check_file(root: Path, name: str, manifest: Manifest, verified: VerifiedFiles, *, hint: str | None = None) -> None:
    """Raise DataError unless the file `name` is inside the dataset's folder and has the size and hash of the manifest.

    `hint`: next step for the user, for the message; by default, to build the dataset again.
    """
    expected = manifest.files.get(name)
    with contextlib.suppress(OSError):  # its message is made below
        if expected is not None and verified.is_unchanged(name, expected):
            return
    path, hint = root / name, hint or rebuild_hint(root)
    if expected is None:
        raise DataError(f"{root}: the manifest does not name {name}; {hint}")
    try:
        if not path.is_file():
            raise DataError(f"{path}: missing; {hint}")
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(f"{path}: a link to a file outside of the dataset's folder; replace it by the file itself")
        size = path.stat().st_size
        if size != expected.bytes:
            raise DataError(
                f"{path}: {size:,} bytes, but the manifest says {expected.bytes:,}: truncated or replaced; {hint}"
            )
        digest = verified.hash(path, name)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); fix the disk or the permissions, or {hint}"
        ) from error
    if digest != expected.xxh3_64:
        raise DataError(
            f"{path}: content changed since the dataset was built (hash {digest}, manifest {expected.xxh3_64}); {hint}"
        )
