"""Verification of a dataset: every kind of damage gives one message that names the file, before a run starts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headway.data import manifest as manifest_module
from headway.data.config import DataError, MdsSource
from headway.data.manifest import (
    canonical_json,
    hash_file,
    read_manifest,
    settled_state,
    state_of,
    write_manifest,
)
from headway.data.mds import MdsSplit
from headway.data.verify import verify, verify_contents

SHARD = "train/shard.00001.mds"


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def check(root: Path, **kwargs: Any) -> Any:
    return verify(MdsSource(type="mds", path=str(root)), **kwargs)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def flip_in_place(path: Path) -> None:
    """As `flip_a_bit`, with size and modification time as they were."""
    before = path.stat()
    flip_a_bit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def reseal(root: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Make the manifest agree with the files again, as somebody who forges a dataset would."""
    content = json.loads((root / "MANIFEST.json").read_text())
    content["files"] = {
        name: hash_file(root / name).model_dump() for name in content["files"] if (root / name).exists()
    }
    change(content)
    keys = ("schema_version", "train", "validation", "tokenizer_sha256", "vocab_size", "eos_id", "dtype", "files")
    content["fingerprint"] = hashlib.sha256(canonical_json({key: content[key] for key in keys})).hexdigest()
    (root / "MANIFEST.json").write_text(json.dumps(content))


def test_a_valid_dataset_returns_its_properties(dataset: Path) -> None:
    info, manifest = check(dataset, seq_len=32), read_manifest(dataset)
    assert info.fingerprint == manifest.fingerprint
    assert (info.train_tokens, info.validation_tokens) == (manifest.train.tokens, manifest.validation.tokens)
    assert (info.vocab_size, info.eos_id, info.path) == (300, 0, dataset)
    assert info.manifest == json.loads((dataset / "MANIFEST.json").read_text())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "missing"),
        (lambda path: os.truncate(path, path.stat().st_size - 7), "truncated or replaced"),
        (flip_a_bit, "content changed since the dataset was built"),
    ],
    ids=["missing", "truncated", "flipped bit"],
)
@pytest.mark.parametrize("name", [SHARD, "validation/shard.00000.mds", "train/index.json", "train/lengths.npy"])
def test_a_damaged_file_is_named_with_what_to_do(
    name: str, damage: Callable[[Path], None], says: str, copy: Path
) -> None:
    check(copy)
    damage(copy / name)
    with pytest.raises(DataError, match="headway data build") as caught:
        check(copy)
    assert str(copy / name) in str(caught.value) and says in str(caught.value)
    assert caught.value.exit_code == 65


def test_a_flipped_bit_is_seen_although_size_and_time_stay(copy: Path) -> None:
    check(copy)
    before = (copy / SHARD).stat()
    flip_a_bit(copy / SHARD)
    os.utime(copy / SHARD, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match="content changed"):
        check(copy)


def test_files_are_hashed_once_while_they_stay_as_they_are(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / ".verified.json").unlink(missing_ok=True)
    hashed: list[str] = []

    def count(path: Path) -> Any:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(manifest_module, "hash_file", count)
    check(copy)
    assert len(hashed) == len(read_manifest(copy).files)
    hashed.clear()
    check(copy)
    assert hashed == []
    os.utime(copy / SHARD)
    check(copy)
    assert hashed == ["shard.00001.mds"]


