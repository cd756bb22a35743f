"""Which files a corpus consists of: nothing is left out without a word, and what looks like a mistake is refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_corpora import corpus_config, make_texts, write_jsonl

from headway.data.build import build
from headway.data.config import DataError
from headway.data.corpus.config import JsonlCorpus, ParquetCorpus, TextCorpus
from headway.data.corpus.folders import summary
from headway.data.corpus.read import corpus_files, documents, find_files
from headway.data.manifest import read_manifest

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"


def jsonl(*paths: Path | str) -> JsonlCorpus:
    return JsonlCorpus(type="jsonl", paths=[str(path) for path in paths])


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_endings_are_taken_in_any_case_and_the_others_are_named(tmp_path: Path) -> None:
    taken = ["a.jsonl", "b.JSONL", "c.ndjson", "d.jsonl.zstd", "e.Jsonl.GZ", "f.json.gz", "g.jsonl.bz2", "h/i.jsonl.xz"]
    left = ["j.json", "k.jsonl.lz4", "l.jsonl.bak", "README", "m.txt", "n.jsonl~"]
    touch(tmp_path, *taken, *left, ".hidden.txt")
    found = find_files(jsonl(tmp_path))
    assert sorted(found.taken.values()) == sorted(taken)
    assert sum(found.left_out.values()) == len(left)
    said = "\n".join(summary(found))
    assert "8 files taken, 6 left out:" in said and "WARNING" not in said and ".hidden" not in said
    assert all(str(tmp_path / name) in said for name in left)
    touch(tmp_path, *(f"{n}.json" for n in range(40)))
    said = "\n".join(summary(find_files(jsonl(tmp_path))))
    assert "WARNING: corpus.paths: most files are left out: 8 files taken, 46 not:" in said and ", ..." in said


def test_a_folder_without_any_file_of_the_type_names_what_is_in_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.json", "b.json")
    with pytest.raises(DataError, match=r"none of the 2 files .* has an ending of the corpus type 'jsonl' .*b\.json"):
        find_files(jsonl(tmp_path))
    assert len(corpus_files(jsonl(tmp_path / "*.json"))) == 2


def test_linked_folders_are_followed_once_also_in_patterns(tmp_path: Path) -> None:
    touch(tmp_path / "mounted", "b.jsonl", "deep/c.jsonl")
    touch(tmp_path / "data", "a.jsonl")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "mounted")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "mounted")
    (tmp_path / "mounted" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to(".")
    (tmp_path / "data" / "one.jsonl").symlink_to(tmp_path / "mounted" / "b.jsonl")
    wanted = ["a.jsonl", "again/b.jsonl", "again/deep/c.jsonl", "one.jsonl"]
    assert [id for id, _ in corpus_files(jsonl(tmp_path / "data"))] == wanted
    assert [id for id, _ in corpus_files(jsonl(f"{tmp_path}/data/**/*.jsonl"))] == wanted
    assert [id for id, _ in corpus_files(jsonl(f"{tmp_path}/data/**/deep/**/c.jsonl"))] == ["again/deep/c.jsonl"]
    assert [id for id, _ in corpus_files(jsonl(f"{tmp_path}/d*/linked/*.jsonl"))] == ["data/linked/b.jsonl"]


def test_folders_that_a_pattern_matches_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "sub/b.jsonl", "other/c.jsonl", ".hidden/d.jsonl")
    found = find_files(jsonl(tmp_path / "*"))
    assert list(found.taken.values()) == ["a.jsonl"]
    assert found.left_out == {"a folder, which a pattern enters only with **": 2}
    assert str(tmp_path / "sub") in "\n".join(summary(found))
    assert len(corpus_files(jsonl(tmp_path / "**" / "*"))) == 3


@pytest.mark.parametrize("name", ["b.jsonl", "part"])
def test_a_broken_link_is_an_error_unless_it_is_hidden(name: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl")
    (tmp_path / ".#a.jsonl").symlink_to("someone@host")
    assert len(corpus_files(jsonl(tmp_path))) == 1
    (tmp_path / name).symlink_to(tmp_path / "missing")
    for given in (tmp_path, tmp_path / "**" / "*", tmp_path / "*", tmp_path / name):
        with pytest.raises(DataError, match=rf"{name}: a link to .*missing, which does not exist"):
            find_files(TextCorpus(type="text", paths=[str(given)]))
    with pytest.raises(DataError, match="which does not exist"):
        find_files(jsonl(tmp_path))


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system call is replaced, because root may list every folder."""
    touch(tmp_path, "a.jsonl", "sub/b.jsonl")
    scandir = os.scandir

    def refuse(folder: Path) -> Any:
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="sub: cannot be listed"):
        find_files(jsonl(tmp_path))


