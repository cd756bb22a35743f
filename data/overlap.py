"""Documents of a validation split that are trained on, where the two are splits of different datasets.

A build removes equal documents of one dataset. Nothing does so for a mixture, or for the datasets of `data.validation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headway.data.mds import MdsSplit

_LEAST_TOKENS = 32
"""Shorter documents may be equal by chance."""

_MOST_READS = 2000
"""Training documents that are read for one pair of datasets: about a tenth of a second."""

_MOST_FOR_ONE = 100
"""Of one validation document. Those of a common length, which are the short ones, are not compared."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """`shared` of `compared` validation documents are equal to a training document, token by token."""

    compared: int
    shared: int


def overlap(validation: Path, train: Path) -> Overlap:
    """Compare the first validation documents of one dataset with the training documents of another one.

    Both must be on this machine and have one tokenizer. Only documents of equal length are read, and only from shards
    that are not compressed, so a document that is not found may still be there. Raises DataError for damaged shards.
    """
    held_out, trained = MdsSplit(validation, "validation"), MdsSplit(train, "train")
    here = _on_disk(trained)
    order = np.argsort(trained.lengths, kind="stable")
    sizes = trained.lengths[order]
    compared = shared = reads = 0
    for document in np.flatnonzero(_on_disk(held_out) & (held_out.lengths >= _LEAST_TOKENS)).tolist():
        length = held_out.lengths[document]
        begin, end = np.searchsorted(sizes, [length, length + 1])
        candidates = [one for one in order[begin:end].tolist() if here[one]] if end - begin <= _MOST_FOR_ONE else None
        if candidates is None:
            continue
        reads += 1 + len(candidates)
        if reads > _MOST_READS:
            break
        compared += 1
        shared += _is_among(held_out, document, trained, candidates)
    return Overlap(compared=compared, shared=shared)


def _is_among(held_out: MdsSplit, document: int, trained: MdsSplit, candidates: Sequence[int]) -> bool:
    if not candidates:
        return False
    first = held_out.tokens(document, 0, _LEAST_TOKENS)
    return any(
        np.array_equal(trained.tokens(one, 0, _LEAST_TOKENS), first)
        and np.array_equal(trained.tokens(one), held_out.tokens(document))
        for one in candidates
    )


def _on_disk(split: MdsSplit) -> np.ndarray:
    """Whether each document can be read without unpacking its shard, [documents] bool."""
    there = [(split.root / split.split / shard.raw_name).exists() for shard in split.shards]
    return np.repeat(np.array(there, dtype=bool), [shard.samples for shard in split.shards])
