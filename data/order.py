"""The global order of training sequences, a pure function of seed and position.

Each epoch permutes the shards. Then the sequences of each window of consecutive shards are permuted within the window,
so that shards are read (and fetched) window by window. Ranks, workers and resumed runs look up positions; the order has
no state.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

_CACHED_WINDOWS = 4


def random_bits(count: int, *key: int | str) -> np.ndarray:
    """`count` uniform uint64 values that depend only on `key`.

    They are the raw output of Philox-4x64, which numpy guarantees to be stable between versions. It gives no such
    guarantee for its distributions and shuffles.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)


def permutation(count: int, *key: int | str) -> np.ndarray:
    """A uniform random permutation of 0..count-1 that depends only on `key`, [count] int64."""
    return np.argsort(random_bits(count, *key), kind="stable")


class GlobalOrder:
    """Maps positions of the global order to sequence indices, which count all shards' sequences in stored order.

    Computing a window takes O(sequences of the window); recent windows are cached. Thread-safe.
    """

    def __init__(self, sequences_per_shard: Sequence[int], *, seed: int, window: int) -> None:
        counts = np.asarray(sequences_per_shard, dtype=np.int64)
        first = np.concatenate([[0], np.cumsum(counts)])
        self.num_sequences = int(first[-1])
        self._shards = np.flatnonzero(counts)
        self._counts, self._first = counts[self._shards], first[self._shards]
        self._seed, self._window = seed, window
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def index(self, position: int) -> int:
        """Sequence index at `position` >= 0. Every sequence occurs exactly once per epoch."""
        epoch, place = divmod(position, self.num_sequences)
        with self._lock:
            shards, starts = self._epoch(epoch)
            window = int(np.searchsorted(starts, place, "right")) - 1
            return int(self._sequences(epoch, window, shards)[place - starts[window]])

    def shards_at(self, position: int) -> tuple[int, ...]:
        """Shards of the window of `position`. Their order has no meaning."""
        epoch, place = divmod(position, self.num_sequences)
        with self._lock:
            shards, starts = self._epoch(epoch)
            window = int(np.searchsorted(starts, place, "right")) - 1
            return tuple(self._shards[shards[window * self._window : (window + 1) * self._window]].tolist())

    def shards_after(self, position: int) -> tuple[int, ...]:
        """Shards of the window after that of `position`, to be fetched next. Their order has no meaning."""
        epoch, place = divmod(position, self.num_sequences)
        with self._lock:
            shards, starts = self._epoch(epoch)
            window = int(np.searchsorted(starts, place, "right"))
            if window == len(starts):
                shards, window = self._epoch(epoch + 1)[0], 0
            members = shards[window * self._window : (window + 1) * self._window]
            return tuple(self._shards[members].tolist())

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the shards in an epoch, and the start of each window as a position within the epoch."""
        found = self._epochs.get(epoch)
        if found is None:
            shards = permutation(len(self._counts), "shards", self._seed, epoch)
            ends = np.cumsum(self._counts[shards])
            starts = np.concatenate([[0], ends[self._window - 1 : -1 : self._window]])
            found = self._epochs[epoch] = (shards, starts)
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return found

    def _sequences(self, epoch: int, window: int, shards: np.ndarray) -> np.ndarray:
        found = self._windows.get((epoch, window))
        if found is None:
            members = shards[window * self._window : (window + 1) * self._window]
            stored = np.concatenate([np.arange(self._first[s], self._first[s] + self._counts[s]) for s in members])
            found = stored[permutation(len(stored), "window", self._seed, epoch, window)]
            self._windows[epoch, window] = found
            if len(self._windows) > _CACHED_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end((epoch, window))
        return found
