"""How far a build and a check are: every piece of work counts up to what it announced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from headway.data import build as build_module
from headway.data.build import build
from headway.data.manifest import read_manifest
from headway.data.verify import verify


@dataclass
class Work:
    what: str
    total: int | None
    unit: str
    done: int = 0

    def update(self, n: int = 1) -> None:
        self.done += n


class Recorded(list[Work]):
    """A `Progress` that keeps what it was told."""

    @contextlib.contextmanager
    def __call__(self, what: str, total: int | None = None, unit: str = "") -> Iterator[Work]:
        self.append(Work(what, total, unit))
        yield self[-1]


def test_a_build_counts_documents_then_characters_then_the_bytes_of_each_split(config, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "_BATCH_BYTES", 4096)  # several batches
    seen, said = Recorded(), []
    made = build(config, out=tmp_path / "out", progress=seen, say=said.append)
    read, train, *encode = seen
    assert (read.what, read.unit, read.done) == ("read documents", "documents", len(texts))
    assert (train.what, train.done) == ("train tokenizer", made.train.text_bytes)  # ASCII: a byte a character
    assert [work.what for work in encode] == ["encode train", "encode validation"]
    assert [(work.total, work.done) for work in encode] == [
        (split.text_bytes, split.text_bytes) for split in (made.train, made.validation)
    ]
    taken, written = said
    assert taken == f"corpus: 1 file, {len(texts)} documents, left out: none"
    assert written.startswith(f"{tmp_path / 'out'}: {made.train.tokens:,} training")


def test_a_check_counts_the_bytes_of_every_file(source, dataset):
    seen = Recorded()
    verify(source, progress=seen)
    size = sum(entry.bytes for entry in read_manifest(dataset).files.values())
    assert [(work.what, work.total, work.done, work.unit) for work in seen] == [("verify dataset", size, size, "B")]


def test_without_progress_nothing_is_written(config, tmp_path, capfd):
    build(config, out=tmp_path / "out", progress=False, say=lambda text: None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("say", [None, "kept"])
def test_an_up_to_date_dataset_is_said_to_whoever_listens(config, tmp_path, capfd, say):
    build(config, out=tmp_path / "out", progress=False)
    capfd.readouterr()
    kept: list[str] = []
    build(config, out=tmp_path / "out", progress=False, **({} if say is None else {"say": kept.append}))
    assert ("nothing to do" in capfd.readouterr().err) == (say is None)
    assert len(kept) == (0 if say is None else 1)
