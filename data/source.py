"""Interface of the sources of training sequences. Legend: S sequence length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence and its next token."""

    tokens: np.ndarray  # [S+1] integers
    segments: np.ndarray  # [S+1] int32, index of the document within the sequence, from 0; -1: padding of an encoder
    targets: np.ndarray | None = None  # [S] bool, positions whose next token has a loss; None: all


class Source(Protocol):
    """Random access to sequences, and their order in training. Both are pure functions of their argument."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the dataset, or None without one."""
        ...

    @property
    def num_sequences(self) -> int | None:
        """Sequences per epoch, or None for an infinite source."""
        ...

    def index(self, position: int) -> int:
        """Sequence index at a position >= 0 of the global order. Positions continue over epochs."""
        ...

    def sample(self, index: int) -> Sample: ...

    def documents(self, index: int) -> range:
        """Numbers, within the split, of the documents in a sequence: that of each segment of `sample`."""
        ...

    def reading(self) -> list[Path]:
        """Files that threads are currently waiting for."""
        ...

    def close(self) -> None:
        """End the threads. `sample` still works afterwards."""
        ...