def test_files_that_stayed_as_they_are_are_not_even_opened(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(copy)
    opened: list[str] = []
    whole = Path.open

    def watched(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(path.name)
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", watched)
    check(copy)
    assert opened and not [name for name in opened if name.endswith(".mds")]
    flip_in_place(copy / SHARD)
    with pytest.raises(DataError, match="content changed"):
        check(copy)
    assert "shard.00001.mds" in opened


@pytest.mark.parametrize("name", ["train", SHARD])
def test_a_verified_file_that_is_moved_away_and_linked_is_refused(name: str, copy: Path, tmp_path: Path) -> None:
    check(copy)
    (copy / name).rename(tmp_path / "outside")  # the files in a moved folder keep their inodes and times
    (copy / name).symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="a link to a file outside"):
        check(copy)


def test_a_damaged_hash_cache_is_ignored(copy: Path) -> None:
    for content in ("", "[]", '{"train/index.json": 7}', "[" * 100_000):
        (copy / ".verified.json").write_text(content)
        check(copy)


def test_another_tokenizer_is_refused_even_where_the_manifest_lists_it(copy: Path) -> None:
    path = copy / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        check(copy)
    reseal(copy)
    with pytest.raises(DataError, match="not the tokenizer of the shards"):
        check(copy)


def test_a_vocabulary_of_another_size_is_refused(copy: Path) -> None:
    reseal(copy, lambda content: content.update(vocab_size=301))
    with pytest.raises(DataError, match="300 tokens, but the shards have 301"):
        check(copy)


def test_a_sequence_longer_than_a_split_names_both_numbers(dataset: Path) -> None:
    tokens = read_manifest(dataset).validation.tokens
    check(dataset, seq_len=tokens - 1)
    with pytest.raises(DataError, match=rf"seq_len: {tokens:,} .*validation split.*has {tokens:,} tokens"):
        check(dataset, seq_len=tokens)


def test_no_dataset_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset here.*headway data build SPEC"):
        check(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"files": {"../outside": {"bytes": 1, "xxh3_64": "0" * 16}}},
        {"files": {"/etc/passwd": {"bytes": 1, "xxh3_64": "0" * 16}}},
        {"files": {"train/../../x": {"bytes": 1, "xxh3_64": "0" * 16}}},
        {"files": {"train/x\0y": {"bytes": 1, "xxh3_64": "0" * 16}}},
        {"files": {"train/" + "x" * 300: {"bytes": 1, "xxh3_64": "0" * 16}}},
        {"train": {"documents": -1, "tokens": 1, "text_bytes": 1}},
        {"vocab_size": "300"},
        {"unknown": 1},
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(change: dict[str, Any], copy: Path) -> None:
    path = copy / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="not a manifest of this version"):
        check(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_a_manifest_that_is_not_json_is_refused(text: str, copy: Path) -> None:
    (copy / "MANIFEST.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"MANIFEST\.json"):
        check(copy)


def test_an_edited_manifest_does_not_match_its_fingerprint(copy: Path) -> None:
    manifest = read_manifest(copy)
    counts = manifest.train.model_copy(update={"tokens": manifest.train.tokens - 1})
    write_manifest(copy, manifest.model_copy(update={"train": counts}))
    with pytest.raises(DataError, match="does not match its own fingerprint"):
        check(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 10**13},
        {"samples": -1},
        {"samples": 1.5},
        {"format": "json"},
        {"column_encodings": ["str", "pkl"]},
        {"column_encodings": ["str", "ndarray:uint32"]},
        {"raw_data": {"basename": "../x", "bytes": 10, "hashes": {"xxh64": ""}}},
        {"raw_data": {"basename": "/etc/passwd", "bytes": 10, "hashes": {"xxh64": ""}}},
        {"raw_data": {"basename": "another.mds", "bytes": 5000, "hashes": {"xxh64": ""}}},
        {"raw_data": None},
    ],
)
def test_a_forged_index_is_refused(change: dict[str, Any], copy: Path) -> None:
    path = copy / "train" / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0] |= change
    path.write_text(json.dumps(index))
    reseal(copy)
    with pytest.raises(DataError, match=r"train/index\.json"):
        check(copy)


def test_an_index_without_one_shard_is_refused(copy: Path) -> None:
    path = copy / "train" / "index.json"
    index = json.loads(path.read_text())
    del index["shards"][1]
    path.write_text(json.dumps(index))
    reseal(copy)
    with pytest.raises(DataError, match="documents, but the manifest says"):
        check(copy)


def test_a_link_out_of_the_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / SHARD).rename(tmp_path / "elsewhere")
    (copy / SHARD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="a link to a file outside of the dataset's folder"):
        check(copy)


