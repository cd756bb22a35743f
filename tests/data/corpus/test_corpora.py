"""Every corpus type gives the same documents, and errors name the file and line."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import zstandard

from headway.data.config import DataError
from headway.data.corpus.config import (
    CorpusConfig,
    HuggingFaceCorpus,
    JsonlCorpus,
    ParquetCorpus,
    StdlibCorpus,
    TextCorpus,
)
from headway.data.corpus.read import corpus_files, documents, source_fingerprint

TEXTS = ["first\ndocument", "zweites: äöü", "third " * 50_000]


def jsonl_bytes(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def jsonl(path: Path) -> JsonlCorpus:
    return JsonlCorpus(type="jsonl", paths=[str(path)])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: zstandard.ZstdCompressor().compress(data)),
    ],
)
def test_jsonl_reads_the_same_documents_however_it_is_compressed(tmp_path: Path, suffix: str, compress: Any) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(jsonl_bytes(TEXTS)))
    found = list(documents(jsonl(path)))
    assert [document.text.decode() for document in found] == TEXTS
    assert [document.id for document in found] == [f"{path.name}:{line}" for line in (1, 2, 3)]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", lambda data: zstandard.ZstdCompressor().compress(data))],
)
def test_a_compressed_file_cut_short_is_an_error_that_names_it(tmp_path: Path, suffix: str, compress: Any) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = compress(jsonl_bytes([f"{n} {n * n}" for n in range(5000)]))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}"):
        list(documents(jsonl(path)))


def test_several_zstd_frames_in_one_file_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    frames = [zstandard.ZstdCompressor().compress(jsonl_bytes([text])) for text in TEXTS]
    path.write_bytes(b"".join(frames))
    assert [document.text.decode() for document in documents(jsonl(path))] == TEXTS


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": ', "not JSON"),
        (b'["text"]', "list instead of a JSON object"),
        (b'{"body": "x"}', "no field 'text'; set corpus.field to one of its fields: 'body'"),
        (b'{"text": 7}', "holds int, not text"),
        (b'{"text": "one", "text": "two"}', "the object has the field 'text' twice"),
        (b'{"text": "one", "meta": [{"text": 3}], "text" : null}', "the object has the field 'text' twice"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_jsonl_line_is_an_error_with_file_and_line(tmp_path: Path, line: bytes, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl:3: ") as caught:
        list(documents(jsonl(path)))
    assert says in str(caught.value)


def test_a_field_of_an_inner_object_is_another_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        {"text": "one", "meta": {"text": "two"}},
        {"text": 'a "text" in "text"'},
        {"meta": ["text"], "text": "three"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [document.text.decode() for document in documents(jsonl(path))] == [line["text"] for line in lines]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "\xff"}', "not_utf8"),
        (b'{"text": "\\ud800"}', "not_utf8"),
        (b'{"text": " \\n"}', "empty"),
        (b'{"text": null}', "empty"),
    ],
)
def test_an_unusable_jsonl_document_is_marked(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n" + b'{"text": "good"}')
    assert [document.problem for document in documents(jsonl(path))] == [problem, None]


def test_text_files_come_sorted_from_files_folders_and_patterns_each_once(tmp_path: Path) -> None:
    folder = tmp_path / "ab"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "abc").mkdir()
    for name in ("ab/b.txt", "ab/a.txt", "ab/sub/c.txt", "ab/.hidden", "abc/d.txt"):
        (tmp_path / name).write_text(name)

    def ids(*paths: str) -> list[str]:
        return [id for id, _ in corpus_files(TextCorpus(type="text", paths=[str(tmp_path / path) for path in paths]))]

    assert ids("ab") == ["a.txt", "b.txt", "sub/c.txt"]
    assert ids("ab/b.txt", "ab") == ["b.txt", "a.txt", "sub/c.txt"]
    assert ids("ab*/*.txt") == ["ab/a.txt", "ab/b.txt", "abc/d.txt"]
    assert ids("ab/**/*.txt") == ["a.txt", "b.txt", "sub/c.txt"]


def test_a_path_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    for path in ("missing.txt", "no/*.txt"):
        with pytest.raises(DataError, match="matches no file"):
            list(documents(TextCorpus(type="text", paths=[str(tmp_path / path)])))


def test_the_standard_library_comes_without_tests_and_with_plain_newlines() -> None:
    found = {document.id: document for document in documents(StdlibCorpus(type="stdlib"))}
    assert len(found) > 300 and "argparse.py" in found and "json/decoder.py" in found
    assert list(found) == sorted(found)
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(id.split("/")) for id in found)
    assert not any(b"\r" in document.text for document in found.values())


def test_the_source_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    cfg = CorpusConfig.model_validate(
        {
            "name": "x",
            "corpus": {"type": "text", "paths": [str(tmp_path)]},
            "tokenizer": {"type": "train_bpe", "vocab_size": 300},
        }
    )
    before = source_fingerprint(cfg)
    assert source_fingerprint(cfg) == before
    path.write_text("three")
    assert source_fingerprint(cfg) != before


def test_parquet_gives_one_document_a_row_and_names_a_missing_column(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [*TEXTS, None], "number": [1, 2, 3, 4]}), path)
    found = list(documents(ParquetCorpus(type="parquet", paths=[str(path)])))
    assert [document.text.decode() for document in found[:3]] == TEXTS
    assert found[3].problem == "empty"
    with pytest.raises(DataError, match=r"no column 'body'.*text, number"):
        list(documents(ParquetCorpus(type="parquet", paths=[str(path)], field="body")))
    with pytest.raises(DataError, match="holds int64"):
        list(documents(ParquetCorpus(type="parquet", paths=[str(path)], field="number")))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        list(documents(ParquetCorpus(type="parquet", paths=[str(path)])))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        list(documents(ParquetCorpus(type="parquet", paths=[str(tmp_path)])))


def parquet(path: Path, **changes: Any) -> list[str]:
    return [d.text.decode() for d in documents(ParquetCorpus(type="parquet", paths=[str(path)], **changes))]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "dictionary of large_string"])
def test_every_kind_of_text_column_is_read(tmp_path: Path, kind: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = [*TEXTS, TEXTS[1], None]
    column = pa.array(values, pa.large_string() if "large" in kind else pa.string())
    column = column.dictionary_encode() if "dictionary" in kind else column.cast(getattr(pa, kind)())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3, 4, 5], "text": column}), path, row_group_size=2)
    assert str(pq.read_schema(path).field("text").type).startswith(kind.split()[0])
    assert parquet(path) == [*TEXTS, TEXTS[1], ""]
    assert parquet(path) == [*TEXTS, TEXTS[1], ""]


def test_two_parquet_columns_of_one_name_are_one_message(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["text", "text", "body"]), path)
    with pytest.raises(DataError, match=r"a\.parquet: 2 columns are named 'text'; rename"):
        parquet(path)
    assert parquet(path, field="body") == ["c"]


def test_odd_parquet_columns_are_one_message_or_read(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    nested = pa.array([{"b": "inner"}])
    pq.write_table(
        pa.table({"a.b": ["dotted"], "a": nested, "list": [["x"]], "none": pa.nulls(1), "raw": [b"x"]}), path
    )
    assert parquet(path, field="a.b") == ["dotted"]
    for field in ("a", "list", "none", "raw"):
        with pytest.raises(DataError, match=r"a\.parquet: "):
            parquet(path, field=field)
    with pytest.raises(DataError, match=r"'raw' holds binary, not text; set corpus.field to a text column \(a\.b"):
        parquet(path, field="raw")
    pq.write_table(pa.table({"my.text": ["dotted"]}), path)
    assert parquet(path, field="my.text") == ["dotted"]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert parquet(path) == []
    path.write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        parquet(path)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_parquet_file_gives_documents_or_one_message(tmp_path: Path, seed: int) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, rng = tmp_path / "a.parquet", random.Random(seed)
    column = pa.array([f"row {n % 7}" for n in range(300)])
    column = column.dictionary_encode() if seed % 2 else column
    options = {"write_page_checksum": True} if seed > 1 else {}
    pq.write_table(pa.table({"text": column}), path, row_group_size=100, compression="zstd", **options)
    good, ends = path.read_bytes(), {"documents": 0, "message": 0}
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            parquet(path)
            ends["documents"] += 1
        except DataError as error:
            assert str(error).startswith(str(path))
            ends["message"] += 1
    assert min(ends.values()) > 0


def test_page_checksums_are_verified(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a unique row", "another row"]})
    pq.write_table(
        table, path, write_page_checksum=True, write_statistics=False, use_dictionary=False, compression="none"
    )
    path.write_bytes(path.read_bytes().replace(b"a unique row", b"a unIque row"))
    with pytest.raises(DataError, match="CRC"):
        parquet(path)


def text_documents(folder: Path) -> dict[str, Any]:
    return {d.id: d.problem or d.text.decode() for d in documents(TextCorpus(type="text", paths=[str(folder)]))}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_text_with_a_byte_order_mark_is_read_without_it(tmp_path: Path, encoding: str) -> None:
    text = "Grüße\n漢字 🙂\n"
    mark = "\ufeff" if encoding.endswith("-be") else ""
    (tmp_path / "a.txt").write_bytes((mark + text).encode(encoding))
    assert text_documents(tmp_path) == {"a.txt": text}


def test_text_with_other_line_ends_is_the_same_document(tmp_path: Path) -> None:
    for name, text in {"unix": "one\n\ntwo\n", "windows": "one\r\n\r\ntwo\r\n", "mac": "one\r\rtwo\r"}.items():
        (tmp_path / name).write_bytes(text.encode())
    assert set(text_documents(tmp_path).values()) == {"one\n\ntwo\n"}


def test_text_full_of_nul_bytes_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "a.utf16").write_bytes("plain words".encode("utf-16-le"))
    (tmp_path / "b.lost").write_bytes(bytes(4096))
    (tmp_path / "e.short").write_bytes(b"\0a")
    (tmp_path / "c.odd16").write_bytes(b"\xff\xfea")
    (tmp_path / "d.log").write_bytes(b"a line with one NUL \0 in it\n" * 2 + b"x" * 200)
    found = text_documents(tmp_path)
    assert [found["a.utf16"], found["b.lost"], found["c.odd16"]] == ["binary", "binary", "not_utf8"]
    assert "\0" in found["d.log"] and found["e.short"] == "\0a"


HUB = HuggingFaceCorpus(type="huggingface", dataset="someone/something")


def hub(monkeypatch: pytest.MonkeyPatch, *, offline: bool = False, **load: Any) -> list[dict[str, Any]]:
    """A stand-in for `datasets`, with what the loading code asks of it."""
    calls: list[dict[str, Any]] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append({"args": args, **kwargs})
        if "error" in load:
            raise load["error"]
        return iter(load["rows"])

    module = ModuleType("datasets")
    module.__dict__.update(load_dataset=load_dataset, config=SimpleNamespace(HF_DATASETS_OFFLINE=offline))
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_rows_are_documents_and_no_code_of_the_dataset_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, rows=[{"text": text} for text in TEXTS])
    assert [document.text.decode() for document in documents(HUB)] == TEXTS
    assert calls[0]["streaming"] is True and "trust_remote_code" not in calls[0]


def test_the_hub_offline_is_read_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, offline=True, rows=[{"text": "x"}])
    list(documents(HUB))
    assert calls[0]["streaming"] is False


def test_without_the_datasets_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'headway\[hf\]'"):
        list(documents(HUB))


def test_without_a_network_the_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, error=ConnectionError("name resolution failed"))
    with pytest.raises(DataError, match=r"the hub is not reachable.*jsonl.*HF_DATASETS_OFFLINE=1"):
        list(documents(HUB))


def test_a_dataset_that_does_not_exist_is_not_called_a_network_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class DatasetNotFoundError(ConnectionError):
        pass

    hub(monkeypatch, error=DatasetNotFoundError("no such dataset"))
    with pytest.raises(DataError, match="check dataset, subset, split") as caught:
        list(documents(HUB))
    assert "not reachable" not in str(caught.value)


def test_a_hub_row_without_the_field_names_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, rows=[{"content": "x"}])
    with pytest.raises(DataError, match=r"row 0: no field 'text'; set corpus.field to one of its fields: 'content'"):
        list(documents(HUB))


def test_a_document_too_long_to_encode_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headway.data.corpus.document.MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 101)
    with pytest.raises(DataError, match=r"a\.txt: a document of 101 bytes; the limit is 100\. Split it"):
        list(documents(TextCorpus(type="text", paths=[str(tmp_path)])))
