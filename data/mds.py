"""Reads the documents of MDS shards.

The format is that of mosaicml-streaming (version 2, https://docs.mosaicml.com/projects/streaming). A shard consists of
the number of samples n as uint32, n + 1 offsets as uint32, the JSON header, and the samples. A sample consists of the
uint32 size of each column of variable size, then the columns in the order of their names. Our columns are `id` (str)
and `tokens` (ndarray:uint16 or ndarray:uint32 with one axis: one byte that encodes the number of axes and the width of
the length, the length, then the values, which are thus the last bytes of the sample).

Training does not use mosaicml-streaming, because its import takes seconds and its reader copies each sample twice.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from headway.data import fetch
from headway.data.config import DataError, UnreachableError
from headway.data.manifest import (
    BASENAME,
    INDEX_NAME,
    LENGTHS_NAME,
    PROMPTS_NAME,
    FileState,
    Manifest,
    Split,
    VerifiedFiles,
    check_file,
    read_manifest,
    rebuild_hint,
    state_of,
)
from headway.data.progress import to_stderr
from headway.data.remotes.cache import Cache, check_limit, open_pinned, open_shared
from headway.data.shard import OpenShard

Read = TypeVar("Read")

_MAX_OPEN_SHARDS = 64  # each holds a file descriptor
_REFETCH_S = 60.0
_OUTAGE_S = 60.0
"""Least seconds for which a shard is asked for again from a remote that does not answer."""
_MAX_INDEX_BYTES = 256 << 20
_is_basename = re.compile(BASENAME).fullmatch


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """The entry of one shard in index.json."""

    samples: int
    raw_name: str
    raw_bytes: int
    raw_xxh64: str
    stored_name: str  # the file in the dataset: raw_name, or the compressed file


def read_index(root: Path, split: Split, manifest: Manifest) -> list[ShardInfo]:
    """The shards of a split. Raises DataError unless all of them are MDS shards that the manifest lists."""
    path = root / split / INDEX_NAME
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise DataError(f"{path}: larger than {_MAX_INDEX_BYTES} bytes, so not an index; {rebuild_hint(root)}")
        entries = json.loads(path.read_bytes())["shards"]
        columns = ["str", f"ndarray:{manifest.dtype}"]
        shards = [_shard_info(entry, columns) for entry in entries]
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


_FORM = (("version", 2), ("format", "mds"), ("column_names", ["id", "tokens"]), ("column_sizes", [None, None]))


def _shard_info(entry: dict[str, Any], columns: list[str]) -> ShardInfo:
    for key, value in (*_FORM, ("column_encodings", columns)):
        if entry[key] != value:
            raise ValueError(f"{key} is {entry[key]!r} instead of {value!r}")
    if entry["compression"] not in (None, "zstd"):
        raise ValueError(f"compression {entry['compression']!r}")
    raw = entry["raw_data"]
    stored = entry["zip_data"] if entry["compression"] else raw
    for info in (raw, stored):
        if not isinstance(info["basename"], str) or not _is_basename(info["basename"]):
            raise ValueError(f"{info['basename']!r} is not a plain file name")
    samples, size = entry["samples"], raw["bytes"]
    # A sample has at least an offset, two sizes and a token, which limits the number of samples.
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
    """Random access to the documents of one split, in stored order. Thread-safe.

    All returned data has the hash of the manifest: a file whose state changed since `headway.data.verify` hashed it is
    hashed again. Reading a damaged or unreadable shard is retried for `retry_s` seconds with increasing pauses. Raises
    DataError, which names the file, if the retries fail, if files are missing, or if files do not match each other.
    """

    def __init__(
        self,
        root: Path,
        split: Split,
        *,
        remote: str | None = None,
        cache_bytes: int | None = None,
        retry_s: float = 0.0,
    ) -> None:
        self.root, self.remote = root, remote
        self.split: Split = split
        self.cache: Cache | None = None
        if remote is not None and cache_bytes is not None:
            self.cache = fetch.open_cache(root, remote, cache_bytes)
        if remote is not None and not (root / split / LENGTHS_NAME).exists():
            fetch.fetch_metadata(root, remote)
        self.manifest = read_manifest(root)
        self._verified = VerifiedFiles(root)
        for name in (INDEX_NAME, LENGTHS_NAME):
            check_file(root, f"{split}/{name}", self.manifest, self._verified)
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self.shards = read_index(root, split, self.manifest)
        self.lengths = read_lengths(root, split, self.manifest)
        self.prompts: np.ndarray | None = None  # [documents] tokens of each prompt, in a dataset of pairs
        if self.manifest.pairs is not None:
            check_file(root, f"{split}/{PROMPTS_NAME}", self.manifest, self._verified)
            self.prompts = read_prompts(root, split, self.manifest, self.lengths)
        self.first_document = np.concatenate([[0], np.cumsum([s.samples for s in self.shards], dtype=np.int64)])
        self._retry_s = retry_s
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._opening: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()
        self._busy: dict[int, int] = {}  # thread -> the shard it reads
        if self.cache is not None:
            self.cache.trim()

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Token ids `begin` to `end` (clamped to its length) of a document, including the end-of-document token."""
        number, row = self._locate(document)
        length = int(self.lengths[document])
        count = (length if end is None else min(end, length)) - begin
        return self._from(number, lambda shard: shard.tokens(row, begin, count))

    def id(self, document: int) -> str:
        """Id of a document in the corpus."""
        number, row = self._locate(document)
        return self._from(number, lambda shard: shard.id(row))

    def beyond_vocabulary(self, document: int, token: int) -> str:
        """Message about a token id of a document that is not in the vocabulary."""
        number, row = self._locate(document)
        return (
            f"{self._path(number)}: sample {row} ({self.id(document)}) has the token id {token:,}, but the vocabulary "
            f"has {self.manifest.vocab_size:,} tokens. The hashes agree, so the dataset was written like this; "
            f"{self._hint()}"
        )

    def reading(self) -> list[Path]:
        """Paths of the shards that threads are currently reading, opening or fetching."""
        return [self._path(number) for number in sorted(set(self._busy.copy().values()))]

    def local_path(self, number: int) -> Path:
        """Path of the uncompressed shard, which is fetched or unpacked first if necessary."""
        shard = self.shards[number]
        folder = self.root / self.split
        stored, raw = folder / shard.stored_name, folder / shard.raw_name
        if self.cache is not None:
            if (found := self._into_cache(self.cache, number)) is None:
                raise self.cache.no_room(shard.raw_name, shard.raw_bytes)
            return found
        if self.remote is not None:
            fetch.fetch_file(self.root, self.remote, f"{self.split}/{shard.stored_name}", self.manifest)
        if shard.stored_name != shard.raw_name:
            return fetch.unpack_shard(stored, raw, bytes=shard.raw_bytes, xxh64=shard.raw_xxh64)
        return raw

    def fetch_ahead(self, number: int, *, keep: Collection[int]) -> bool:
        """Fetch or unpack a shard if necessary. False if a limited cache would have to delete one of `keep` for it."""
        if self.cache is None:
            self.local_path(number)
            return True
        return self._into_cache(self.cache, number, keep=[self._path(other) for other in keep], wait_s=0.0) is not None

    def _into_cache(
        self, cache: Cache, number: int, *, keep: Collection[Path] = (), wait_s: float | None = None
    ) -> Path | None:
        shard = self.shards[number]
        assert self.remote is not None, "a cache has a remote"
        return fetch.fetch_shard(
            cache,
            self.remote,
            f"{self.split}/{shard.stored_name}",
            self._path(number),
            self.manifest,
            bytes=shard.raw_bytes,
            xxh64=shard.raw_xxh64,
            keep=keep,
            wait_s=wait_s,
        )

    def check_cache(self, window: int) -> None:
        """Raise DataError if the limit of the cache is too small for shuffle windows of `window` shards."""
        if self.cache is not None:
            check_limit(self.cache.limit, self.root, *sizes_of(self.shards, self.split, self.manifest), window)

    def _hint(self) -> str:
        if self.remote is None:
            return rebuild_hint(self.root)
        return f"delete it and start again: it is fetched again from {self.remote}"

    def _path(self, number: int) -> Path:
        return self.root / self.split / self.shards[number].raw_name

    def _locate(self, document: int) -> tuple[int, int]:
        """Shard number of a document, and its row in the shard."""
        if not 0 <= document < len(self.lengths):
            raise IndexError(f"document {document} of {len(self.lengths)}")
        number = int(np.searchsorted(self.first_document, document, "right")) - 1
        return number, document - int(self.first_document[number])

    def _from(self, number: int, read: Callable[[OpenShard], Read]) -> Read:
        """Call `read` on a shard, with retries for `retry_s` seconds, and for longer if its remote does not answer."""
        thread, pause_s, end, outage_end, evicted = threading.get_ident(), 0.05, 0.0, 0.0, False
        self._busy[thread] = number
        try:
            while True:
                try:
                    shard = self._shard(number)
                    if self.cache is None:
                        return read(shard)
                    self.cache.used(self._path(number))
                    with shard.reading():
                        return read(shard)
                except (OSError, ValueError) as error:
                    # Between reads, any process may delete the shard from a cache with a limit. It is fetched again.
                    evicted = self.cache is not None and isinstance(error, FileNotFoundError)
                    now = time.monotonic()
                    end = end or now + (max(self._retry_s, _REFETCH_S) if evicted else self._retry_s)
                    if now + pause_s > end:
                        why = (isinstance(error, OSError) and error.strerror) or error
                        raise DataError(
                            f"{self._path(number)}: shard is missing or damaged ({why}; tried for {self._retry_s:g} s, "
                            f"data.retry_s); {self._hint()}"
                        ) from error
                except UnreachableError as error:
                    # Its manifest was read from it, so the remote exists and may answer again.
                    evicted = False
                    now, patience_s = time.monotonic(), max(self._retry_s, _OUTAGE_S)
                    if not outage_end:
                        outage_end = now + patience_s
                        to_stderr(f"warning: {error}; it is asked again for {patience_s:g} s")
                    if now + pause_s > outage_end:
                        raise
                with self._lock:
                    self._open.pop(number, None)  # the file may have been replaced
                if not evicted:
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
        # A separate lock per shard, so that readers of open shards do not wait for a fetch.
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
            path,
            xxh64=info.raw_xxh64,
            trusted=self._trusted(number, path),
            lengths=lengths,
            dtype=self.dtype,
            pin=None if self.remote is None else open_shared if self.cache is None else open_pinned,
            brief=self.cache is not None,
        )

    def _trusted(self, number: int, path: Path) -> FileState | None:
        """The shard's `FileState` if its hash in this state is known to be right (from `verify`), else None."""
        name = f"{self.split}/{self.shards[number].raw_name}"
        state = state_of(path.stat())
        expected = self.manifest.files.get(name)
        if expected is None or self._verified.remembered(name, state) != expected.xxh3_64:
            return None
        return state


