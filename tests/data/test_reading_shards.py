"""Shards that are deleted, modified or unreadable during reading never give wrong tokens."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headway.data import shard
from headway.data.config import DataConfig, DataError, MdsSource
from headway.data.loader import Loader
from headway.data.mds import MdsSplit
from headway.data.verify import verify

SHARD = "train/shard.00001.mds"
EPOCH = 200  # steps, more than that


@pytest.fixture
def root(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def config(root: Path, retry_s: float = 0.2) -> DataConfig:
    source = MdsSource(type="mds", path=str(root))
    return DataConfig(source=source, seq_len=32, workers=0, shuffle_window=2, retry_s=retry_s)


def loader(cfg: DataConfig) -> Loader:
    return Loader(cfg, split="train", global_batch=8, micro_batch=8, dp_rank=0, dp_size=1)


def digests(cfg: DataConfig, steps: int) -> list[int]:
    reader = loader(cfg)
    return [next(reader).digest for _ in range(steps)]


def flip_a_bit(path: Path, at: float = 0.5) -> None:
    """In place, its size and modification time as they were."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path, left: int | None = None) -> None:
    os.truncate(path, path.stat().st_size - 7 if left is None else left)


def test_a_file_changed_between_the_check_and_the_first_read_is_not_trained_on(root: Path) -> None:  # F22
    verify(MdsSource(type="mds", path=str(root)))
    flip_a_bit(root / SHARD)
    with pytest.raises(DataError, match=rf"{SHARD}: shard is missing or damaged \(hash"):
        digests(config(root), steps=EPOCH)
    flip_a_bit(root / SHARD)
    flip_a_bit(root / "train/lengths.npy", at=0.9)
    with pytest.raises(DataError, match=r"lengths\.npy: content changed"):
        loader(config(root))


@pytest.mark.parametrize(
    "harm", [flip_a_bit, cut, lambda path: cut(path, 0)], ids=["flipped bit", "cut short", "empty"]
)
def test_a_shard_altered_under_an_open_reader_is_an_error_that_names_it(
    harm: Callable[[Path], None], root: Path
) -> None:  # F22; with a memory map it was SIGBUS
    split = MdsSplit(root, "train", retry_s=0.1)
    first = int(split.first_document[1])
    before = split.tokens(first)
    harm(root / SHARD)
    with pytest.raises(DataError, match=rf"{SHARD}: shard is missing or damaged .*data\.retry_s"):
        split.tokens(first)
    assert len(split.tokens(0)) == split.lengths[0]  # the others are as good as before
    assert len(before) == split.lengths[first]


def test_a_shard_that_is_open_may_be_deleted_or_touched(root: Path) -> None:  # F22
    split = MdsSplit(root, "train")
    before = split.tokens(int(split.first_document[1]))
    (root / SHARD).chmod(0o600)
    os.utime(root / SHARD)
    assert np.array_equal(split.tokens(int(split.first_document[1])), before)
    (root / SHARD).unlink()
    assert np.array_equal(split.tokens(int(split.first_document[1])), before)


@pytest.mark.parametrize("failures", [3, 10**9])
def test_reads_are_retried_when_the_disk_fails(
    failures: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # F22
    expected, left = digests(config(root), steps=3), [failures]

    def failing(*args: Any) -> int:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*args)

    read = os.preadv
    monkeypatch.setattr(shard.os, "preadv", failing)
    if failures == 3:
        assert digests(config(root, retry_s=2), steps=3) == expected
    else:
        with pytest.raises(DataError, match=r"shard\.\d+\.mds: .*\(Input/output error; tried for 0\.2 s"):
            digests(config(root), steps=3)


def test_a_shard_that_was_wrong_only_during_the_read_is_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = MdsSplit(root, "train")
    document = int(split.first_document[1])
    expected, opened, wrong = split.tokens(document), split._open[1], [True]

    def altered_meanwhile(*args: Any) -> int:
        if not wrong:
            return read(*args)
        wrong.clear()
        damaged = bytearray(content := (root / SHARD).read_bytes())
        damaged[int(opened.starts[0])] ^= 4
        (root / SHARD).write_bytes(damaged)
        got = read(*args)
        (root / SHARD).write_bytes(content)
        opened._check_content()  # another thread finds it right again before this one looks
        return got

    read = os.preadv
    monkeypatch.setattr(shard.os, "preadv", altered_meanwhile)
    assert np.array_equal(split.tokens(document), expected) and not wrong
