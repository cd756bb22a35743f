"""Documents from files and datasets with one document per row: JSONL, Parquet, the Hugging Face hub."""

from __future__ import annotations

import gzip
import importlib
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headway.data.config import DataError, HuggingFaceCorpus
from headway.data.document import Document

_CHUNK_BYTES = 1 << 20


def jsonl_documents(path: Path, id: str, field: str) -> Iterator[Document]:
    """Yield a document per line of a `.jsonl`, `.jsonl.gz`, `.jsonl.xz` or `.jsonl.zst` file. Skips blank lines.

    A document whose `field` is null counts as empty. Raises DataError with file and line if a line is not a JSON object
    or does not have the field.
    """
    for number, line in enumerate(_lines(_chunks(path)), start=1):
        origin, row_id = f"{path}:{number}", f"{id}:{number}"
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield Document(row_id, origin, b"", "not_utf8")
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin}: not JSON ({error}); write one JSON object per line") from None
        if not isinstance(row, dict):
            raise DataError(f"{origin}: {type(row).__name__} instead of a JSON object such as {{{field!r}: ...}}")
        yield Document.make(row_id, origin, _field(row, field, origin))


def parquet_documents(path: Path, id: str, field: str) -> Iterator[Document]:
    """Yield a document per row of a Parquet file. A null counts as empty.

    Raises DataError if the file is not Parquet, does not have the column, or if the column is not text.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or use jsonl") from None
    try:
        with pq.ParquetFile(path) as table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise DataError(f"{path}: no column {field!r}; set corpus.field to one of {', '.join(schema.names)}")
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: column {field!r} holds {kind}, not text; set corpus.field to a text column")
            number = 0
            for batch in table.iter_batches(batch_size=64, columns=[field]):
                # Read as bytes, because Arrow does not check UTF-8 and one invalid row must not hide the others.
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    number += 1
                    yield Document.make(f"{id}:{number}", f"{path}: row {number}", value)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); fetch or write it again") from error


def hub_documents(corpus: HuggingFaceCorpus) -> Iterator[Document]:
    """Yield a document per row of a dataset of the Hugging Face hub: streamed, or from the local cache if offline.

    Code in a dataset is never executed. Raises DataError if the `datasets` package or the network is missing, or if the
    dataset, its split or the field does not exist.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"corpus.dataset: {corpus.dataset!r} needs the `datasets` package; pip install 'headway[hf]', "
            "or use a jsonl or parquet corpus"
        ) from None
    # Streaming always reads over the network, even if the dataset is cached. If offline, read the cache instead.
    offline = bool(getattr(datasets.config, "HF_HUB_OFFLINE", False) or datasets.config.HF_DATASETS_OFFLINE)
    try:
        rows = datasets.load_dataset(
            corpus.dataset, corpus.subset, split=corpus.split, revision=corpus.revision, streaming=not offline
        )
        for number, row in enumerate(rows):
            origin = f"{corpus.dataset}[{corpus.split}] row {number}"
            yield Document.make(f"{corpus.split}:{number}", origin, _field(row, corpus.field, origin))
    except DataError:
        raise
    except Exception as error:  # `datasets` raises errors of five HTTP and file libraries
        raise _hub_error(corpus, error, offline) from error


def _hub_error(corpus: HuggingFaceCorpus, error: Exception, offline: bool) -> DataError:
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
            f"{what}: {state} ({detail}). Without a network, use `type: parquet` or `type: jsonl` with local paths; or "
            "fill the cache on a machine with a network, copy it, and set HF_HOME to it and HF_DATASETS_OFFLINE=1"
        )
    return DataError(f"{what}: cannot be loaded ({detail}); check dataset, subset, split, revision and access rights")


def _field(row: dict[str, Any], field: str, origin: str) -> str | None:
    if field not in row:
        has = ", ".join(map(repr, list(row)[:20])) or "none"
        raise DataError(f"{origin}: no field {field!r}; set corpus.field to one of its fields: {has}")
    value = row[field]
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{origin}: field {field!r} holds {type(value).__name__}, not text; set corpus.field to a text field"
        )
    return value


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Split chunks into lines. A line may span several chunks."""
    parts: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        for line in rest:
            yield b"".join(parts)
            parts = [line]
    if last := b"".join(parts):
        yield last


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield the contents of a file, decompressed according to its suffix. Raises DataError if damaged or truncated."""
    try:
        if path.suffix == ".zst":
            yield from _zst_chunks(path)
            return
        opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, Path.open)
        with opener(path, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch or compress it again") from error


def _zst_chunks(path: Path) -> Iterator[bytes]:
    # zstandard's stream reader does not detect a truncated file; the frame object does.
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = unpacker.decompressobj()
    inside = False
    with path.open("rb") as stream:
        while data := stream.read(_CHUNK_BYTES):
            while data:
                try:
                    chunk = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise DataError(f"{path}: not zstd, or damaged ({error}); fetch or compress it again") from None
                if chunk:
                    yield chunk
                inside, data = not frame.eof, frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = unpacker.decompressobj()
    if inside:
        raise DataError(f"{path}: truncated (ends inside a zstd frame); fetch or compress it again")
