"""The first pass over a corpus: filter, deduplicate, and split documents into train and validation."""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headway.data.config import DataError
from headway.data.corpus import read
from headway.data.corpus.config import CorpusConfig
from headway.data.corpus.cut import character_start
from headway.data.corpus.document import Document
from headway.data.corpus.folders import Found
from headway.data.manifest import Split
from headway.data.progress import Bar, Progress, Say, quiet

_WHAT = {
    "empty": "is empty",
    "empty_prompt": "has an empty prompt",
    "empty_target": "has an empty target, so there is nothing to learn",
    "not_utf8": "is not UTF-8 text",
    "binary": "is full of NUL bytes, so it is UTF-16 without a byte order mark, or no text",
}
_LEFT_OUT = {
    "not_utf8": "not UTF-8",
    "binary": "full of NUL bytes",
    "empty_prompt": "with an empty prompt",
    "empty_target": "with an empty target",
    "one_line": "articles of one line",
    "too_short": "too short",
    "in_validation": "also in the validation files",
}
_NEARLY = 0.9  # of the wanted bytes of validation


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Index of the usable documents of a corpus, whose text is in a spool file. `order`: documents of each split.

    prompts: Bytes of the prompt of each document, [documents] int64; None for a corpus of texts.
    """

    ids: list[str]
    offsets: np.ndarray  # [documents] int64, bytes into the spool
    lengths: np.ndarray  # [documents] int64, bytes
    order: dict[Split, np.ndarray]
    prompts: np.ndarray | None
    left_out: dict[str, int]
    first_left_out: dict[str, str]  # reason -> where the first of these documents is

    def summary(self) -> str:
        """What was read and left out, for the user."""
        reasons = [
            f"{count:,} {_LEFT_OUT.get(reason, reason)} (first: {self.first_left_out[reason]})"
            for reason, count in sorted(self.left_out.items())
            if count
        ]
        return f"{len(self.ids):,} documents, left out: {', '.join(reasons) or 'none'}"

    def text(self, spool: mmap.mmap, document: int) -> bytes:
        begin = int(self.offsets[document])
        return spool[begin : begin + int(self.lengths[document])]


def scan(
    cfg: CorpusConfig,
    spool: Path,
    *,
    files: Found | None = None,
    own: Found | None = None,
    progress: Progress,
    say: Say = quiet,
) -> Scan:
    """Read the corpus once: write usable documents without duplicates to `spool` and divide them into splits.

    files, own: Files of the corpus and of the validation, if they were found before.

    Documents are divided by hash of the text, or as `cfg.validation` says. The order within a split is that of the
    hashes. Split and order come from separate bits of the hash, so the position of a document does not depend on the
    others. The split of a pair comes from the hash of its prompt, so that no prompt is in both splits. Raises DataError
    for an unusable document (unless they are skipped), or if a split would be empty.
    """
    ids: list[str] = []
    lengths: list[int] = []
    prompts: list[int] = []
    places: dict[bytes, int] = {}  # digest -> number of the document
    left_out: Counter[str] = Counter()
    first: dict[str, str] = {}
    validation, held_out = cfg.validation_corpus(), 0
    # Validation documents come first, so that of two equal documents the one for training is left out.
    parts = [] if validation is None else [read.documents(validation, own, say=say)]
    with spool.open("wb") as stream, progress("read documents", unit="documents") as bar:
        for part in (*parts, read.documents(cfg.corpus, files, say=say)):
            held_out = len(ids)
            for document in _usable(_counted(part, bar), cfg, left_out, first):
                digest = _digest(document.text, document.prompt_bytes)
                if digest in places:
                    reason = "in_validation" if places[digest] < held_out else "duplicate"
                    left_out[reason] += 1
                    first.setdefault(reason, document.origin)
                    continue
                places[digest] = len(ids)
                ids.append(document.id)
                lengths.append(len(document.text))
                if document.prompt_bytes is not None:
                    prompts.append(document.prompt_bytes)
                stream.write(document.text)
    if validation is not None:
        left_out.setdefault("in_validation", 0)
    digests = list(places)
    if cfg.validation is not None and cfg.validation.last is not None:
        begin = _cut_last(spool, ids, lengths, digests, cfg.validation.last, whole=bool(prompts))
        is_validation = np.arange(len(ids)) >= begin
    elif validation is not None:
        is_validation = np.arange(len(ids)) < held_out
    else:
        is_validation = _by_hash(digests, cfg.validation_fraction) if len(ids) > 1 else np.zeros(len(ids), bool)
    _check_splits(is_validation, left_out)
    sizes = np.array(lengths, dtype=np.int64)
    return Scan(
        ids=ids,
        offsets=np.cumsum(sizes) - sizes,
        lengths=sizes,
        order=_divide(digests, is_validation),
        prompts=np.array(prompts, dtype=np.int64) if prompts else None,
        left_out=dict(left_out),
        first_left_out=first,
    )


def _digest(text: bytes, prompt_bytes: int | None = None) -> bytes:
    """16 bytes. Of a pair: 8 of its prompt, which decide about the split, and 8 of all its text."""
    if prompt_bytes is None:
        return hashlib.blake2b(text, digest_size=16).digest()
    return b"".join(hashlib.blake2b(part, digest_size=8).digest() for part in (text[:prompt_bytes], text))


def _check_splits(is_validation: np.ndarray, left_out: Counter[str]) -> None:
    held_out = int(is_validation.sum())
    if 0 < held_out < len(is_validation):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()) if count) or "none skipped"
    count = len(is_validation)
    divided = "" if count < 2 else f", {held_out} of them for validation"
    raise DataError(
        f"corpus: {count} usable document{'s' * (count != 1)}{divided} ({reasons}), but one is needed for training "
        "and one for validation; give more files, cut the text into documents (`corpus.document: blank_line` of a "
        "text corpus), or use its end (`validation: last 10%`)"
    )


def _cut_last(
    spool: Path, ids: list[str], lengths: list[int], digests: list[bytes], fraction: float, *, whole: bool
) -> int:
    """The first document of the last `fraction` of the bytes. It may be the second half of a document unless `whole`.

    A document that lies across the boundary is for training, unless less than nine tenths of the wanted bytes come
    after it. Then it is cut at the next line end, or at the next character if that is far.
    """
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    if not len(ends):
        return 0
    total = int(ends[-1])
    boundary = int(total * (1 - fraction))
    wanted = total - boundary
    number = int(np.searchsorted(ends, boundary, side="right"))
    begin = int(ends[number]) - lengths[number]
    if begin == boundary or total - int(ends[number]) >= _NEARLY * wanted:
        return number if begin == boundary else number + 1
    if whole:
        return number + (number + 1 < len(ids))
    with spool.open("rb") as stream:
        stream.seek(begin)
        text = stream.read(lengths[number])
    at = text.find(b"\n", boundary - begin) + 1
    if not at or at - (boundary - begin) > (1 - _NEARLY) * wanted or not text[at:].strip():
        at = character_start(text, boundary - begin)
    halves = [text[:at], text[at:]]
    if not all(half.strip() for half in halves):
        return number + bool(halves[0].strip())
    ids[number : number + 1] = [ids[number], f"{ids[number]}@{at}"]
    lengths[number : number + 1] = map(len, halves)
    digests[number : number + 1] = map(_digest, halves)
    return number + 1


def _counted(found: Iterable[Document], bar: Bar) -> Iterator[Document]:
    for document in found:
        yield document
        bar.update(1)


def _usable(
    found: Iterable[Document], cfg: CorpusConfig, left_out: Counter[str], first: dict[str, str]
) -> Iterable[Document]:
    for document in found:
        if document.problem is not None:
            if cfg.bad_documents == "error" and document.problem in _WHAT:
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


def _places(digests: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(place in [0, 1), rank) of each document: separate bits of its hash."""
    bits = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2)
    return bits[:, 0] / 2.0**64, bits[:, 1]


def _by_hash(digests: list[bytes], validation_fraction: float) -> np.ndarray:
    place, _ = _places(digests)
    validation = place < validation_fraction
    # In a small corpus a split may be empty by chance. It then gets the document closest to the threshold; of pairs all
    # that have its prompt, and thus its place.
    if not validation.any():
        validation = place == place.min()
    elif validation.all():
        validation = place < place.max()
    return validation


def _divide(digests: list[bytes], validation: np.ndarray) -> dict[Split, np.ndarray]:
    place, rank = _places(digests)
    order = np.lexsort((place, rank))
    return {"train": order[~validation[order]], "validation": order[validation[order]]}
