"""Text sequences packed across documents.

The documents of a split, each with its end-of-document token, form one stream of T tokens in stored order. Sequence i
of length S consists of the tokens i*S .. i*S + S: S inputs, and the next token of each. Consecutive sequences share one
token, which is a label of the first and an input of the second, so every token except the first is predicted exactly
once per epoch. There are N = (T - 1) // S sequences; the remainder at the end is `dropped_tokens`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from pathlib import Path

import numpy as np

from headway.data.config import DataError
from headway.data.manifest import Split
from headway.data.mds import MdsSplit
from headway.data.order import GlobalOrder
from headway.data.prefetch import join
from headway.data.source import Sample


class PackedText:
    """Sequences of a split of an MDS dataset. Training is shuffled by `seed`; validation is in stored order.

    Raises DataError if the split is shorter than one sequence.
    """

    def __init__(
        self,
        path: str,
        *,
        split: Split,
        seq_len: int,
        seed: int,
        shuffle_window: int,
        remote: str | None = None,
        cache_bytes: int | None = None,
        retry_s: float = 0.0,
    ) -> None:
        self._documents = MdsSplit(
            Path(path).expanduser(), split, remote=remote, cache_bytes=cache_bytes, retry_s=retry_s
        )
        self._documents.check_cache(shuffle_window if split == "train" else 1)
        self.seq_len = seq_len
        self.vocab_size = self._documents.manifest.vocab_size
        self.fingerprint = self._documents.manifest.fingerprint
        self.num_sequences = self._lay_out(split, path)
        self._order = None
        self._fetched_ahead: deque[tuple[int, ...]] = deque(maxlen=4)  # threads read in several windows at a time
        self._closed, self._fetch_lock = False, threading.Lock()
        self._fetching: list[threading.Thread] = []
        if split == "train":
            self._order = GlobalOrder(self.sequences_per_shard(), seed=seed, window=shuffle_window)

    def _lay_out(self, split: Split, path: str) -> int:
        """Number of sequences. Raises DataError if there is none."""
        self.document_ends = np.cumsum(self._documents.lengths)
        tokens = int(self.document_ends[-1]) if len(self.document_ends) else 0
        sequences = max(0, (tokens - 1) // self.seq_len)
        if sequences == 0:
            raise DataError(
                f"data.seq_len: {self.seq_len:,} (and the next token) is longer than the {split} split of {path}, "
                f"which has {tokens:,} tokens; use seq_len <= {max(tokens - 1, 0):,}, or build a larger corpus"
            )
        self.dropped_tokens = tokens - 1 - sequences * self.seq_len
        return sequences

    def sequences_per_shard(self) -> list[int]:
        """Number of sequences per shard. A sequence belongs to the shard that contains its first token."""
        ends = np.concatenate([[0], self.document_ends])[self._documents.first_document]
        first_sequence = np.minimum(-(-ends // self.seq_len), self.num_sequences)
        return np.diff(first_sequence).tolist()

    def index(self, position: int) -> int:
        if self._order is None:
            return position % self.num_sequences
        if self._documents.remote is not None:
            self._fetch_ahead(self._order, position)
        return self._order.index(position)

    def _fetch_ahead(self, order: GlobalOrder, position: int) -> None:
        """Fetch the shards of the next window in the background. Those of this one are not deleted for them."""
        shards = order.shards_after(position)

        def fetch() -> None:
            for shard in shards:
                if self._closed:
                    return
                # Ignore errors here: reading the shard raises them again in the thread of the consumer.
                with contextlib.suppress(DataError, OSError):
                    if not self._documents.fetch_ahead(shard, keep=keep):
                        return

        with self._fetch_lock:  # called by every data thread
            if self._closed or shards in self._fetched_ahead:
                return
            self._fetched_ahead.append(shards)
            keep = {*shards, *order.shards_at(position)}
            thread = threading.Thread(target=fetch, name="fetch-ahead", daemon=True)
            self._fetching = [*(other for other in self._fetching if other.is_alive()), thread]
            thread.start()

    def close(self) -> None:
        """End the threads after their current shard. Does not wait for threads that hang."""
        with self._fetch_lock:
            self._closed = True
        join(self._fetching)

    def reading(self) -> list[Path]:
        return self._documents.reading()

    def sample(self, index: int) -> Sample:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        begin, need = index * self.seq_len, self.seq_len + 1
        tokens = np.empty(need, dtype=self._documents.dtype)
        segments = np.empty(need, dtype=np.int32)
        document = int(np.searchsorted(self.document_ends, begin, "right"))
        skip = begin - (int(self.document_ends[document - 1]) if document else 0)
        filled = segment = 0
        while filled < need:
            piece = self._documents.tokens(document, skip, skip + need - filled)
            tokens[filled : filled + len(piece)] = piece
            segments[filled : filled + len(piece)] = segment
            filled += len(piece)
            document, segment, skip = document + 1, segment + 1, 0
        if int(tokens.max()) >= self.vocab_size:
            first = int(np.argmax(tokens >= self.vocab_size))
            self._refuse(int(np.searchsorted(self.document_ends, begin + first, "right")), tokens)
        return Sample(tokens, segments)

    def _refuse(self, document: int, tokens: np.ndarray) -> None:
        """Raise DataError: a model would read another row of a shared table, or a row of another rank, without one."""
        raise DataError(self._documents.beyond_vocabulary(document, int(tokens.max())))

    def documents(self, index: int) -> range:
        begin = index * self.seq_len
        first, last = np.searchsorted(self.document_ends, [begin, begin + self.seq_len], "right")
        return range(int(first), int(last) + 1)
