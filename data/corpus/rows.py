"""Rows of JSON lines and of the Hugging Face hub: one document each. Parquet: `headway.data.corpus.parquet`."""

from __future__ import annotations

import codecs
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.data.config import DataError
from headway.data.corpus import containers
from headway.data.corpus.config import HuggingFaceCorpus, PairsCorpus
from headway.data.corpus.document import MAX_DOCUMENT_BYTES, Document
from headway.data.progress import Say, quiet

# The limits of a line bound the memory of reading it: a decoded character takes up to 4 bytes if one of them is wide,
# and a JSON value about 70. In ASCII, a document may take twice its bytes, because of escapes.
_MAX_LINE_BYTES = 2 * MAX_DOCUMENT_BYTES
_MAX_WIDE_LINE_BYTES = MAX_DOCUMENT_BYTES + (4 << 20)
_MAX_VALUES = 1_000_000
_COUNTED_BYTES = 4 << 20
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Field:
    """A field that is read of each row, and the key of the corpus that names it, for messages."""

    name: str
    key: str = "corpus.field"


@dataclass(frozen=True, slots=True)
class FieldRow:
    """A row. values: those of the fields, in their order (None: null); None if the row is not UTF-8."""

    id: str
    origin: str
    values: tuple[str | bytes | None, ...] | None


def jsonl_documents(path: Path, id: str, field: str, *, say: Say = quiet) -> Iterator[Document]:
    """Yield a document per line of a file of JSON lines, compressed or not. Skips blank lines.

    A document whose `field` is null counts as empty. Raises DataError as `jsonl_rows` does.
    """
    return map(_document, jsonl_rows(path, id, [Field(field)], say=say))


def _document(row: FieldRow) -> Document:
    if row.values is None:
        return Document(row.id, row.origin, b"", "not_utf8")
    return Document.make(row.id, row.origin, row.values[0])


