"""What every source of training sequences answers. Legend: S sequence length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence and the token after it.

    `targets`, where set, names the positions whose next token carries a loss; otherwise all do.
    """

    tokens: np.ndarray  # [S+1] integers
    segments: np.ndarray  # [S+1] int32, number of the document within the sequence, from 0
    targets: np.ndarray | None = None  # [S] bool


class Source(Protocol):
    """Sequences by index, and the order in which training sees them. Pure: the same index gives the same sequence."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str | None:
        """Of the dataset; None when there is none."""
        ...

    @property
    def num_sequences(self) -> int | None:
        """Sequences of one epoch; None when the source has no end."""
        ...

    def index(self, position: int) -> int:
        """Sequence at a position of the global order, 0 <= position; positions run on over epochs."""
        ...

    def sample(self, index: int) -> Sample: ...

    def reading(self) -> list[Path]:
        """Files that threads wait for at this moment."""
        ...

    def close(self) -> None:
        """End the threads. Sequences can still be had."""
        ...
