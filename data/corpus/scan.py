"""The first pass over a corpus: filter, deduplicate, and split documents into train and validation."""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headway.data.config import CorpusConfig, DataError
from headway.data.corpus import read
from headway.data.corpus.document import Document
from headway.data.corpus.folders import Found
from headway.data.manifest import Split
from headway.data.progress import Bar, Progress, Say, quiet

_WHAT = {
    "empty": "is empty",
    "not_utf8": "is not UTF-8 text",
    "binary": "is full of NUL bytes, so it is UTF-16 without a byte order mark, or no text",
}
_LEFT_OUT = {"not_utf8": "not UTF-8", "binary": "full of NUL bytes", "too_short": "too short"}


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Index of the usable documents of a corpus, whose text is in a spool file. `order`: documents of each split."""

    ids: list[str]
    offsets: np.ndarray  # [documents] int64, bytes into the spool
    lengths: np.ndarray  # [documents] int64, bytes
    order: dict[Split, np.ndarray]
    left_out: dict[str, int]
    first_left_out: dict[str, str]  # reason -> where the first of these documents is

    def summary(self) -> str:
        """What was read and left out, for the user."""
        reasons = [
            f"{count:,} {_LEFT_OUT.get(reason, reason)} (first: {self.first_left_out[reason]})"
            for reason, count in sorted(self.left_out.items())
        ]
        return f"{len(self.ids):,} documents, left out: {', '.join(reasons) or 'none'}"

    def text(self, spool: mmap.mmap, document: int) -> bytes:
        begin = int(self.offsets[document])
        return spool[begin : begin + int(self.lengths[document])]


def scan(cfg: CorpusConfig, spool: Path, *, files: Found | None = None, progress: Progress, say: Say = quiet) -> Scan:
    """Read the corpus once: write usable documents without duplicates to `spool` and split them by hash of the text.

    Split and order come from separate bits of the hash, so the position of a document does not depend on the others.
    Raises DataError for an unusable document (unless they are skipped), or if fewer than two documents are left.
    """
    ids: list[str] = []
    lengths: list[int] = []
    digests: dict[bytes, None] = {}
    left_out: Counter[str] = Counter()
    first: dict[str, str] = {}
    with spool.open("wb") as stream, progress("read documents", unit="documents") as bar:
        for document in _usable(_counted(read.documents(cfg.corpus, files, say=say), bar), cfg, left_out, first):
            digest = hashlib.blake2b(document.text, digest_size=16).digest()
            if digest in digests:
                left_out["duplicate"] += 1
                first.setdefault("duplicate", document.origin)
                continue
            digests[digest] = None
            ids.append(document.id)
            lengths.append(len(document.text))
            stream.write(document.text)
    if len(ids) < 2:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "none skipped"
        raise DataError(
            f"corpus: {len(ids)} usable document{'s' * (len(ids) != 1)} ({reasons}), but one is needed for training "
            "and one for validation; give more files, or split a text into a .jsonl file with one document per line"
        )
    sizes = np.array(lengths, dtype=np.int64)
    return Scan(
        ids=ids,
        offsets=np.cumsum(sizes) - sizes,
        lengths=sizes,
        order=_divide(list(digests), cfg.validation_fraction),
        left_out=dict(left_out),
        first_left_out=first,
    )


def _counted(found: Iterable[Document], bar: Bar) -> Iterator[Document]:
    for document in found:
        yield document
        bar.update(1)


def _usable(
    found: Iterable[Document], cfg: CorpusConfig, left_out: Counter[str], first: dict[str, str]
) -> Iterable[Document]:
    for document in found:
        if document.problem is not None:
            if cfg.bad_documents == "error":
                raise DataError(
                    f"{document.origin}: document {_WHAT[document.problem]}; fix or remove it, "
                    "or set bad_documents: skip to skip and count such documents"
                )
            left_out[document.problem] += 1
            first.setdefault(document.problem, document.origin)
        elif len(document.text) < cfg.min_document_bytes:
            left_out["too_short"] += 1
            first.setdefault("too_short", document.origin)
        else:
            yield document


def _divide(digests: list[bytes], validation_fraction: float) -> dict[Split, np.ndarray]:
    bits = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2)
    place, rank = bits[:, 0] / 2.0**64, bits[:, 1]
    validation = place < validation_fraction
    # In a small corpus a split may be empty by chance. It then gets the document closest to the threshold.
    if not validation.any():
        validation[place.argmin()] = True
    elif validation.all():
        validation[place.argmax()] = False
    order = np.lexsort((place, rank))
    return {"train": order[~validation[order]], "validation": order[validation[order]]}
