"""Parquet files of any schema give all of their texts in order, or one of our errors."""

from __future__ import annotations

import datetime
import decimal
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from headway.data.config import DataError
from headway.data.corpus.parquet import parquet_documents

pa: Any = pytest.importorskip("pyarrow")
pq: Any = pytest.importorskip("pyarrow.parquet")

FILES = 600  # about five seconds
TEXTS = [None, "", " ", "the heat\r\n", "Ünï 漢字 🙂", "x" * 3000, "\x00", "null"]
PLAIN = [
    pa.null(),
    pa.bool_(),
    pa.int8(),
    pa.uint64(),
    pa.float16(),
    pa.float32(),
    pa.float64(),
    pa.binary(),
    pa.large_binary(),
    pa.binary(4),
    pa.binary_view(),
    pa.date32(),
    pa.date64(),
    pa.time32("ms"),
    pa.time64("us"),
    pa.timestamp("us"),
    pa.timestamp("ns", tz="UTC"),
    pa.duration("s"),
    pa.decimal128(9, 2),
    pa.decimal256(50, 3),
    pa.string(),
]
TEXT = [pa.string(), pa.large_string(), pa.string_view()]
TEXT += [pa.dictionary(index, pa.string()) for index in (pa.int8(), pa.uint16(), pa.int64())]
TEXT += [pa.dictionary(pa.int32(), pa.large_string())]
VALUES: dict[str, Any] = {
    "bool": True,
    "halffloat": 0.5,
    "float": 0.5,
    "double": -1.5,
    "date32[day]": datetime.date(2020, 2, 29),
    "date64[ms]": datetime.date(2020, 2, 29),
    "time32[ms]": datetime.time(1, 2, 3),
    "time64[us]": datetime.time(1, 2, 3),
    "timestamp[us]": datetime.datetime(2020, 2, 29),
    "timestamp[ns, tz=UTC]": datetime.datetime(2020, 2, 29, tzinfo=datetime.UTC),
    "duration[s]": datetime.timedelta(1),
    "decimal128(9, 2)": decimal.Decimal("1.25"),
    "decimal256(50, 3)": decimal.Decimal("1.125"),
}


def a_type(rng: random.Random, depth: int = 0) -> Any:
    """Any type of Arrow, nested up to three times."""
    if depth == 3 or rng.random() < 0.5:
        return rng.choice([*PLAIN, *TEXT])
    inner = a_type(rng, depth + 1)
    fields = [pa.field(name, a_type(rng, depth + 1)) for name in rng.choice([["a"], ["text", "b"], ["text", "text"]])]
    kinds = [pa.list_(inner), pa.large_list(inner), pa.list_(inner, 2), pa.map_(pa.string(), inner), pa.struct(fields)]
    kinds += [pa.list_view(inner), pa.run_end_encoded(pa.int32(), inner), pa.dictionary(pa.int32(), inner)]
    return rng.choice(kinds)


def a_value(kind: Any) -> Any:
    """A value of a plain type; nested columns contain nulls only."""
    if pa.types.is_integer(kind):
        return 7
    if pa.types.is_fixed_size_binary(kind):
        return b"text"
    if "binary" in str(kind):
        return b"the heat"
    return "the heat" if "string" in str(kind) else VALUES.get(str(kind))


def a_column(kind: Any, texts: list[Any], rng: random.Random) -> Any:
    """A column of type `kind`: `texts` if it holds text, otherwise some values."""
    if pa.types.is_dictionary(kind) and kind in TEXT:
        return pa.array(texts, kind.value_type).dictionary_encode().cast(kind)
    if kind in TEXT:
        return pa.array(texts, kind)
    values = [None if pa.types.is_nested(kind) or rng.random() < 0.2 else a_value(kind) for _ in texts]
    return pa.array(values, kind)


def a_file(path: Path, rng: random.Random) -> list[Any] | None:
    """Write a random file. Returns the texts of its only column `text`, or None if there is none."""
    texts = [rng.choice(TEXTS) for _ in range(rng.choice([0, 1, 5, 200]))]
    names = rng.choice([["text"], ["text", "other"], ["other", "text"], ["Text"], ["text", "text"], ["a.text"]])
    kinds = [rng.choice(TEXT) if rng.random() < 0.5 else a_type(rng) for _ in names]
    columns = [a_column(kind, texts, rng) for kind in kinds]
    schema = pa.schema([pa.field(name, kind) for name, kind in zip(names, kinds, strict=True)])
    table = pa.Table.from_arrays(columns, schema=schema)
    if rng.random() < 0.2:
        table = table.replace_schema_metadata({b"pandas": b"{", b"text": b"\xff"})
    pq.write_table(
        table,
        path,
        compression=rng.choice(["none", "snappy", "gzip", "zstd"]),
        use_dictionary=rng.random() < 0.5,
        row_group_size=rng.choice([1, 3, 1000]),
        data_page_version=rng.choice(["1.0", "2.0"]),
        store_schema=rng.random() < 0.7,
        write_page_checksum=rng.random() < 0.5,
    )
    if names.count("text") != 1:
        return None
    column = columns[names.index("text")]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return column.to_pylist() if kind in TEXT else None


def fuzz(seed: int, files: int, path: Path) -> Counter[str]:
    rng, ends_in = random.Random(seed), Counter[str]()
    while ends_in.total() < files:
        try:
            texts = a_file(path, rng)
        except (pa.ArrowException, NotImplementedError):
            continue  # no Parquet form of this type
        try:
            found = [document.text.decode() for document in parquet_documents(path, "x", "text")]
        except DataError as error:
            assert texts is None, f"seed {seed}, file {ends_in.total()}: text is refused: {error}"
            assert str(error).startswith(str(path)) and "cannot be read as Parquet" not in str(error), error
            ends_in["error"] += 1
            continue
        assert texts is not None, f"seed {seed}, file {ends_in.total()}: what is no text was read as {found[:3]}"
        assert found == [text if text and text.strip() else "" for text in texts]
        ends_in["documents"] += 1
    return ends_in


def test_a_schema_gives_all_texts_or_an_error(tmp_path: Path) -> None:
    ends_in = fuzz(0, FILES, tmp_path / "a.parquet")
    assert min(ends_in["error"], ends_in["documents"]) > FILES // 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_schemas_give_all_texts_or_an_error(seed: int, tmp_path: Path) -> None:
    fuzz(seed, 5000, tmp_path / "a.parquet")
