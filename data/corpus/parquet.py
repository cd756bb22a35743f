"""Rows of Parquet files: one document each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headway.data.config import DataError
from headway.data.corpus import containers
from headway.data.corpus.document import Document, check_size
from headway.data.corpus.rows import Field, FieldRow

# Rows that are decoded at once. A dictionary repeats a value without taking space in the file, so the rows of groups
# that may have a large dictionary are decoded a few at a time.
_ROWS, _REPEATED_ROWS = 64, 2
_SMALL_BYTES = 1 << 20
_FREE_BYTES = 40 << 20  # may expand more than `containers.MAX_EXPANSION` times; a page is decoded at once


def parquet_documents(path: Path, id: str, field: str) -> Iterator[Document]:
    """Yield a document per row of a Parquet file. A null counts as empty. Raises DataError as `parquet_rows` does."""
    for row in parquet_rows(path, id, [Field(field)]):
        assert row.values is not None, "bytes are decoded later"
        yield Document.make(row.id, row.origin, row.values[0])


def parquet_rows(path: Path, id: str, fields: Sequence[Field]) -> Iterator[FieldRow]:
    """Yield the columns `fields` of each row of a Parquet file, as bytes.

    Raises DataError if the file is not Parquet, does not have exactly one column of each name, or if a column is not
    text; if a value is too large, or if a row group expands more than `containers.MAX_EXPANSION` times.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or use jsonl") from None
    try:
        with path.open("rb") as stream:
            containers.check_pointer(path, stream.read(1 << 10))
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as table:
            for field in fields:
                _check_column(path, field, table.schema_arrow)
            number, names = 0, [field.name for field in fields]
            for group in range(table.num_row_groups):
                rows = _rows_at_once(path, table, group)
                for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=names):
                    for values in zip(*(_as_binary(batch.column(name)) for name in names), strict=True):
                        number += 1
                        origin = f"{path}: row {number}"
                        yield FieldRow(f"{id}:{number}", origin, tuple(_bytes(value, origin) for value in values))
    except DataError:
        raise
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except Exception as error:  # pyarrow raises KeyError, OverflowError and others for damaged files
        kind = "" if isinstance(error, pa.ArrowException) else f"{type(error).__name__}: "
        raise _unreadable(path, f"{kind}{error}") from error


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(f"{path}: cannot be read as Parquet ({why}); fetch or write it again")


def _check_column(path: Path, field: Field, schema: Any) -> None:
    import pyarrow as pa

    name, key = field.name, field.key
    count = schema.names.count(name)
    if count > 1:
        raise DataError(f"{path}: {count} columns are named {name!r}; rename all but one, or set {key} to another")
    if count == 0:
        names = ", ".join(schema.names[:50]) or "none"
        raise DataError(f"{path}: no column {name!r}; set {key} to one of its columns: {names}")
    kind = schema.field(name).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        texts = [column.name for column in schema if "string" in str(column.type)]
        choice = f"set {key} to a text column ({', '.join(texts[:20])})" if texts else "none of its columns is text"
        raise DataError(f"{path}: column {name!r} holds {kind}, not text; {choice}, or convert it to strings")


def _rows_at_once(path: Path, table: Any, group: int) -> int:
    """Rows per batch that bound the memory. Raises DataError if this row group expands too much.

    Metadata of a single column are not looked at: for a damaged file, pyarrow's function for it ends the process.
    """
    stored, size = path.stat().st_size, table.metadata.row_group(group).total_byte_size
    if size > max(_FREE_BYTES, containers.MAX_EXPANSION * stored):
        raise DataError(
            f"{path}: {stored:,} bytes become {size:,} in row group {group + 1}; data that expands more than "
            f"{containers.MAX_EXPANSION} times is refused. Remove the file, or write it again without compression if "
            "it is meant"
        )
    return _ROWS if 0 <= size <= _SMALL_BYTES else _REPEATED_ROWS


def _as_binary(column: Any) -> Any:
    """The column as bytes, because Arrow does not check UTF-8 and one invalid row must not hide the others."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary())


def _bytes(value: Any, origin: str) -> bytes | None:
    if not value.is_valid:
        return None
    check_size(value.as_buffer().size, origin)  # before it is copied
    return value.as_py()
