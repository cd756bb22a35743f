"""One text as a corpus: documents cut from it, and validation on its end or on files of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from small_corpora import make_texts, write_jsonl

from headway.data.build import build
from headway.data.config import DataError
from headway.data.corpus.config import BytePieces, CorpusConfig
from headway.data.corpus.cut import cut
from headway.data.manifest import Manifest, read_manifest
from headway.data.mds import MdsSplit
from headway.data.tokenizer import open_file

TEXT = "one\r\ntwo  \n\n \t\nthree\rfour\n\n\n\nfünf\n"
LINES = ["one", "two  ", "three", "four", "fünf"]
PARAGRAPHS = ["one\ntwo  ", "three\nfour", "fünf"]


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[begin : begin + size] for begin in range(0, len(data), size)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("size", [4, 5, 7, 1000])
def test_lines_and_paragraphs_do_not_depend_on_how_the_text_is_read(encoding: str, size: int) -> None:
    given = pieces(TEXT.encode(encoding), size)
    for how, wanted in (("line", LINES), ("blank_line", PARAGRAPHS)):
        found = list(cut(given, how, "a.txt", "/x/a.txt"))
        assert [document.text.decode() for document in found] == wanted
    assert [document.id for document in found] == ["a.txt:1", "a.txt:5", "a.txt:10"]
    assert found[1].origin == "/x/a.txt:5"


@pytest.mark.parametrize("size", [16, 17, 64, 999])
def test_pieces_of_a_size_give_the_text_and_cut_no_character(size: int) -> None:
    rng = random.Random(size)
    text = "".join(rng.choice("aä€𝄞\n ") for _ in range(2000))
    found = list(cut(pieces(text.encode(), 33), BytePieces(bytes=size), "a", "a"))
    assert b"".join(document.text for document in found).decode() == text
    assert all(size - 3 <= len(document.text) <= size for document in found[:-1])
    assert all(document.text.decode() for document in found)


def test_a_damaged_text_in_utf_16_is_one_unusable_document() -> None:
    data = TEXT.encode("utf-16") + b"\x00\xd8"
    assert [document.problem for document in cut(pieces(data, 64), "line", "a", "a")][-1] == "not_utf8"


def config(paths: Path | list[Path], *, document: Any = "file", type: str = "text", **changes: Any) -> CorpusConfig:
    given = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    corpus: dict[str, Any] = {"type": type, "paths": given} | ({"document": document} if type == "text" else {})
    settings: dict[str, Any] = {"name": "own", "corpus": corpus, "shard_bytes": 4096}
    return CorpusConfig.model_validate(settings | {"tokenizer": {"type": "train_bpe", "vocab_size": 300}} | changes)


def texts_of(folder: Path, split: Any) -> list[str]:
    tokenizer = open_file(folder / "tokenizer.json")
    eos = read_manifest(folder).eos_id
    opened = MdsSplit(folder, split)
    return [
        tokenizer.decode([id for id in opened.tokens(n) if id != eos], skip_special_tokens=False)
        for n in range(read_manifest(folder).counts(split).documents)
    ]


def made(cfg: CorpusConfig, tmp_path: Path) -> tuple[Manifest, list[str], list[str]]:
    out = tmp_path / "out"
    manifest = build(cfg, out=out)
    return manifest, texts_of(out, "train"), texts_of(out, "validation")


@pytest.mark.parametrize("given", ["last 10%", "last 10 %", {"last": 0.1}, {"last": "10%"}])
def test_the_end_of_one_text_is_the_validation(given: Any, tmp_path: Path) -> None:
    text = "".join(f"Line {n} of a book with many lines.\n" for n in range(500))
    (tmp_path / "book.txt").write_text(text)
    manifest, train, validation = made(config(tmp_path / "book.txt", validation=given), tmp_path)
    assert train[0] + validation[0] == text and len(train) == len(validation) == 1
    assert train[0].endswith("\n")
    assert abs(len(validation[0]) / len(text) - 0.1) < 0.011
    assert manifest.settings["validation"] == {"last": 0.1} and "validation_fraction" not in manifest.settings


def test_the_end_of_many_documents_keeps_them_whole_where_that_changes_little(tmp_path: Path) -> None:
    texts = make_texts(300)
    (tmp_path / "lines.txt").write_text("".join(texts))
    cfg = config(tmp_path / "lines.txt", document="line", validation={"last": 0.2})
    _, train, validation = made(cfg, tmp_path)
    wanted = [text.rstrip("\n") for text in texts]
    assert sorted(train) == sorted(wanted[: len(train)])
    assert sorted(validation) == sorted(wanted[len(train) :])
    assert abs(sum(map(len, validation)) / sum(map(len, wanted)) - 0.2) < 0.02


def test_a_text_without_line_ends_is_cut_at_a_character(tmp_path: Path) -> None:
    text = "".join(random.Random(1).choices("ä€b ", k=5000))
    (tmp_path / "a.txt").write_text(text)
    _, train, validation = made(config(tmp_path / "a.txt", validation={"last": 0.3}), tmp_path)
    assert train[0] + validation[0] == text


@pytest.mark.parametrize("type", ["text", "jsonl"])
def test_own_validation_files_and_their_duplicates_in_training(type: str, tmp_path: Path) -> None:
    texts = make_texts(40)
    if type == "jsonl":
        train_file = write_jsonl(tmp_path / "train.jsonl", texts[:35])
        own = write_jsonl(tmp_path / "test.jsonl", texts[30:])
    else:
        for n, text in enumerate(texts):
            (tmp_path / f"{'test' if n >= 30 else 'train'}-{n}.txt").write_text(text)
        for n in range(30, 35):
            (tmp_path / f"train-{n}.txt").write_text(texts[n])
        train_file, own = tmp_path / "train-*.txt", tmp_path / "test-*.txt"
    cfg = config(train_file, type=type, validation={"paths": [str(own)]})
    manifest, train, validation = made(cfg, tmp_path)
    assert (sorted(train), sorted(validation)) == (sorted(texts[:30]), sorted(texts[30:]))
    assert manifest.left_out.in_validation == 5 and manifest.left_out.duplicate == 0
    said: list[str] = []
    build(cfg, out=tmp_path / "again", say=said.append)
    assert any("5 also in the validation files (first: " in line for line in said)


def test_validation_files_in_the_folder_of_the_corpus_are_not_trained_on(tmp_path: Path) -> None:
    for n, text in enumerate(make_texts(12)):
        (tmp_path / "corpus" / f"{n}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{n}.txt").write_text(text)
    own = [str(tmp_path / "corpus" / "3.txt")]
    manifest, train, validation = made(config(tmp_path / "corpus", validation={"paths": own}), tmp_path)
    assert (len(train), len(validation)) == (11, 1)
    assert manifest.corpus_files is not None and manifest.corpus_files.left_out == {"for validation": 1}
    with pytest.raises(DataError, match=r"validation\.paths: all files of the corpus are validation files"):
        build(config(tmp_path / "corpus", validation={"paths": [str(tmp_path / "corpus")]}), out=tmp_path / "none")


def test_a_changed_validation_file_is_noticed(tmp_path: Path) -> None:
    train, own = tmp_path / "a.txt", tmp_path / "b.txt"
    train.write_text("some text for training\n")
    own.write_text("some other text for validation\n")
    cfg, said = config(train, validation={"paths": [str(own)]}), list[str]()
    first = build(cfg, out=tmp_path / "out")
    assert build(cfg, out=tmp_path / "out", say=said.append) == first and "up to date" in said[-1]
    own.write_text("another text, longer than before, for validation\n")
    assert build(cfg, out=tmp_path / "out").fingerprint != first.fingerprint


def test_datasets_of_a_hash_split_are_as_before(tmp_path: Path) -> None:
    """Their settings have no new key, so an older dataset is not built again."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one text\n")
    (tmp_path / "texts" / "b.txt").write_text("another text\n")
    manifest, _, _ = made(config(tmp_path / "texts"), tmp_path)
    assert manifest.settings["corpus"] == {"type": "text", "paths": [str(tmp_path / "texts")]}
    assert "validation" not in manifest.settings and manifest.left_out.in_validation is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": {"last": 0.1}, "validation_fraction": 0.1}, "has no effect beside"),
        ({"validation": {"split": "test"}}, "corpus of type text has no such validation"),
        ({"validation": {"last": 1.5}}, "less than 1"),
        ({"validation": "last ten percent"}, "validation"),
        ({"document": {"bytes": 3}}, "greater than or equal to 16"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        config(tmp_path, **changes)


def test_one_text_as_one_document_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a single text\n")
    with pytest.raises(DataError, match=r"document: blank_line.*validation: last 10%"):
        build(config(tmp_path / "a.txt"), out=tmp_path / "out")
