"""`headway data build`: contents of the dataset, up-to-date datasets, and failed builds that change nothing."""

from __future__ import annotations

import contextlib
import math
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from small_corpora import corpus_config, make_texts, write_jsonl

from headway.data import build as build_module
from headway.data.build import build
from headway.data.config import DataError, MdsSource
from headway.data.corpus.config import CorpusConfig
from headway.data.manifest import MANIFEST_NAME, SPLITS, read_manifest
from headway.data.mds import MdsSplit
from headway.data.streaming_import import import_streaming
from headway.data.tokenizer import load
from headway.data.verify import verify


def all_texts(root: Path) -> dict[str, list[str]]:
    tokenizer = load(root / "tokenizer.json")
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        documents = MdsSplit(root, split)
        ids = [documents.tokens(n).tolist() for n in range(len(documents))]
        assert all(tokens[-1] == tokenizer.eos_id for tokens in ids)
        found[split] = [tokenizer.decode(tokens[:-1]) for tokens in ids]
    return found


def test_every_document_is_in_one_split_whole(dataset: Path, texts: list[str]) -> None:
    found = all_texts(dataset)
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    assert found["train"] and found["validation"]


def test_mosaicml_streaming_reads_the_same_samples(dataset: Path) -> None:
    streaming = import_streaming()
    for split in SPLITS:
        theirs = streaming.LocalDataset(local=str(dataset), split=split)
        ours = MdsSplit(dataset, split)
        assert len(ours) == len(theirs) > 1
        assert len(ours.shards) > 1
        for number in range(len(ours)):
            sample = theirs[number]
            assert ours.id(number) == sample["id"]
            assert sample["tokens"].dtype == ours.tokens(number).dtype == np.uint16
            np.testing.assert_array_equal(ours.tokens(number), sample["tokens"])


def test_the_manifest_counts_what_is_there(dataset: Path, texts: list[str]) -> None:
    manifest = read_manifest(dataset)
    train, validation = (MdsSplit(dataset, split) for split in SPLITS)
    assert manifest.train.documents + manifest.validation.documents == len(texts)
    assert manifest.train.text_bytes + manifest.validation.text_bytes == sum(len(text.encode()) for text in texts)
    train_tokens = np.concatenate([train.tokens(n) for n in range(len(train))])
    validation_tokens = np.concatenate([validation.tokens(n) for n in range(len(validation))])
    assert (len(train_tokens), len(validation_tokens)) == (manifest.train.tokens, manifest.validation.tokens)
    # Cross entropy of the validation tokens under the train unigram, one observation added for each token.
    counts = np.bincount(train_tokens, minlength=manifest.vocab_size) + 1
    expected = np.mean([-math.log(counts[token] / counts.sum()) for token in validation_tokens])
    assert manifest.unigram_entropy_nats == pytest.approx(expected, rel=1e-12)
    assert manifest.validation_bytes_per_token == manifest.validation.text_bytes / len(validation_tokens)


def test_the_same_input_gives_the_same_fingerprint_wherever_it_lies(
    dataset: Path, texts: list[str], tmp_path: Path
) -> None:
    moved = write_jsonl(tmp_path / "tiny.jsonl", texts)
    again = build(corpus_config(moved), out=tmp_path / "again", progress=False)
    assert again.fingerprint == read_manifest(dataset).fingerprint


def test_other_text_or_another_vocabulary_gives_another_fingerprint(
    dataset: Path, texts: list[str], tmp_path: Path
) -> None:
    first = read_manifest(dataset).fingerprint
    path = write_jsonl(tmp_path / "tiny.jsonl", [*texts[:-1], "changed"])
    changed = build(corpus_config(path), out=tmp_path / "a", progress=False).fingerprint
    path = write_jsonl(tmp_path / "tiny.jsonl", texts)
    tokenizer = {"type": "train_bpe", "vocab_size": 290}
    smaller = build(corpus_config(path, tokenizer=tokenizer), out=tmp_path / "b", progress=False).fingerprint
    assert len({first, changed, smaller}) == 3


def test_the_split_of_a_document_does_not_depend_on_the_others(dataset: Path, texts: list[str], tmp_path: Path) -> None:
    half = write_jsonl(tmp_path / "tiny.jsonl", texts[::2])
    build(corpus_config(half), out=tmp_path / "half", progress=False)
    whole, part = all_texts(dataset), all_texts(tmp_path / "half")
    for split in SPLITS:
        assert set(part[split]) <= set(whole[split])


