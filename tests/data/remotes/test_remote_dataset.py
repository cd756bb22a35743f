"""Remote datasets: files are fetched on demand, checked on arrival, and give the same batches as local ones."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from headway.data import fetch
from headway.data.build import build
from headway.data.config import DataConfig, DataError, MdsSource
from headway.data.corpus.config import CorpusConfig
from headway.data.loader import Loader
from headway.data.manifest import Manifest
from headway.data.verify import verify


def loader(source: MdsSource) -> Loader:
    cfg = DataConfig(source=source, seq_len=32, workers=0, shuffle_window=2)
    return Loader(cfg, split="train", global_batch=8, micro_batch=8, dp_rank=0, dp_size=1)


def digests(source: MdsSource, steps: int = 12) -> list[int]:
    with loader(source) as batches:
        return [next(batches).digest for _ in range(steps)]


def cached(remote: str | Path, cache: Path) -> MdsSource:
    return MdsSource(type="mds", path=str(cache), remote=str(remote))


@pytest.fixture
def remote(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "remote"))


def fetches() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fetch-ahead"]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_remote_folder_gives_the_same_batches_as_a_local_one(
    prefix: str, remote: Path, source: MdsSource, tmp_path: Path
) -> None:
    there = cached(f"{prefix}{remote}", tmp_path / "cache")
    info = verify(there, seq_len=32)
    assert info.fingerprint == verify(source).fingerprint
    assert not list((tmp_path / "cache").rglob("*.mds"))  # shards come when they are read
    assert digests(there) == digests(source)
    shutil.rmtree(remote / "train")  # all that was read stays readable
    assert digests(there) == digests(source)


def test_the_next_window_is_fetched_while_one_is_read(remote: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with loader(cached(remote, cache)) as batches:
        next(batches)
        for thread in fetches():
            thread.join()
    # A window of two shards, two more fetched ahead; a sequence may reach into one after the first two.
    assert 4 <= len(list(cache.rglob("*.mds"))) <= 6


def test_fetching_ahead_ends_with_the_loader(remote: Path, tmp_path: Path, monkeypatch) -> None:
    fetched: list[str] = []
    under_way, closing = threading.Event(), threading.Event()

    def slowly(root: Path, remote: str, name: str, manifest: Manifest) -> Path:
        path = real(root, remote, name, manifest)
        if threading.current_thread().name == "fetch-ahead":
            fetched.append(name)
            under_way.set()
            closing.wait(10)
        return path

    real = fetch.fetch_file
    monkeypatch.setattr(fetch, "fetch_file", slowly)
    batches = loader(cached(remote, tmp_path / "cache"))
    next(batches)
    assert under_way.wait(10) and fetches()
    threading.Timer(0.2, closing.set).start()  # close has begun by then, and waits
    batches.close()
    assert not fetches() and len(fetched) == 1  # the one that was under way, of two
    batches.batch(5)
    assert not fetches()


def test_compressed_shards_are_fetched_and_unpacked(config: CorpusConfig, source: MdsSource, tmp_path: Path) -> None:
    build(config.model_copy(update={"compression": "zstd"}), out=tmp_path / "remote", progress=False)
    there = cached(tmp_path / "remote", tmp_path / "cache")
    verify(there)
    assert digests(there) == digests(source)
    assert not list((tmp_path / "remote").rglob("*.mds"))


def test_a_shard_damaged_on_the_way_is_refused_and_not_kept(remote: Path, tmp_path: Path) -> None:
    for shard in (remote / "train").glob("*.mds"):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    there = cached(remote, tmp_path / "cache")
    verify(there)
    with pytest.raises(DataError, match=r"remote/train/shard\.\d+\.mds: .* but the manifest says"):
        digests(there)
    assert not list((tmp_path / "cache" / "train").glob("*.mds"))


def test_a_shard_missing_in_the_remote_is_named(remote: Path, tmp_path: Path) -> None:
    there = cached(remote, tmp_path / "cache")
    verify(there)
    for shard in (remote / "train").glob("*.mds"):
        shard.unlink()
    with pytest.raises(DataError, match=r"train/shard\.\d+\.mds: cannot be fetched .*FileNotFoundError"):
        digests(there)


def test_a_damaged_cache_is_found_by_the_preflight(remote: Path, tmp_path: Path) -> None:
    there = cached(remote, tmp_path / "cache")
    digests(there)
    shard = sorted((tmp_path / "cache" / "train").glob("*.mds"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{shard.name}: .*truncated or replaced"):
        verify(there)


def test_a_remote_that_now_holds_another_dataset_is_refused(remote: Path, config: CorpusConfig, tmp_path: Path) -> None:
    there = cached(remote, tmp_path / "cache")
    verify(there)
    build(config.model_copy(update={"validation_fraction": 0.5}), out=remote, progress=False)
    with pytest.raises(DataError, match=r"now holds .*use another data\.source\.path"):
        verify(there)


def test_a_remote_without_a_dataset_and_an_unknown_scheme_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.time, "sleep", lambda _: None)
    with pytest.raises(DataError, match=r"MANIFEST\.json: cannot be fetched"):
        verify(cached(tmp_path / "nothing", tmp_path / "cache"))
    with pytest.raises(DataError, match=r"unknown scheme; use a folder or one of .*s3://"):
        verify(cached("gopher://host/data", tmp_path / "cache"))


def test_a_lock_held_by_a_live_process_is_an_error_that_names_the_lock(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_TIMEOUT_S", 0.2)
    with (
        fetch._holding(tmp_path / "cache" / "MANIFEST.json"),
        pytest.raises(DataError, match=r"cache/\.MANIFEST\.json\.lock: held for more"),
    ):
        verify(cached(remote, tmp_path / "cache"))