def test_a_pickle_in_place_of_the_lengths_is_not_opened(copy: Path) -> None:
    np.save(copy / "train" / "lengths.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    reseal(copy)
    with pytest.raises(DataError, match=r"lengths\.npy: missing or not an array"):
        check(copy)


def test_wrong_offsets_in_a_shard_are_an_error(copy: Path) -> None:
    # The hashes are the guard; this is what keeps a reader that skipped them from handing out other bytes.
    path = copy / SHARD
    data = bytearray(path.read_bytes())
    data[8:12] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    documents = MdsSplit(copy, "train")
    with pytest.raises(DataError, match=r"shard\.00001\.mds: shard is missing or damaged"):
        documents.tokens(int(documents.first_document[1]))


def test_a_file_given_as_a_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text("name: x\n")
    with pytest.raises(DataError, match=r"corpus\.yaml: no dataset here.*headway data build SPEC"):
        verify(MdsSource(type="mds", path=str(tmp_path / "corpus.yaml")))


def test_a_changed_file_is_detected_with_any_clock(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # F12, F21
    for clock in (time.time() - 86_400, time.time() + 86_400, 0.0):
        check(copy)
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        for moment in (0, clock, 2**33):
            flip_in_place(copy / SHARD)
            os.utime(copy / SHARD, (moment, moment))
            with pytest.raises(DataError, match="content changed"):
                check(copy)
            flip_in_place(copy / SHARD)
            check(copy)


def test_a_write_within_one_tick_of_the_file_timestamps_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:
        for _ in range(20):
            os.pwrite(file.fileno(), b"a", 0)
            state = settled_state(file.fileno())
            os.pwrite(file.fileno(), b"b", 0)
            assert state_of(os.fstat(file.fileno())) != state
        # Kernels from 6.13 on pass without the wait, so it is looked for as well.
        slept: list[float] = []
        monkeypatch.setattr(time, "sleep", slept.append)
        settled_state(file.fileno())
        assert len(slept) == 1 and slept[0] >= 0.01
        later = time.time() + 1
        monkeypatch.setattr(time, "time", lambda: later)
        settled_state(file.fileno())
        assert len(slept) == 1


# ---------------------------------------------------------------- what the fingerprint leaves out


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {}},
        {"name": "other"},
        {"unigram_entropy_nats": 0.001},
        {"unigram_entropy_nats": 3.0},
        {"validation_bytes_per_token": 400.0},
        {"validation_bytes_per_token": None},
        {"source_fingerprint": "0"},
    ],
    ids=str,
)
def test_changed_facts_are_refused_although_the_fingerprint_does_not_cover_them(
    change: dict[str, Any], copy: Path
) -> None:
    path = copy / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="settings or statistics were changed") as caught:
        check(copy)
    assert str(path) in str(caught.value)


def older(root: Path, **change: Any) -> None:
    """Change a manifest as an earlier version wrote it, without a hash of these facts."""
    path = root / "MANIFEST.json"
    content = json.loads(path.read_text()) | change
    del content["facts_sha256"]
    path.write_text(json.dumps(content))


def test_a_manifest_without_the_hash_of_its_facts_is_read_and_its_fingerprint_stays(copy: Path) -> None:
    before = read_manifest(copy)
    older(copy)
    verify_contents(MdsSource(type="mds", path=str(copy)))
    assert check(copy).fingerprint == before.fingerprint == read_manifest(copy).expected_fingerprint()


def test_facts_without_a_hash_must_be_possible(copy: Path) -> None:
    for change, says in (
        ({"unigram_entropy_nats": 0.001}, "unigram_entropy_nats is 0.001, which no text has"),
        ({"unigram_entropy_nats": 400.0}, "unigram_entropy_nats is 400, which no text has"),
        ({"validation_bytes_per_token": 400.0}, "validation_bytes_per_token is 400, but"),
    ):
        shutil.copy(copy / "MANIFEST.json", copy / "kept")
        older(copy, **change)
        with pytest.raises(DataError, match=says):
            check(copy)
        (copy / "kept").replace(copy / "MANIFEST.json")


def test_verification_computes_the_entropy_of_the_tokens(copy: Path) -> None:
    older(copy, unigram_entropy_nats=read_manifest(copy).unigram_entropy_nats + 0.01)
    check(copy)  # possible
    with pytest.raises(DataError, match=r"MANIFEST\.json: unigram_entropy_nats is .*but the tokens have"):
        verify_contents(MdsSource(type="mds", path=str(copy)))


@pytest.mark.parametrize("moved", [1, -1, 2, 3, 120, 250])
@pytest.mark.parametrize("apart", [1, 7])
def test_no_token_is_read_with_the_lengths_of_other_documents(copy: Path, moved: int, apart: int) -> None:
    path = copy / "train" / "lengths.npy"
    true = np.load(path)
    wrong = true.astype(np.int64)
    a = int(np.argmax(true[:-apart] > 260)) if moved > 0 else int(np.argmax(true[apart:] > 260))
    b = a + apart
    wrong[a] -= moved
    wrong[b] += moved
    np.save(path, wrong.astype(true.dtype))
    reseal(copy)
    check(copy)  # hashes and sums agree
    with pytest.raises(DataError, match=r"as lengths\.npy says|fit the lengths of its documents"):
        verify_contents(MdsSource(type="mds", path=str(copy)))
    documents = MdsSplit(copy, "train")
    for row in (a, b):
        with pytest.raises(DataError, match=r"as lengths\.npy says|fit the lengths of its documents"):
            documents.tokens(row)