def jsonl_rows(path: Path, id: str, fields: Sequence[Field], *, say: Say = quiet) -> Iterator[FieldRow]:
    """Yield the `fields` of each line of a file of JSON lines, compressed or not. Skips blank lines.

    `say` is told if the format of the file is not that of its name.
    Raises DataError with file and line if a line is too long, is not a JSON object or does not have a field.
    """
    found = containers.head(path)
    keys = {field.name: json.dumps(field.name, ensure_ascii=False).encode() for field in fields}
    if found.note:
        say(found.note)
    for number, line in enumerate(_lines(containers.chunks(path, found.format), path), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{origin}: UTF-16; save the file as UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
        row, broken = _row(line, origin)
        if not isinstance(row, dict):
            shown = ", ".join(f"{name!r}: ..." for name in keys)
            raise DataError(f"{origin}: {type(row).__name__} instead of a JSON object such as {{{shown}}}")
        for name, key in keys.items():
            if line.count(key) > 1:
                _check_field_once(line, name, origin)
        del line  # up to 64 MiB
        values = None if broken else tuple(_value(row, field, origin) for field in fields)
        yield FieldRow(f"{id}:{number}", origin, values)


def _row(line: bytes, origin: str) -> tuple[Any, bool]:
    """The JSON value of a line, and whether its text is not UTF-8.

    Only a line that is JSON apart from its encoding is a single unusable document, which `bad_documents: skip` may
    skip. Everything else is damage of the file.
    """
    if len(line) > _COUNTED_BYTES:
        _check_values(line, origin)
    try:
        text, broken = line.decode("utf-8"), False
    except UnicodeDecodeError:
        text, broken = line.decode("utf-8", errors="replace"), True
    try:
        return json.loads(text), broken
    except (ValueError, RecursionError) as error:
        what = "neither UTF-8 nor JSON" if broken else "not JSON"
        what += " but full of NUL bytes, perhaps UTF-16" if b"\0" in line else ""
        raise DataError(
            f"{origin}: {what} ({error}); write one JSON object per line in UTF-8, or fetch the file again if it is "
            "damaged"
        ) from None


def _check_field_once(line: bytes, field: str, origin: str) -> None:
    """Raise DataError if the object of a line has `field` twice, of which Python's parser keeps the last."""

    def pairs(found: list[tuple[str, Any]]) -> int:
        return sum(key == field for key, _ in found)

    if json.loads(line.decode("utf-8", errors="replace"), object_pairs_hook=pairs) > 1:
        raise DataError(f"{origin}: the object has the field {field!r} twice; keep one text per line")


def _check_values(line: bytes, origin: str) -> None:
    """Raise DataError if a long line has so many JSON values that parsing it would take gigabytes."""
    values = begin = 0
    for string in _JSON_STRING.finditer(line):
        values += 1 + _separators(line, begin, string.start())
        begin = string.end()
        if values > _MAX_VALUES:
            break
    if values + _separators(line, begin, len(line)) > _MAX_VALUES:
        raise DataError(f"{origin}: a line of more than {_MAX_VALUES:,} JSON values; write one document per line")


def _separators(line: bytes, begin: int, end: int) -> int:
    return sum(line.count(mark, begin, end) for mark in (b",", b"[", b"{"))


def hub_documents(corpus: HuggingFaceCorpus) -> Iterator[Document]:
    """Yield a document per row of a dataset of the Hugging Face hub. Raises DataError as `hub_rows` does."""
    return map(_document, hub_rows(corpus, [Field(corpus.field)]))


def hub_rows(corpus: HuggingFaceCorpus | PairsCorpus, fields: Sequence[Field]) -> Iterator[FieldRow]:
    """Yield the `fields` of each row of a dataset of the hub: streamed, or from the local cache if offline.

    Code in a dataset is never executed. Raises DataError if the `datasets` package or the network is missing, or if the
    dataset, its split or a field does not exist.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"corpus.dataset: {corpus.dataset!r} needs the `datasets` package; pip install 'headway[hf]', "
            "or give local files: `paths` of a jsonl, parquet or pairs corpus"
        ) from None
    # Streaming always reads over the network, even if the dataset is cached. If offline, read the cache instead.
    offline = bool(getattr(datasets.config, "HF_HUB_OFFLINE", False) or datasets.config.HF_DATASETS_OFFLINE)
    try:
        rows = datasets.load_dataset(
            corpus.dataset, corpus.subset, split=corpus.split, revision=corpus.revision, streaming=not offline
        )
        for number, row in enumerate(rows):
            origin = f"{corpus.dataset}[{corpus.split}] row {number}"
            yield FieldRow(f"{corpus.split}:{number}", origin, tuple(_value(row, field, origin) for field in fields))
    except DataError:
        raise
    except Exception as error:  # `datasets` raises errors of five HTTP and file libraries
        raise _hub_error(corpus, error, offline) from error


def _hub_error(corpus: HuggingFaceCorpus | PairsCorpus, error: Exception, offline: bool) -> DataError:
    """Distinguish "no network", by far the most frequent cause, from "no such dataset". They need different fixes."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    # Missing data first: the hub's "not found" errors derive from its connection errors.
    missing = names & {"DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError", "ValueError"}
    network = names & {"ConnectionError", "OfflineModeIsEnabled", "TimeoutError", "Timeout", "TimeoutException"}
    network |= names & {"ConnectError", "LocalEntryNotFoundError", "MaxRetryError", "gaierror", "NetworkError"}
    what = f"corpus.dataset: {corpus.dataset!r} (split {corpus.split!r}, subset {corpus.subset!r})"
    detail = f"{type(error).__name__}: {error}"
    if offline or (network and not missing):
        state = "HF_DATASETS_OFFLINE is set and it is not in the local cache" if offline else "the hub is not reachable"
        return DataError(
            f"{what}: {state} ({detail}). Without a network, use local paths (`type: parquet`, `jsonl` or `pairs`); or "
            "fill the cache on a machine with a network, copy it, and set HF_HOME to it and HF_DATASETS_OFFLINE=1"
        )
    return DataError(f"{what}: cannot be loaded ({detail}); check dataset, subset, split, revision and access rights")


def _value(row: dict[str, Any], field: Field, origin: str) -> str | None:
    if field.name not in row:
        has = ", ".join(map(repr, list(row)[:20])) or "none"
        raise DataError(f"{origin}: no field {field.name!r}; set {field.key} to one of its fields: {has}")
    value = row[field.name]
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{origin}: field {field.name!r} holds {type(value).__name__}, not text; set {field.key} to a text field"
        )
    return value


def _lines(chunks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Split chunks into lines. A line may span several chunks. Raises DataError when a line becomes too long."""
    number, size = 1, 0
    parts: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        size += len(first)
        if size > _MAX_WIDE_LINE_BYTES and (size > _MAX_LINE_BYTES or not all(part.isascii() for part in parts)):
            raise DataError(
                f"{path}:{number}: a line of more than {size - len(first):,} bytes; a document may have "
                f"{MAX_DOCUMENT_BYTES:,} bytes, and its line twice as many if they are escaped. Write one document per "
                "line, and split long documents"
            )
        for line in rest:
            whole = b"".join(parts)
            parts.clear()
            yield whole
            parts, size, number = [line], len(line), number + 1
    if parts and (last := b"".join(parts)):
        parts.clear()
        yield last
