"""A cache with a limit: never larger, least recently used shards go first, open ones stay, and batches are the same."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from filelock import FileLock
from pydantic import ValidationError
from web_server import PROXIES, WebServer, serving

from headway.data import fetch
from headway.data.build import build
from headway.data.config import DataConfig, DataError, MdsSource, MixSource, datasets_of
from headway.data.corpus.config import CorpusConfig
from headway.data.loader import Loader
from headway.data.manifest import FileEntry, read_manifest
from headway.data.mds import MdsSplit, read_index, sizes_of
from headway.data.remotes.cache import Cache, least_bytes, lock_path, open_pinned, open_shared
from headway.data.verify import verify, verify_source

STEPS = 60
WINDOW = 2


def limited(remote: Path | str, cache: Path, limit: int | None) -> MdsSource:
    return MdsSource(type="mds", path=str(cache), remote=str(remote), cache_bytes=limit)


def digests(source: MdsSource, steps: int = STEPS, **changes: Any) -> list[int]:
    cfg = DataConfig(source=source, seq_len=32, workers=changes.pop("workers", 0), shuffle_window=WINDOW)
    with Loader(cfg, split="train", global_batch=8, micro_batch=8, dp_rank=0, dp_size=1) as batches:
        return [next(batches).digest for _ in range(steps)]


def shards(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if ".mds" in path.name and not path.name.startswith("."))


def size_of(cache: Path) -> int:
    """Bytes of the shards, and of what is being fetched or unpacked."""
    sizes: dict[int, int] = {}  # by inode: a file may get its final name in between
    for path in cache.rglob("*.mds*"):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            sizes[found.st_ino] = 0 if path.name.endswith(".lock") else found.st_size
    return sum(sizes.values())


def least(dataset: Path, window: int = WINDOW) -> int:
    manifest = read_manifest(dataset)
    return least_bytes(*sizes_of(read_index(dataset, "train", manifest), "train", manifest), window)


class Watch:
    """The largest size of a cache while the context lasts. It is read while no process deletes or makes room."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.largest, self._end = cache, 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._end.is_set():
            with FileLock(str(self.cache / ".cache.lock")):
                self.largest = max(self.largest, size_of(self.cache))
            time.sleep(0.001)

    def __enter__(self) -> Watch:
        self.cache.mkdir(exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@pytest.fixture
def web(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serving(dataset) as server:
        yield server


@pytest.fixture(scope="module")
def whole(dataset: Path) -> list[int]:
    """The batches of the local dataset."""
    return digests(MdsSource(type="mds", path=str(dataset)))


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_the_same_within_the_limit_over_epochs(
    web: WebServer, dataset: Path, whole: list[int], tmp_path: Path, workers: int
) -> None:
    cache, limit = tmp_path / "cache", least(dataset)
    assert sum(path.stat().st_size for path in shards(dataset / "train")) > 3 * limit
    verify(limited(web.url, cache, limit), seq_len=32, shuffle_window=WINDOW)
    with Watch(cache) as watch:
        assert digests(limited(web.url, cache, limit), workers=workers) == whole
    assert 0.5 * limit < watch.largest <= limit
    names = {request.path for request in web.fetched(".mds")}
    assert len(web.fetched(".mds")) > len(names)  # some were deleted and fetched again
    assert not list(cache.glob(".reserved-*"))


def test_a_limit_that_holds_everything_fetches_each_shard_once(
    web: WebServer, whole: list[int], tmp_path: Path
) -> None:
    source = limited(web.url, tmp_path / "cache", 1 << 30)
    assert digests(source) == whole and digests(source) == whole
    fetched = [request.path for request in web.fetched(".mds")]
    assert len(fetched) == len(set(fetched)) > 10


def test_compressed_shards_are_unpacked_within_the_limit(
    config: CorpusConfig, whole: list[int], tmp_path: Path
) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    build(config.model_copy(update={"compression": "zstd"}), out=remote, progress=False)
    limit = least(remote)
    verify(limited(remote, cache, limit), shuffle_window=WINDOW)
    with Watch(cache) as watch:
        assert digests(limited(remote, cache, limit)) == whole
    assert watch.largest <= limit and not list(cache.rglob("*.zstd"))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_is_being_fetched_is_no_leftover_of_a_killed_process(
    config: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str | None
) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    build(config.model_copy(update={"compression": compression}), out=remote, progress=False)
    split = MdsSplit(cache, "train", remote=str(remote), cache_bytes=1 << 30)
    download, manifest, name = fetch._download, read_manifest(remote), f"train/{split.shards[0].stored_name}"

    def meanwhile(remote: str, name: str, destination: Path, expected: FileEntry | None) -> None:
        download(remote, name, destination, expected)
        Cache(cache, 1 << 30).trim()  # another process starts
        if compression:  # and one of a run without a limit fetches the same file
            monkeypatch.setattr(fetch, "_TIMEOUT_S", 0.1)
            with pytest.raises(DataError, match="held for more than"):
                fetch.fetch_file(cache, remote, name, manifest)
        assert destination.exists()

    monkeypatch.setattr(fetch, "_download", meanwhile)
    assert split.local_path(0).stat().st_size == split.shards[0].raw_bytes
    assert compression is None or not (cache / name).exists()


def test_the_shards_used_least_recently_are_deleted_first(tmp_path: Path) -> None:
    cache = filled(tmp_path, "abcd")
    for name in "bcad":
        cache.used(at(tmp_path, name))
        time.sleep(0.01)
    with cache.room(200) as found:
        assert found and names(tmp_path) == {"a", "d"}
    time.sleep(0.1)
    cache.used(at(tmp_path, "a"))
    with cache.room(300) as found:
        assert found and names(tmp_path) == {"a"}


def filled(root: Path, letters: str, limit: int = 400) -> Cache:
    """A cache of shards with 100 bytes each."""
    (root / "train").mkdir(parents=True, exist_ok=True)
    for letter in letters:
        at(root, letter).write_bytes(bytes(100))
    return Cache(root, limit)


def at(root: Path, letter: str) -> Path:
    return root / "train" / f"{letter}.mds"


def names(root: Path) -> set[str]:
    return {path.stem for path in (root / "train").glob("*.mds")}


@pytest.mark.parametrize("opened", [open_pinned, open_shared])
def test_a_shard_that_a_process_has_open_is_never_deleted(tmp_path: Path, opened) -> None:
    cache = filled(tmp_path, "abcd")
    descriptor = opened(at(tmp_path, "a"))
    with cache.room(300, wait_s=0) as found:
        assert found and names(tmp_path) == {"a"}
    with cache.room(301, wait_s=0) as found:
        assert not found and names(tmp_path) == {"a"}
    os.close(descriptor)
    with cache.room(400, wait_s=0) as found:
        assert found and names(tmp_path) == set()


def test_room_that_is_taken_is_waited_for(tmp_path: Path) -> None:
    cache = filled(tmp_path, "abcd")
    descriptor = open_pinned(at(tmp_path, "a"))
    threading.Timer(0.3, os.close, [descriptor]).start()
    began = time.monotonic()
    with cache.room(400, wait_s=20) as found:
        assert found and 0.2 < time.monotonic() - began < 10


def test_a_shard_deleted_while_it_is_opened_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, "a")
    lock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        at(tmp_path, "a").unlink(missing_ok=True)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(FileNotFoundError):
        open_pinned(at(tmp_path, "a"))


def test_reservations_count_and_end_with_their_process(tmp_path: Path) -> None:
    cache = filled(tmp_path, "a")
    with cache.room(250) as found:
        assert found and names(tmp_path) == {"a"}
        with Cache(tmp_path, 400).room(100, wait_s=0) as second:  # the 150 left hold it in place of the shard
            assert second and names(tmp_path) == set()
        with cache.room(200, wait_s=0) as third:
            assert not third
    with cache.room(400, wait_s=0) as found:
        assert found
    code = (
        "import os, pathlib, sys, signal\n"
        "from headway.data.remotes.cache import Cache\n"
        "with Cache(pathlib.Path(sys.argv[1]), 400).room(400): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], timeout=60)
    assert list(tmp_path.glob(".reserved-*"))
    with cache.room(400, wait_s=0) as found:
        assert found
    assert not list(tmp_path.glob(".reserved-*"))


def test_a_lower_limit_and_leftovers_of_killed_processes_are_trimmed_at_the_start(
    dataset: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    digests(limited(dataset, cache, None))
    assert size_of(cache) > least(dataset)
    left = cache / "train" / ".shard.00000.mds.4711"
    left.write_bytes(bytes(10))
    MdsSplit(cache, "train", remote=str(dataset), cache_bytes=least(dataset))
    assert size_of(cache) <= least(dataset) and shards(cache) and not left.exists()


def test_a_limit_below_a_window_is_refused_with_the_one_that_works(
    dataset: Path, whole: list[int], tmp_path: Path
) -> None:
    need = least(dataset)
    small = limited(dataset, tmp_path / "cache", need - 1)
    with pytest.raises(DataError, match=rf"cache_bytes: .* use at least {need}, a smaller shuffle_window, or"):
        verify(small, seq_len=32, shuffle_window=WINDOW)
    with pytest.raises(DataError, match=rf"use at least {need}"):
        digests(small)
    verify(limited(dataset, tmp_path / "cache", need), seq_len=32, shuffle_window=WINDOW)
    assert least(dataset, window=1000) == sum(path.stat().st_size for path in shards(dataset / "train"))


def test_fetching_ahead_does_not_delete_the_current_window(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(dataset)
    raw, _ = sizes_of(read_index(dataset, "train", manifest), "train", manifest)
    split = MdsSplit(tmp_path, "train", remote=str(dataset), cache_bytes=raw[0] + raw[1] + max(raw[2] - raw[0], 0))
    first, second = split.local_path(0), split.local_path(1)
    assert not split.fetch_ahead(2, keep={0, 1, 2}) and first.exists() and second.exists()
    assert split.fetch_ahead(2, keep={1, 2}) and not first.exists() and second.exists()

    kept: list[set[int]] = []
    monkeypatch.setattr(MdsSplit, "fetch_ahead", lambda _, number, keep: kept.append(set(keep)) is None)
    source = limited(dataset, tmp_path, least(dataset))
    cfg = DataConfig(source=source, seq_len=32, workers=0, shuffle_window=WINDOW)
    with Loader(cfg, split="train", global_batch=8, micro_batch=8, dp_rank=0, dp_size=1) as batches:
        batches.batch(0)
        for thread in [t for t in threading.enumerate() if t.name == "fetch-ahead"]:
            thread.join()
        order = cast("Any", batches.source)._order
        assert kept == [{*order.shards_at(0), *order.shards_after(0)}] * WINDOW
        assert len(kept[0]) == 2 * WINDOW


@pytest.mark.parametrize("first", ["_shards", "_reserved"])
def test_a_fetch_that_ends_while_sizes_are_added_up_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    cache, shard = Cache(tmp_path, 100), tmp_path / "train/shard.00000.mds"
    shard.parent.mkdir()
    with contextlib.ExitStack() as fetch:
        fetch.enter_context(cache.room(60))
        original = getattr(Cache, first)

        def then_it_ends(self: Cache) -> object:
            found = original(self)
            shard.write_bytes(bytes(60))
            fetch.close()
            return found

        with monkeypatch.context() as patch:
            patch.setattr(Cache, first, then_it_ends)
            with cache.room(60, keep=[shard], wait_s=0.0) as there_is_room:
                assert not there_is_room


def test_a_cache_that_gets_no_room_says_so(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headway.data.remotes.cache._WAIT_S", 0.2)
    cache, limit = tmp_path / "cache", least(dataset)
    split = MdsSplit(cache, "train", remote=str(dataset), cache_bytes=limit)
    with Cache(cache, limit).room(limit), pytest.raises(DataError, match=r"cache_bytes: .* has no room for shard"):
        split.tokens(0)


def test_a_limit_without_a_remote_is_refused_and_each_part_of_a_mixture_has_its_own(
    dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="cache_bytes: limits the cache of a remote"):
        MdsSource(type="mds", path="x", cache_bytes=1000)
    parts = [{"path": str(tmp_path / name), "remote": str(dataset), "weight": 1, "cache_bytes": 1} for name in "ab"]
    mix = MixSource.model_validate({"type": "mix", "sources": tuple(parts)})
    assert [part.cache_bytes for part in datasets_of(mix)] == [1, 1]
    with pytest.raises(DataError, match=r"use at least"):
        verify_source(mix, shuffle_window=WINDOW)


TOGETHER = """
import json, sys
from pathlib import Path
from headway.data.config import DataConfig, MdsSource
from headway.data.loader import Loader
path, remote, limit, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
cfg = DataConfig(
    source=MdsSource(type="mds", path=path, remote=remote, cache_bytes=limit), seq_len=32, workers=2, shuffle_window=2
)
with Loader(cfg, split="train", global_batch=8, micro_batch=2, dp_rank=rank, dp_size=2) as batches:
    found = [next(batches).digest for _ in range(int(sys.argv[5]))]
print(json.dumps(found))
"""


def test_two_processes_share_a_cache_within_the_limit(
    web: WebServer, dataset: Path, whole: list[int], tmp_path: Path
) -> None:
    cache, limit = tmp_path / "cache", least(dataset)
    with Watch(cache) as watch:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", TOGETHER, str(cache), web.url, str(limit), str(rank), str(STEPS)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        outs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    found = [[int(digest) for digest in out.strip("[]\n").split(",")] for out in outs]
    assert [sum(pair) % (1 << 64) for pair in zip(*found, strict=True)] == whole
    assert 0.5 * limit < watch.largest <= limit


def test_the_remote_itself_is_no_cache(dataset: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(dataset, tmp_path / "set"))
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train").symlink_to(root / "train")
    before = shards(root)
    for remote, path in (
        (root, root),
        (f"file://{root}", root),
        (root, tmp_path / "link"),
        (root, tmp_path / "linked"),
    ):
        for check in (verify, digests):
            with pytest.raises(DataError, match=r"cache_bytes: .* is a folder of data\.source\.remote itself"):
                check(limited(remote, path, 1000))
    assert shards(root) == before


def test_another_run_may_delete_shards_while_one_is_verified(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    digests(limited(dataset, cache, None))
    (cache / ".verified.json").unlink(missing_ok=True)
    victim = shards(cache)[0]

    def deleting(path: str) -> bool:
        found = lexists(path)
        if str(path) == str(victim):
            victim.unlink(missing_ok=True)
        return found

    lexists = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", deleting)
    verify(limited(dataset, cache, None))
    assert not victim.exists()


def test_the_lock_file_of_a_shard_has_the_time_of_its_last_use(dataset: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    split = MdsSplit(cache, "train", remote=str(dataset), cache_bytes=1 << 30)
    split.tokens(0)
    path = split.local_path(0)
    os.utime(lock_path(path), (0, 0))
    state = path.stat()
    MdsSplit(cache, "train", remote=str(dataset), cache_bytes=1 << 30).tokens(0)
    assert lock_path(path).stat().st_mtime > 1e9
    assert (path.stat().st_mtime_ns, path.stat().st_ctime_ns) == (state.st_mtime_ns, state.st_ctime_ns)
