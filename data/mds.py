"""Reads the documents of MDS shards.

The format is mosaicml-streaming's (version 2, https://docs.mosaicml.com/projects/streaming): a shard is the number of
samples n as uint32, n + 1 offsets as uint32, the JSON header, then the samples; a sample is the uint32 size of each
column whose size varies, then the columns in the order of their names. Ours are `id` (str) and `tokens`
(ndarray:uint16 or ndarray:uint32, one axis: a byte that says one axis and the width of its length, the length, then
the values, which therefore are the last bytes of the sample).

Importing mosaicml-streaming takes seconds and its reader copies each sample twice, so training does neither.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from headway.data import fetch
from headway.data.config import DataError
from headway.data.manifest import (
    BASENAME,
    INDEX_NAME,
    LENGTHS_NAME,
    FileState,
    Manifest,
    Split,
    VerifiedFiles,
    check_file,
    read_manifest,
    rebuild_hint,
    state_of,
)
from headway.data.shard import OpenShard

Read = TypeVar("Read")

_MAX_OPEN_SHARDS = 64  # each holds a file descriptor
_MAX_INDEX_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One shard, as index.json describes it."""

    samples: int
    raw_name: str
    raw_bytes: int
    raw_xxh64: str
    stored_name: str  # the file in the dataset: the raw one, or its zstd form


