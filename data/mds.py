"""Reads MDS shards through memory maps.

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
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headway.data import fetch
from headway.data.config import DataError
from headway.data.manifest import BASENAME, INDEX_NAME, LENGTHS_NAME, Manifest, Split, read_manifest, rebuild_hint

_MAX_OPEN_SHARDS = 64  # each map holds a file descriptor
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
    for shard in shards:
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


class _OpenShard:
    """A mapped shard: where the id and the tokens of each document stand."""

    def __init__(self, path: Path, samples: int, lengths: np.ndarray, dtype: np.dtype) -> None:
        self.bytes = np.memmap(path, dtype=np.uint8, mode="r")
        head = 4 * (samples + 2)
        count = int(np.frombuffer(self.bytes, "<u4", 1)[0])
        if count != samples or self.bytes.size < head:
            raise ValueError(f"{count} samples instead of {samples}")
        self.offsets = np.frombuffer(self.bytes, "<u4", samples + 1, offset=4).astype(np.int64)
        self.starts = self.offsets[1:] - lengths * dtype.itemsize
        if self.offsets[-1] != self.bytes.size or self.offsets[0] < head or np.any(self.starts < self.offsets[:-1] + 8):
            raise ValueError("offsets that do not fit the lengths of its documents")


class MdsSplit:
    """Documents of one split, by number, in stored order. Safe to read from several threads.

    Raises DataError when files are missing or do not fit together; hashes are `headway.data.verify`'s business, but
    what is fetched or unpacked here is checked on arrival.
    """

    def __init__(self, root: Path, split: Split, *, remote: str | None = None) -> None:
        self.root, self.split, self.remote = root, split, remote
        if remote is not None and not (root / split / LENGTHS_NAME).exists():
            fetch.fetch_metadata(root, remote)
        self.manifest = read_manifest(root)
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self.shards = read_index(root, split, self.manifest)
        self.lengths = read_lengths(root, split, self.manifest)
        self.first_document = np.concatenate([[0], np.cumsum([s.samples for s in self.shards], dtype=np.int64)])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int) -> np.ndarray:
        """Token ids of a document, its end-of-document token included: a view of the map, [length]."""
        shard, row = self._locate(document)
        start = int(shard.starts[row])
        return shard.bytes[start : start + int(self.lengths[document]) * self.dtype.itemsize].view(self.dtype)

    def id(self, document: int) -> str:
        """Where the document came from, as the corpus names it."""
        shard, row = self._locate(document)
        begin = int(shard.offsets[row])
        size = int(np.frombuffer(shard.bytes, "<u4", 1, offset=begin)[0])
        return shard.bytes[begin + 8 : begin + 8 + size].tobytes().decode("utf-8")

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

    def _locate(self, document: int) -> tuple[_OpenShard, int]:
        if not 0 <= document < len(self.lengths):
            raise IndexError(f"document {document} of {len(self.lengths)}")
        number = int(np.searchsorted(self.first_document, document, "right")) - 1
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                shard = self._map(number)
                self._open[number] = shard
                if len(self._open) > _MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
        return shard, document - int(self.first_document[number])

    def _map(self, number: int) -> _OpenShard:
        path, info = self.local_path(number), self.shards[number]
        first = int(self.first_document[number])
        try:
            size = path.stat().st_size
            if size != info.raw_bytes:
                raise ValueError(f"{size:,} bytes instead of {info.raw_bytes:,}")
            return _OpenShard(path, info.samples, self.lengths[first : first + info.samples], self.dtype)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: shard is missing or damaged ({error}); {rebuild_hint(self.root)}") from error


def read_lengths(root: Path, split: Split, manifest: Manifest) -> np.ndarray:
    """Tokens of each document of a split, [documents] int64. Raises DataError unless they add up to the manifest's."""
    path = root / split / LENGTHS_NAME
    try:
        lengths = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
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