def sizes_of(shards: Sequence[ShardInfo], split: Split, manifest: Manifest) -> tuple[list[int], list[int]]:
    """(bytes of each shard, bytes of each compressed shard) of a split."""
    packed = [shard for shard in shards if shard.stored_name != shard.raw_name]
    stored = [manifest.files[f"{split}/{shard.stored_name}"].bytes for shard in packed]
    return [shard.raw_bytes for shard in shards], stored


def read_lengths(root: Path, split: Split, manifest: Manifest) -> np.ndarray:
    """Tokens per document of a split, [documents] int64. Raises DataError if the sum differs from the manifest."""
    path = root / split / LENGTHS_NAME
    try:
        lengths = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy raises many types for a damaged header, for example tokenize.TokenError
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


def read_prompts(root: Path, split: Split, manifest: Manifest, lengths: np.ndarray) -> np.ndarray:
    """Tokens of the prompt of each pair, separator included, [documents] int64.

    Raises DataError if they do not fit the `lengths` of the documents and the manifest.
    """
    path = root / split / PROMPTS_NAME
    try:
        prompts = np.load(path, allow_pickle=False)
    except Exception as error:
        raise DataError(f"{path}: missing or not an array ({error}); {rebuild_hint(root)}") from error
    assert manifest.pairs is not None, "a dataset of texts"
    pairs = manifest.pairs
    targets = pairs.train_target_tokens if split == "train" else pairs.validation_target_tokens
    if (
        not isinstance(prompts, np.ndarray)
        or prompts.dtype != np.dtype("<u4")
        or prompts.shape != lengths.shape
        or int(lengths.sum()) - int(prompts.sum(dtype=np.int64)) != targets
        or np.any(prompts <= len(pairs.separator_ids))
        or np.any(prompts.astype(np.int64) + 2 > lengths)
    ):
        raise DataError(
            f"{path}: does not divide {len(lengths):,} documents into prompts and {targets:,} tokens of targets; "
            f"{rebuild_hint(root)}"
        )
    return prompts.astype(np.int64)


def unigram_entropy(train: np.ndarray, validation: np.ndarray) -> float:
    """Cross-entropy of the validation tokens under the add-one unigram of the training tokens, in nats per token.

    train, validation: occurrences of each token, [vocabulary].
    """
    share = (train + 1.0) / (train.sum() + len(train))
    return float(-(validation * np.log(share)).sum() / validation.sum())