def read_index(root: Path, split: Split, manifest: Manifest) -> list[ShardInfo]:
    """The shards of a split. Raises DataError unless every one is an MDS shard of ours that the manifest names."""
    path = root / split / INDEX_NAME
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise DataError(f"{path}: larger than {_MAX_INDEX_BYTES} bytes, so not an index; {rebuild_hint(root)}")
        entries = json.loads(path.read_bytes())["shards"]
        shards = [_shard_info(entry, manifest.dtype) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not an index of our shards ({error}); {rebuild_hint(root)}") from error
    seen: set[str] = set()
    for shard in shards:
        if shard.stored_name in seen:
            raise DataError(f"{path}: names {shard.stored_name} twice; {rebuild_hint(root)}")
        seen.add(shard.stored_name)
        if f"{split}/{shard.stored_name}" not in manifest.files:
            raise DataError(f"{path}: names {shard.stored_name}, which the manifest does not; {rebuild_hint(root)}")
    documents = sum(shard.samples for shard in shards)
    if documents != manifest.counts(split).documents:
        raise DataError(
            f"{path}: {documents:,} documents, but the manifest says {manifest.counts(split).documents:,}; "
            f"{rebuild_hint(root)}"
        )
    return shards


def _shard_info(entry: dict[str, Any], dtype: str) -> ShardInfo:
    expected = {"version": 2, "format": "mds", "column_names": ["id", "tokens"], "column_sizes": [None, None]}
    expected["column_encodings"] = ["str", f"ndarray:{dtype}"]
    for key, value in expected.items():
        if entry[key] != value:
            raise ValueError(f"{key} is {entry[key]!r} instead of {value!r}")
    if entry["compression"] not in (None, "zstd"):
        raise ValueError(f"compression {entry['compression']!r}")
    raw = entry["raw_data"]
    stored = entry["zip_data"] if entry["compression"] else raw
    for info in (raw, stored):
        if not isinstance(info["basename"], str) or not re.fullmatch(BASENAME, info["basename"]):
            raise ValueError(f"{info['basename']!r} is not a plain file name")
    samples, size = entry["samples"], raw["bytes"]
    # A sample takes at least its offset, two sizes and a token, so more samples than that is a lie.
    if type(samples) is not int or type(size) is not int or not 0 <= samples <= size // 12 or size >= 1 << 32:
        raise ValueError(f"{samples!r} samples in {size!r} bytes")
    return ShardInfo(
        samples=samples,
        raw_name=raw["basename"],
        raw_bytes=size,
        raw_xxh64=str(raw["hashes"]["xxh64"]),
        stored_name=stored["basename"],
    )


class MdsSplit:
    """Documents of one split, by number, in stored order. Safe to read from several threads.

    What it hands out has the hash of the manifest: a file in another state than the one in which `headway.data.verify`
    hashed it is hashed again. A shard that cannot be read, or is not what it should be, is tried again, with growing
    pauses, for `retry_s` seconds. Raises DataError naming the file when that did not help, and when files are missing
    or do not fit together.
    """

    def __init__(self, root: Path, split: Split, *, remote: str | None = None, retry_s: float = 0.0) -> None:
        self.root, self.split, self.remote = root, split, remote
        if remote is not None and not (root / split / LENGTHS_NAME).exists():
            fetch.fetch_metadata(root, remote)
        self.manifest = read_manifest(root)
        self._verified = VerifiedFiles(root)
        for name in (INDEX_NAME, LENGTHS_NAME):
            check_file(root, f"{split}/{name}", self.manifest, self._verified)
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self.shards = read_index(root, split, self.manifest)
        self.lengths = read_lengths(root, split, self.manifest)
        self.first_document = np.concatenate([[0], np.cumsum([s.samples for s in self.shards], dtype=np.int64)])
        self._retry_s = retry_s
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._opening: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()
        self._busy: dict[int, int] = {}  # thread -> the shard it reads

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids `begin` to `end` (at most its length) of a document, its end-of-document token included."""
        number, row = self._locate(document)
        length = int(self.lengths[document])
        count = (length if end is None else min(end, length)) - begin
        return self._from(number, lambda shard: shard.tokens(row, begin, count))

    def id(self, document: int) -> str:
        """Where the document came from, as the corpus names it."""
        number, row = self._locate(document)
        return self._from(number, lambda shard: shard.id(row))

    def reading(self) -> list[Path]:
        """The shards that threads are reading, opening or fetching at this moment."""
        return [self._path(number) for number in sorted(set(self._busy.copy().values()))]

    def local_path(self, number: int) -> Path:
        """The uncompressed shard on this machine, fetched or unpacked if it must be."""
        shard = self.shards[number]
        folder = self.root / self.split
        stored, raw = folder / shard.stored_name, folder / shard.raw_name
        if self.remote is not None:
            fetch.fetch_file(self.root, self.remote, f"{self.split}/{shard.stored_name}", self.manifest)
        if shard.stored_name != shard.raw_name:
            return fetch.unpack_shard(stored, raw, bytes=shard.raw_bytes, xxh64=shard.raw_xxh64)
        return raw

    def _hint(self) -> str:
        if self.remote is None:
            return rebuild_hint(self.root)
        return f"delete it and start again: it is fetched anew from {self.remote}"

    def _path(self, number: int) -> Path:
        return self.root / self.split / self.shards[number].raw_name

    def _locate(self, document: int) -> tuple[int, int]:
        """Shard of a document, and its place there."""
        if not 0 <= document < len(self.lengths):
            raise IndexError(f"document {document} of {len(self.lengths)}")
        number = int(np.searchsorted(self.first_document, document, "right")) - 1
        return number, document - int(self.first_document[number])

    def _from(self, number: int, read: Callable[[OpenShard], Read]) -> Read:
        """What `read` finds in a shard, trying again for `retry_s`."""
        thread, pause_s, end = threading.get_ident(), 0.05, 0.0
        self._busy[thread] = number
        try:
            while True:
                try:
                    return read(self._shard(number))
                except (OSError, ValueError) as error:
                    now = time.monotonic()
                    end = end or now + self._retry_s
                    if now + pause_s > end:
                        why = (isinstance(error, OSError) and error.strerror) or error
                        raise DataError(
                            f"{self._path(number)}: shard is missing or damaged ({why}; tried for {self._retry_s:g} s, "
                            f"data.retry_s); {self._hint()}"
                        ) from error
                with self._lock:
                    self._open.pop(number, None)  # another file may have taken its place
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)
        finally:
            del self._busy[thread]

    def _shard(self, number: int) -> OpenShard:
        with self._lock:
            if (shard := self._open.get(number)) is not None:
                self._open.move_to_end(number)
                return shard
            opening = self._opening.setdefault(number, threading.Lock())
        # Not under the other lock: who reads what is open need not wait for a fetch.
        with opening:
            with self._lock:
                if (shard := self._open.get(number)) is not None:
                    return shard
            shard = self._opened(number)
            with self._lock:
                self._open[number] = shard
                if len(self._open) > _MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            return shard

    def _opened(self, number: int) -> OpenShard:
        path, info = self.local_path(number), self.shards[number]
        size = path.stat().st_size
        if size != info.raw_bytes:
            raise ValueError(f"{size:,} bytes instead of {info.raw_bytes:,}")
        first = int(self.first_document[number])
        lengths = self.lengths[first : first + info.samples]
        return OpenShard(
            path, xxh64=info.raw_xxh64, trusted=self._trusted(number, path), lengths=lengths, dtype=self.dtype
        )

    def _trusted(self, number: int, path: Path) -> FileState | None:
        """The state of a shard that was hashed in it and found to be the manifest's, by this run's preflight say."""
        name = f"{self.split}/{self.shards[number].raw_name}"
        state = state_of(path.stat())
        expected = self.manifest.files.get(name)
        if expected is None or self._verified.remembered(name, state) != expected.xxh3_64:
            return None
        return state


def read_lengths(root: Path, split: Split, manifest: Manifest) -> np.ndarray:
    """Tokens of each document of a split, [documents] int64. Raises DataError unless they add up to the manifest's."""
    path = root / split / LENGTHS_NAME
    try:
        lengths = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy lets many kinds through for a damaged header, tokenize.TokenError among them
        raise DataError(f"{path}: missing or not an array ({error}); {rebuild_hint(root)}") from error
    counts = manifest.counts(split)
    if (
        not isinstance(lengths, np.ndarray)
        or lengths.dtype != np.dtype("<u4")
        or lengths.shape != (counts.documents,)
        or int(lengths.sum(dtype=np.int64)) != counts.tokens
        or (counts.documents and int(lengths.min()) < 1)
    ):
        raise DataError(
            f"{path}: does not describe {counts.documents:,} documents of {counts.tokens:,} tokens; "
            f"{rebuild_hint(root)}"
        )
    return lengths.astype(np.int64)
