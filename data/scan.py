"""The first pass over a corpus: filter, deduplicate, and split documents into train and validation."""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headway.data import corpora
from headway.data.config import CorpusConfig, DataError
from headway.data.document import Document
from headway.data.manifest import Split
from headway.data.progress import Bar, Progress, Say, quiet

_WHAT = {"empty": "is empty", "not_utf8": "is not UTF-8 text"}


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Index of the usable documents of a corpus, whose text is in a spool file. `order`: documents of each split."""

    ids: list[str]
    offsets: np.ndarray  # [documents] int64, bytes into the spool
    lengths: np.ndarray  # [documents] int64, bytes
    order: dict[Split, np.ndarray]
    left_out: dict[str, int]

    def text(self, spool: mmap.mmap, document: int) -> bytes:
        begin = int(self.offsets[document])
        return spool[begin : begin + int(self.lengths[document])]


def scan(cfg: CorpusConfig, spool: Path, *, progress: Progress, say: Say = quiet) -> Scan:
    """Read the corpus once: write usable documents without duplicates to `spool` and split them by hash of the text.

    Split and order come from separate bits of the hash, so the position of a document does not depend on the others.
    Raises DataError for an unusable document (unless they are skipped), or if fewer than two documents are left.
    """
    ids: list[str] = []
    lengths: list[int] = []
    digests: dict[bytes, None] = {}
    left_out: Counter[str] = Counter()
    with spool.open("wb") as stream, progress("read documents", unit="documents") as bar:
        for document in _usable(_counted(corpora.documents(cfg.corpus, say=say), bar), cfg, left_out):
            digest = hashlib.blake2b(document.text, digest_size=16).digest()
            if digest in digests:
                left_out["duplicate"] += 1
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
    )


def _counted(found: Iterable[Document], bar: Bar) -> Iterator[Document]:
    for document in found:
        yield document
        bar.update(1)


def _usable(found: Iterable[Document], cfg: CorpusConfig, left_out: Counter[str]) -> Iterable[Document]:
    for document in found:
        if document.problem is not None:
            if cfg.bad_documents == "error":
                raise DataError(
                    f"{document.origin}: document {_WHAT[document.problem]}; fix or remove it, "
                    "or set bad_documents: skip to skip and count such documents"
                )
            left_out[document.problem] += 1
        elif len(document.text) < cfg.min_document_bytes:
            left_out["too_short"] += 1
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