def test_what_is_no_regular_file_is_left_out_with_a_word(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl")
    os.mkfifo(tmp_path / "b.jsonl")
    assert any("1 not a regular file" in line for line in summary(find_files(jsonl(tmp_path))))


@pytest.mark.parametrize("pointer", [LFS, b"/annex/objects/SHA256E-s12--ab.jsonl\n", b"# xet version 0\nfilesize 7\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.parquet.dir/b"])
@pytest.mark.parametrize("bad_documents", ["error", "skip"])
def test_pointers_of_git_lfs_are_never_documents(pointer: bytes, name: str, bad_documents: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pointer)
    corpora = [
        TextCorpus(type="text", paths=[str(path)]),
        jsonl(path),
        ParquetCorpus(type="parquet", paths=[str(path)]),
    ]
    for corpus in corpora:
        with pytest.raises(DataError, match="not the file itself") as caught:
            list(documents(corpus))
        assert str(path) in str(caught.value)
        if pointer == LFS:
            assert "git lfs pull" in str(caught.value)


def test_a_link_that_git_stored_as_text_is_no_document(tmp_path: Path) -> None:
    touch(tmp_path, "data/a.txt", "mounted/b.txt")
    corpus = TextCorpus(type="text", paths=[str(tmp_path / "data")])
    (tmp_path / "data" / "link.txt").write_text("../mounted")
    with pytest.raises(
        DataError, match=r"link\.txt: holds the path '\.\./mounted', which exists: git stores a link so"
    ):
        list(documents(corpus))
    for text in ("../missing", "../mounted\n", "See ../mounted"):
        (tmp_path / "data" / "link.txt").write_text(text)
        assert len(list(documents(corpus))) == 2


def test_a_text_about_git_lfs_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"A pointer:\n" + LFS)
    (tmp_path / "b.txt").write_bytes(LFS + b"explained\n" * 200)
    assert len(list(documents(TextCorpus(type="text", paths=[str(tmp_path)])))) == 2


def spec(folder: Path, **changes: Any) -> Any:
    return corpus_config(folder, corpus={"type": "jsonl", "paths": [str(folder)]}, **changes)


def test_the_console_and_the_manifest_say_what_was_read_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    path = write_jsonl(folder / "a.jsonl", [*make_texts(20), make_texts(1)[0], "  "])
    with path.open("ab") as stream:
        stream.write(b'{"text": "caf\xe9"}\n{"text": "caf\xe9"}\n')
    (folder / "b.json").write_text("[]")
    build(spec(folder, bad_documents="skip"), out=tmp_path / "out", progress=False)
    said = capsys.readouterr().err
    assert "1 file taken, 1 left out:" in said and str(folder / "b.json") in said
    assert (
        f"corpus: 1 file, 20 documents, left out: 1 duplicate (first: {path}:21), 1 empty (first: {path}:22), "
        f"2 not UTF-8 (first: {path}:23)"
    ) in said
    found = read_manifest(tmp_path / "out").corpus_files
    assert found is not None
    assert (found.taken, found.left_out) == (1, {"with the ending .json": 1})
    assert found.examples == [str(folder / "b.json")]


@pytest.mark.parametrize(
    "damaged",
    [
        gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9],  # cut short
        b"\x00\x01\x02\xff\xfe" * 99,
        "{'text': 'Python, not JSON: \xe9'}".encode("latin-1"),
        json.dumps({"text": "UTF-16"}).encode("utf-16"),
        json.dumps({"text": "UTF-16"}).encode("utf-16-le"),
    ],
    ids=["gzip cut short", "binary", "Latin-1", "UTF-16", "UTF-16 without BOM"],
)
def test_skip_is_for_single_documents_and_never_for_a_damaged_file(damaged: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", make_texts(20))
    (folder / "b.jsonl").write_bytes(damaged)
    with pytest.raises(DataError, match=r"b\.jsonl") as caught:
        build(spec(folder, bad_documents="skip"), out=tmp_path / "out", progress=False)
    assert "bad_documents" not in str(caught.value)
