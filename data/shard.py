"""One MDS shard, open for reading. The format is described in `headway.data.mds`.

Shards are read with `pread`, not mapped into memory. If a mapped file is truncated or its disk fails, the process dies
with SIGBUS, while a read returns an error. After every read the file's `FileState` is checked. If it has changed since
the content was hashed, the content is hashed again before any token is returned. Training data therefore has the hash
of the manifest, even if a file is modified while it is read.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import xxhash

from headway.data.manifest import FileState, settled_state, state_of

_CHUNK_BYTES = 256 << 10  # fits into a core's cache


class OpenShard:
    """An open shard: its file and the offsets of the id and the tokens of each document. Closed when deleted.

    trusted: File state in which the content is known to be right, or None.
    lengths: Tokens per document, [samples].

    Raises OSError if the file cannot be read and ValueError if its content is wrong.
    """

    def __init__(
        self, path: Path, *, xxh64: str, trusted: FileState | None, lengths: np.ndarray, dtype: np.dtype
    ) -> None:
        self._descriptor = -1
        self._lengths, self._compared = lengths, np.zeros(len(lengths), dtype=bool)
        self._xxh64, self._dtype = xxh64, dtype
        self._hashing = threading.Lock()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._state = trusted
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
