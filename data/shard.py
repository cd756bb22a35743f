"""One MDS shard, open for reading, and the writer of a split. The format is described in `headway.data.mds`.

Shards are read with `pread`, not mapped into memory. If a mapped file is truncated or its disk fails, the process dies
with SIGBUS, while a read returns an error. After every read the file's `FileState` is checked. If it has changed since
the content was hashed, the content is hashed again before any token is returned. Training data therefore has the hash
of the manifest, even if a file is modified while it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from headway.data.manifest import INDEX_NAME, FileState, settled_state, state_of

_CHUNK_BYTES = 256 << 10  # fits into a core's cache


class OpenShard:
    """An open shard: its file and the offsets of the id and the tokens of each document. Closed when deleted.

    trusted: File state in which the content is known to be right, or None.
    lengths: Tokens per document, [samples].
    pin: Opens the file instead of `os.open`, and keeps it from being deleted until its descriptor is closed.
    brief: The file is open within `reading` only, so that it can be deleted between reads.

    Raises OSError if the file cannot be read and ValueError if its content is wrong.
    """

    def __init__(
        self,
        path: Path,
        *,
        xxh64: str,
        trusted: FileState | None,
        lengths: np.ndarray,
        dtype: np.dtype,
        pin: Callable[[Path], int] | None = None,
        brief: bool = False,
    ) -> None:
        self._descriptor = -1
        self._path, self._pin, self._brief = path, pin or _open, brief
        self._readers, self._opening = 0, threading.Lock()
        self._lengths, self._compared = lengths, np.zeros(len(lengths), dtype=bool)
        self._xxh64, self._dtype = xxh64, dtype
        self._hashing = threading.Lock()
        self._state = trusted
        with self.reading():
            self._read_head(lengths, dtype)

    def _read_head(self, lengths: np.ndarray, dtype: np.dtype) -> None:
        samples, head = len(lengths), 4 * (len(lengths) + 2)
        header = self._read(0, samples + 2, np.dtype("<u4"))
        if header[0] != samples:
            raise ValueError(f"{header[0]} samples instead of {samples}")
        self.offsets = header[1:].astype(np.int64)
        self.starts = self.offsets[1:] - lengths * dtype.itemsize
        size = os.fstat(self._descriptor).st_size
        if self.offsets[-1] != size or self.offsets[0] < head or np.any(self.starts < self.offsets[:-1] + 8):
            raise ValueError("offsets that do not fit the lengths of its documents")

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @contextlib.contextmanager
    def reading(self) -> Iterator[OpenShard]:
        """Keep the file open. Raises FileNotFoundError if it was deleted since it was last open."""
        with self._opening:
            if self._descriptor < 0:
                self._descriptor = self._pin(self._path)
            self._readers += 1
        try:
            yield self
        finally:
            with self._opening:
                self._readers -= 1
                if self._brief and self._readers == 0:
                    os.close(self._descriptor)
                    self._descriptor = -1

    def tokens(self, row: int, begin: int, count: int) -> np.ndarray:
        """`count` token ids of a document, starting at its token `begin`, [count]."""
        if not self._compared[row]:
            self._compare_length(row)
        return self._read(int(self.starts[row]) + begin * self._dtype.itemsize, count, self._dtype)

    def _compare_length(self, row: int) -> None:
        """Raise ValueError unless the document has the number of tokens that lengths.npy gives it.

        The tokens are the end of a sample, so with another number other tokens would be read. The size of the column
        has only one fitting number, because the width of the number that it begins with is the smallest possible.
        """
        begin, tokens = int(self.offsets[row]), int(self._lengths[row])
        sizes = self._read(begin, 2, np.dtype("<u4"))
        width = next(n for n in (1, 2, 4, 8) if tokens < 1 << 8 * n)
        found, wanted = int(sizes[1]), 1 + width + tokens * self._dtype.itemsize
        if found != wanted or begin + 8 + int(sizes[0]) + found != self.offsets[row + 1]:
            raise ValueError(
                f"its document {row} is not one of {tokens:,} tokens, as lengths.npy says: {found:,} bytes instead of "
                f"{wanted:,}"
            )
        self._compared[row] = True

    def id(self, row: int) -> str:
        """Id of a document in the corpus."""
        begin = int(self.offsets[row])
        size = int(self._read(begin, 1, np.dtype("<u4"))[0])
        if size > self.starts[row] - begin - 8:
            raise ValueError(f"an id of {size} bytes")
        return self._read(begin + 8, size, np.dtype(np.uint8)).tobytes().decode("utf-8")

    def _read(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        found = np.empty(count, dtype=dtype)
        while True:
            trusted = self._state
            got = os.preadv(self._descriptor, [found.data], offset)
            # Check after the read: a write updates the timestamps before it changes the content.
            if state_of(os.fstat(self._descriptor)) == trusted:
                break
            self._check_content()
        if got != found.nbytes:
            raise ValueError(f"{got} bytes instead of {found.nbytes} at {offset}")
        return found

    def _check_content(self) -> None:
        """Hash the file and trust its current state. Raises ValueError if the hash is wrong."""
        with self._hashing:
            state = settled_state(self._descriptor)
            if state == self._state:
                return
            digest, offset, chunk = xxhash.xxh64(), 0, memoryview(bytearray(_CHUNK_BYTES))
            while got := os.preadv(self._descriptor, [chunk], offset):
                digest.update(chunk[:got])
                offset += got
            if digest.hexdigest() != self._xxh64:
                raise ValueError(f"hash {digest.hexdigest()} of {offset:,} bytes, the index says {self._xxh64}")
            self._state = state


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class ShardWriter:
    """Writes the documents of a split to shards and an index. Use it in a `with` statement.

    The files are byte for byte those of `MDSWriter` of mosaicml-streaming 0.13, which is tested. Its import takes
    seconds and 300 MB, as it includes readers of images and clients of every cloud.

    dtype: uint16 or uint32. shard_bytes: Size that a shard does not exceed, unless a single document does.

    Raises OSError if a file cannot be written.
    """

    def __init__(self, folder: Path, *, dtype: np.dtype, compression: str | None, shard_bytes: int) -> None:
        self._folder, self._dtype = folder, np.dtype(dtype).newbyteorder("<")
        self._settings: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": compression,
            "hashes": ["sha1", "xxh64"],
            "size_limit": shard_bytes,
            "column_names": ["id", "tokens"],
            "column_encodings": ["str", f"ndarray:{np.dtype(dtype).name}"],
            "column_sizes": [None, None],
        }
        self._header = json.dumps(self._settings, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        self._samples: list[bytes] = []
        self._bytes = 0  # of the shard, with the samples so far
        folder.mkdir(parents=True)
        self._begin()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            if self._samples:
                self._flush()
            index = json.dumps({"shards": self._shards, "version": 2}, sort_keys=True)
            (self._folder / INDEX_NAME).write_text(index, encoding="utf-8")

    def write(self, name: str, tokens: np.ndarray) -> None:
        """Append a document: its id and its token ids [n], n > 0."""
        data, ids = name.encode(), tokens.astype(self._dtype, copy=False)
        code = next(code for code in range(4) if len(ids) < 1 << 8 * (1 << code))  # width of the length: 2^code bytes
        column = bytes([1 << 2 | code]) + len(ids).to_bytes(1 << code, "little") + ids.tobytes()
        sizes = np.array([len(data), len(column)], dtype="<u4").tobytes()
        sample = sizes + data + column
        if self._bytes + len(sample) + 4 > self._settings["size_limit"]:
            self._flush()  # even without samples, as the library does: then an empty shard precedes a huge document
        self._samples.append(sample)
        self._bytes += len(sample) + 4

    def _begin(self) -> None:
        self._samples, self._bytes = [], 8 + len(self._header)

    def _flush(self) -> None:
        """Write the samples as a shard."""
        count = len(self._samples)
        offsets = np.cumsum([4 + 4 * (count + 1) + len(self._header), *map(len, self._samples)], dtype=np.int64)
        head = np.array([count], dtype="<u4").tobytes() + offsets.astype("<u4").tobytes()
        data = b"".join([head, self._header, *self._samples])
        raw = f"shard.{len(self._shards):05}.mds"
        entry = {"samples": count, "raw_data": _entry(raw, data), "zip_data": None}
        name = raw
        if self._settings["compression"] is not None:
            import zstd  # the binding that the library uses: another one may give other bytes

            name, data = f"{raw}.zstd", zstd.compress(data, 3)
            entry["zip_data"] = _entry(name, data)
        (self._folder / name).write_bytes(data)
        self._shards.append(entry | self._settings)
        self._begin()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """What an index says about a file."""
    hashes = {"sha1": hashlib.sha1(data).hexdigest(), "xxh64": xxhash.xxh64_hexdigest(data)}
    return {"basename": name, "bytes": len(data), "hashes": hashes}