def test_running_again_does_nothing_and_says_so(
    config: CorpusConfig, dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(build_module, "scan", never)
    before = (dataset / MANIFEST_NAME).stat()
    manifest = build(config, out=dataset, progress=False)
    assert manifest == read_manifest(dataset)
    assert (dataset / MANIFEST_NAME).stat().st_ino == before.st_ino
    assert "up to date" in capsys.readouterr().err


def test_changed_settings_and_damaged_shards_trigger_a_rebuild(
    config: CorpusConfig, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tiny"
    shutil.copytree(dataset, out)
    first = read_manifest(out).fingerprint
    (out / "train" / "shard.00000.mds").unlink()
    assert build(config, out=out, progress=False).fingerprint == first
    verify(MdsSource(type="mds", path=str(out)))
    fewer = config.model_copy(update={"validation_fraction": 0.5})
    assert build(fewer, out=out, progress=False).fingerprint != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


@pytest.mark.parametrize("where", ["scan", "write_manifest"])
def test_an_interrupted_build_leaves_the_old_dataset_as_it_was(
    where: str, config: CorpusConfig, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tiny"
    shutil.copytree(dataset, out)
    before = read_manifest(out)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(config.model_copy(update={"validation_fraction": 0.5}), out=out, progress=False)
    assert verify(MdsSource(type="mds", path=str(out))).fingerprint == before.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_a_build_killed_between_its_renames_is_undone_by_the_next(
    config: CorpusConfig, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny"
    shutil.copytree(dataset, tmp_path / "tiny.replaced-123")
    (tmp_path / "tiny.building-123" / "train").mkdir(parents=True)
    (tmp_path / "tiny.building-123" / "text.spool").write_text("half")
    build(config, out=out, progress=False)
    assert "up to date" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_a_second_build_at_the_same_time_is_refused(config: CorpusConfig, tmp_path: Path) -> None:
    with FileLock(str(tmp_path / "tiny.lock")), pytest.raises(DataError, match="another process is building it"):
        build(config, out=tmp_path / "tiny", progress=False)


def test_a_folder_that_holds_something_else_is_never_replaced(
    config: CorpusConfig, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is not a dataset"):
        build(config, out=tmp_path / "notes", progress=False)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    shutil.copytree(dataset, tmp_path / "tiny")
    with pytest.raises(DataError, match="contains the dataset 'tiny', not 'other'"):
        build(config.model_copy(update={"name": "other"}), out=tmp_path / "tiny", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "tiny"]  # no lock of a refused build


def test_of_builds_that_start_at_once_one_builds(config: CorpusConfig, tmp_path: Path) -> None:
    path, inside, most, locked = tmp_path / "tiny", 0, 0, 0
    gate = threading.Barrier(8)

    def enter() -> None:
        nonlocal inside, most, locked
        for _ in range(50):
            gate.wait()
            with contextlib.suppress(DataError), build_module._alone(path):
                inside += 1
                most, locked = max(most, inside), locked + 1
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and locked >= 50 and not list(tmp_path.iterdir())


def test_a_full_disk_is_one_message(config: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "shard.00000.mds")

    monkeypatch.setattr(build_module, "scan", full)
    with pytest.raises(DataError, match=r"shard\.00000\.mds: No space left on device; nothing was changed"):
        build(config, out=tmp_path / "tiny", progress=False)


def test_unusable_documents_stop_the_build_or_are_counted(tmp_path: Path) -> None:
    texts = [*make_texts(12), "   ", "x", make_texts(1)[0]]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with path.open("ab") as stream:
        stream.write(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:13: document is empty; .*bad_documents: skip"):
        build(corpus_config(path), out=tmp_path / "out", progress=False)
    manifest = build(
        corpus_config(path, bad_documents="skip", min_document_bytes=4), out=tmp_path / "out", progress=False
    )
    assert manifest.left_out.model_dump(exclude_none=True) == {
        **{"empty": 1, "not_utf8": 1, "binary": 0, "too_short": 1, "duplicate": 1}
    }
    assert manifest.train.documents + manifest.validation.documents == 12


def test_a_text_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes("café".encode("latin-1"))
    cfg = corpus_config(tmp_path, corpus={"type": "text", "paths": [str(tmp_path)]})
    with pytest.raises(DataError, match=r"b\.txt: document is not UTF-8 text"):
        build(cfg, out=tmp_path / "out", progress=False)


def test_a_copy_saved_on_windows_is_a_duplicate_and_utf16_without_a_mark_has_advice(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    for number, text in enumerate(make_texts(5)):
        (folder / f"{number}.txt").write_text(text)
    (folder / "copy.txt").write_bytes(b"\xef\xbb\xbf" + make_texts(5)[2].replace("\n", "\r\n").encode())
    cfg = corpus_config(folder, corpus={"type": "text", "paths": [str(folder)]})
    manifest = build(cfg, out=tmp_path / "out", progress=False)
    assert manifest.left_out.duplicate == 1 and manifest.train.documents + manifest.validation.documents == 5
    (folder / "z.txt").write_bytes("UTF-16".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"z\.txt: document is full of NUL bytes.*UTF-16 without a byte order mark"):
        build(cfg, out=tmp_path / "out", progress=False)
    manifest = build(cfg.model_copy(update={"bad_documents": "skip"}), out=tmp_path / "out", progress=False)
    assert manifest.left_out.binary == 1


def test_one_document_cannot_be_divided(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["alone", "alone"])
    with pytest.raises(DataError, match=r"1 usable document \(1 duplicate\), but one is needed for training"):
        build(corpus_config(path), out=tmp_path / "out", progress=False)


def test_two_documents_always_fill_both_splits(tmp_path: Path) -> None:
    for number in range(6):
        path = write_jsonl(tmp_path / "a.jsonl", make_texts(2, seed=number))
        for fraction in (0.01, 0.99):
            cfg = corpus_config(path, validation_fraction=fraction)
            manifest = build(cfg, out=tmp_path / "out", progress=False)
            assert (manifest.train.documents, manifest.validation.documents) == (1, 1)


def test_a_compressed_dataset_reads_the_same(config: CorpusConfig, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "zstd"
    build(config.model_copy(update={"compression": "zstd"}), out=out, progress=False)
    verify(MdsSource(type="mds", path=str(out)))
    assert not list(out.rglob("*.mds"))
    assert all_texts(out) == all_texts(dataset)
    # An unpacked shard that was damaged is unpacked again.
    shard = out / "train" / "shard.00000.mds"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert all_texts(out) == all_texts(dataset)
