"""Data faults before or during a run give an error that names the file, and never a hang or other tokens.

F15 other data at a resume, F16 position in the data, F21 damaged files before the start, F22 shards that disappear
while they are read, F23 threads that end, F24 leftovers of killed processes.
"""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from damaged_data import (
    EPOCH,
    GLOBAL_BATCH,
    config,
    corpus,
    cut,
    digests,
    edit_index,
    flip_a_bit,
    link_out,
    loader,
    reseal,
    somebody_else,
    spec_of,
)

from headway.data import shard
from headway.data.build import build
from headway.data.config import DataError, MdsSource
from headway.data.prefetch import Prefetch
from headway.data.verify import verify
from headway.launcher.base.errors import SpecError
from headway.launcher.run.card import run_card
from headway.launcher.run.resolve import check_same_data, resolve
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.train.agreement import Wishes, agree
from headway.parallel.layout import Layout

SHARD = "train/shard.00001.mds"


# ---------------------------------------------------------------- a dataset


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("whole")
    build(corpus(folder, 80), out=folder / "tiny", progress=False)
    return folder / "tiny"


@pytest.fixture
def root(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


@pytest.fixture
def open_folder():
    """A folder that all users may enter, unlike pytest's own folders."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


# ---------------------------------------------------------------- F21: damaged before the start

DAMAGE = {
    "missing": (Path.unlink, "missing"),
    "cut short": (cut, "truncated or replaced"),
    "empty": (lambda path: cut(path, 0), "truncated or replaced"),
    "flipped bit": (flip_a_bit, "content changed since the dataset was built"),
    "link out of the folder": (link_out, "a link to a file outside of the dataset's folder"),
    "a folder in its place": (lambda path: (path.unlink(), path.mkdir()), "missing"),
}
FILES = ["train/shard.00000.mds", "validation/shard.00000.mds", "train/index.json", "train/lengths.npy"]


@pytest.mark.parametrize("name", [*FILES, "validation/index.json", "validation/lengths.npy", "tokenizer.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_any_kind_stops_a_run_before_it_starts(damage, name, root, tmp_path):  # F21
    harm, says = DAMAGE[damage]
    harm(root / name)
    with pytest.raises(DataError) as caught:
        resolve(spec_of(root, tmp_path))
    assert str(root / name) in str(caught.value) and says in str(caught.value)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda root: (root / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda root: cut(root / "MANIFEST.json"), "MANIFEST.json: not a manifest"),
        (lambda root: cut(root / "MANIFEST.json", 0), "MANIFEST.json: not a manifest"),
        (lambda root: edit_index(root / "train/index.json", lambda shards: shards.pop(1)), "train/index.json"),
        (lambda root: edit_index(root / "train/index.json", lambda s: s[0].update(samples=10**13)), "train/index.json"),
        (lambda root: edit_index(root / "train/index.json", lambda s: s[0].update(samples=99)), "train/index.json"),
        (lambda root: shutil.copy(root / SHARD, root / "train/shard.00099.mds"), "train/shard.00099.mds: a shard that"),
        (lambda root: shutil.copytree(root / "train", root / "validation/x.mds"), "validation/x.mds: a shard that"),
    ],
    ids=[
        "no manifest",
        "manifest cut",
        "manifest empty",
        "shard not in index",
        "absurd",
        "overstated",
        "extra",
        "more",
    ],
)
@pytest.mark.parametrize("sealed", [False, True])
def test_files_that_contradict_each_other_stop_a_run_before_it_starts(harm, says, sealed, root, tmp_path):  # F21
    harm(root)
    if sealed and "manifest" not in says.lower():
        reseal(root)  # the hashes agree again, the counts do not
    with pytest.raises(DataError, match=says) as caught:
        resolve(spec_of(root, tmp_path))
    assert caught.value.exit_code == 65


def test_a_file_that_may_not_be_read_stops_a_run_before_it_starts(whole, open_folder):  # F21
    root = Path(shutil.copytree(whole, open_folder / "tiny"))
    spec = spec_of(root, open_folder)
    for name in (SHARD, "train/index.json", "tokenizer.json", "train"):
        mode = (root / name).stat().st_mode
        (root / name).chmod(0)
        with somebody_else(root), pytest.raises(DataError, match=r"cannot be read|Permission denied") as caught:
            resolve(spec)
        assert str(root / name) in str(caught.value)
        (root / name).chmod(mode)
    with somebody_else(root):
        resolve(spec)


# ---------------------------------------------------------------- F22: while it is read


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_waited_for_and_then_named(workers, root):  # F22
    expected = digests(config(root))
    batches = loader(config(root, workers=workers, retry_s=5))
    hidden = [path.rename(path.with_suffix(".away")) for path in sorted((root / "train").glob("*.mds"))]
    back = threading.Timer(0.4, lambda: [path.rename(path.with_suffix(".mds")) for path in hidden])
    back.start()
    with batches:
        assert [next(batches).digest for _ in range(40)] == expected
    back.join()
    gone = loader(config(root, workers=workers, retry_s=0.5))
    (root / SHARD).unlink()
    began = time.monotonic()
    with gone, pytest.raises(DataError, match=rf"{SHARD}: .*No such file or directory; tried for 0\.5 s"):
        for _ in range(EPOCH):
            next(gone)
    assert 0.3 < time.monotonic() - began < 5


def test_storage_that_does_not_respond_is_an_error_with_the_awaited_file(root, monkeypatch):  # F22
    answers, read = threading.Event(), os.preadv
    batches = loader(config(root, workers=2, timeout_s=0.5), timeout_s=60)
    next(batches)
    monkeypatch.setattr(shard.os, "preadv", lambda *args: answers.wait(60) and read(*args))
    began = time.monotonic()
    with pytest.raises(
        DataError, match=r"data\.timeout_s: the batch of step \d+ was not ready after 0\.5 s, waiting for /"
    ):
        for _ in range(5):  # batches that are already prepared are still returned
            next(batches)
    batches.close()
    assert time.monotonic() - began < 5, "closing does not wait for a thread that hangs"
    answers.set()


def test_ranks_end_within_seconds_with_file_and_rank_when_a_shard_is_cut_short(headway, root):  # F22
    mds = f"data.source={{type: mds, path: {root}}}"
    process = headway.start(mds, "launch.processes=2", "train.tokens=10000000", "data.retry_s=1", "data.prefetch=1")
    metrics = headway.folder / "runs/tiny/metrics.jsonl"
    headway.wait_for(lambda: metrics.exists() and metrics.read_text().count('"train"') > 3, process)
    began = time.monotonic()
    for path in (root / "train").glob("*.mds"):
        cut(path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 65 and time.monotonic() - began < 10
    assert f"{root}/train/shard." in errors and "rank " in errors and "Traceback" not in errors


def test_runs_killed_several_times_in_a_pass_over_the_data_and_at_its_end_read_what_one_run_reads(headway, whole):
    # F16: a kill after each save, of which one is the last step of the first pass
    with loader(config(whole)) as batches:
        assert batches.source.num_sequences is not None
        epoch = -(-batches.source.num_sequences // GLOBAL_BATCH)
    saves = (epoch // 3, epoch // 3 + 5, epoch, epoch + 4)
    common = (f"data.source={{type: mds, path: {whole}}}", "data.workers=2", "data.shuffle_window=2")
    common += ("launch.processes=2", f"train.tokens={256 * (epoch + 9)}", "tracking.tensorboard=false")
    assert headway.train(*common, "run_dir=whole").returncode == 0
    done = 0
    for step in saves:
        fault = {"HEADWAY_FAULT": "save:after_rename@0#1:kill"}
        once = f"checkpoint.every_tokens={256 * step}"
        killed = headway.train(*common, once, "run_dir=killed", env={**headway.environment(), **fault})
        assert killed.returncode == 70, killed.stdout + killed.stderr
        assert f"(step {done}/" in killed.stdout or not done
        done = step
    again = headway.train(*common, "run_dir=killed", "checkpoint.every_tokens=null")
    assert again.returncode == 0 and f"(step {done}/" in again.stdout, again.stdout + again.stderr
    trajectories = []
    for name in ("whole", "killed"):
        lines = (headway.folder / name / "metrics.jsonl").read_text().splitlines()
        steps = [r for line in lines if (r := json.loads(line))["kind"] == "train"]
        trajectories.append([(r["step"], r["loss"], r["grad_norm"], r["batch_hash"]) for r in steps])
    assert trajectories[0] == trajectories[1] and len(trajectories[0]) == epoch + 9


# ---------------------------------------------------------------- F23: threads that end


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError(errno.EIO, "gone"), KeyError("defect")], ids=repr)
def test_any_error_of_a_data_thread_is_raised_in_the_consumer(error, root, monkeypatch):  # F23
    batches = loader(config(root, workers=2))
    monkeypatch.setattr(batches.source, "sample", lambda _: (_ for _ in ()).throw(error))
    with batches, pytest.raises(type(error)):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [StopIteration, SystemExit, KeyboardInterrupt])
def test_exceptions_that_end_a_loop_or_thread_silently_are_errors(error, workers, root, monkeypatch):  # F23, P6
    if workers == 0 and error is not StopIteration:
        return  # this exception belongs to the main thread

    def end(_):
        raise error

    batches = loader(config(root, workers=workers))
    monkeypatch.setattr(batches.source, "sample", end)
    with batches, pytest.raises(RuntimeError, match=f"preparing step 1 ended with {error.__name__}"):
        for _ in batches:
            pass


@pytest.mark.parametrize("when", ["before it takes a step", "with a step in hand"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_silently_does_not_hang_the_consumer(when, monkeypatch):  # F23
    if when == "before it takes a step":
        monkeypatch.setattr(Prefetch, "_work", lambda self: None)

    class Dies(dict):
        def __setitem__(self, key, value):
            raise MemoryError

    watched = threading.Event()
    prefetch = Prefetch(lambda _: watched.wait(60), first=0, end=None, ahead=1, workers=1)
    prefetch._ready = Dies()
    watched.set()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="data thread for step 1 ended without a result"):
        prefetch.get(0, timeout_s=60)
    assert time.monotonic() - began < 5


# ---------------------------------------------------------------- F24: leftovers of killed processes

KILLED = """
import os, pathlib, shutil, signal, sys, time
from headway.data import fetch
from headway.data.config import DataConfig, MdsSource
from headway.data.loader import Loader
from headway.data.verify import verify
root, remote = sys.argv[1:]
cfg = DataConfig(
    source=MdsSource(type="mds", path=root, remote=remote), seq_len=32, workers=2, shuffle_window=2
)

def halfway(remote, name, destination, expected):
    whole = pathlib.Path(remote, name).read_bytes()
    destination.write_bytes(whole[:len(whole) // 2])
    if told and name.endswith(".mds"):
        os.write(told[0], b".")
        time.sleep(60)
    destination.write_bytes(whole)

fetch._download = halfway
for attempt in range(10):
    ready, tell = os.pipe()
    told = [tell] if attempt >= 5 else []  # killed in mid-download
    step = 10 * attempt if told else attempt
    pid = os.fork()
    if pid == 0:
        verify(cfg.source)
        loader = Loader(cfg, split="train", global_batch=8, micro_batch=8, dp_rank=0, dp_size=1, start_step=step)
        next(loader)
        os.write(tell, b".")
        while True:
            loader.batch(step)
    os.read(ready, 1)
    held = [os.path.realpath(entry) for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir()]
    mapped = pathlib.Path(f"/proc/{pid}/maps").read_text()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not [path for path in held if "/dev/shm" in path] and "/dev/shm" not in mapped, (held, mapped)
"""


def test_ten_killed_readers_leave_no_files_and_block_no_later_reader(whole, tmp_path):  # F24
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    subprocess.run(
        [sys.executable, "-P", "-c", KILLED, str(cache), str(whole)],
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    assert list(temporary.iterdir()) == []

    def halves() -> list[Path]:
        return [path for path in cache.rglob(".*") if not path.name.endswith(".lock") and path.name != ".verified.json"]

    assert halves(), "nobody was killed in mid-download"
    (cache / ".verified.json").write_text('{"train/shard.000')
    verify(MdsSource(type="mds", path=str(cache), remote=str(whole)))
    assert digests(config(cache, remote=whole), EPOCH) == digests(config(whole), EPOCH)
    assert halves() == []


def test_files_of_other_users_are_not_changed_and_named_only_if_they_block(whole, open_folder):  # F24
    root, cache = Path(shutil.copytree(whole, open_folder / "tiny")), open_folder / "cache"
    source = MdsSource(type="mds", path=str(cache), remote=str(root))
    verify(source)
    for name in (".verified.json", "train/.shard.00099.mds.4711", "train/.other", "notes"):
        (cache / name).write_bytes(b"")
        (cache / name).chmod(0)
    with somebody_else(open_folder):
        verify(source)
        digests(config(cache, remote=root))
    assert {path.name for path in (cache / "train").glob(".*") if path.stat().st_mode & 0o777 == 0} == {
        ".other",
        ".shard.00099.mds.4711",
    }
    for path in (cache / "train").glob("*.mds"):
        path.unlink()
    for path in (cache / "train").glob(".shard*.lock"):
        path.chmod(0)
    with somebody_else(open_folder), pytest.raises(DataError, match=r"\.lock: cannot be written \(Permission denied\)"):
        digests(config(cache, remote=root))


# ---------------------------------------------------------------- F15, F16, P6: the same data, from the same place


def swapped(root: Path, folder: Path) -> None:
    """Change a word of a document, with consistent hashes."""
    flip_a_bit(root / "train/shard.00000.mds", at=0.99)
    reseal(root)


def grown(root: Path, folder: Path) -> None:
    shutil.rmtree(root)
    build(corpus(folder, 90), out=root, progress=False)


def other_tokenizer(root: Path, folder: Path) -> None:
    shutil.rmtree(root)
    build(corpus(folder, 80, vocab_size=290), out=root, progress=False)


@pytest.mark.parametrize("change", [swapped, grown, other_tokenizer])
def test_a_run_does_not_continue_with_other_data(change, root, tmp_path):  # F15
    run = RunDir.of(spec_of(root, tmp_path))
    spec, info = resolve(spec_of(root, tmp_path))
    run.adopt(spec)
    write_json(run.card, run_card(spec, info))
    check_same_data(run, resolve(spec_of(root, tmp_path))[1])
    change(root, tmp_path)
    _, now = resolve(spec_of(root, tmp_path))
    with pytest.raises(SpecError) as caught:
        check_same_data(run, now)
    assert info["fingerprint"][:16] in str(caught.value) and now["fingerprint"][:16] in str(caught.value)


def test_ranks_do_not_read_a_dataset_that_replaced_the_verified_one(root, tmp_path):  # F15
    verified = verify(MdsSource(type="mds", path=str(root))).fingerprint
    loader(config(root), fingerprint=verified)
    swapped(root, tmp_path)
    with pytest.raises(DataError, match=rf"replaced while the run started \(fingerprint {verified[:16]} then"):
        loader(config(root), fingerprint=verified)


def test_a_run_does_not_continue_in_another_order(root, tmp_path):  # F15
    run = RunDir.of(spec_of(root, tmp_path))
    run.adopt(resolve(spec_of(root, tmp_path))[0])
    run.adopt(resolve(spec_of(root, tmp_path, "data.workers=4", "data.timeout_s=9", "data.retry_s=1"))[0])
    for changed in ("data.seed=1", "data.shuffle_window=4", "data.seq_len=16", "data.document_mask=false"):
        with pytest.raises(SpecError, match=changed.partition("=")[0]):
            run.adopt(resolve(spec_of(root, tmp_path, changed))[0])


def agreement(batch, steps_done, layout_sum):
    """The agreement as seen by one of two data parallel ranks."""
    layout = SimpleNamespace(is_data_lead=True, device="cpu", world_size=2, dp_size=2, sum=layout_sum)
    wishes = Wishes(stop=False, save=False, written=False)
    return agree(batch, wishes, cast(Layout, layout), step=steps_done, global_batch=GLOBAL_BATCH)


@pytest.mark.parametrize("fault", ["none", "a rank is a step ahead", "a rank has fewer sequences"])
def test_ranks_that_did_not_read_the_global_batch_of_the_step_stop(fault, whole):  # P6
    first, second = (loader(config(whole), rank, 2) for rank in range(2))
    batches = [first.batch(4), second.batch(5 if "ahead" in fault else 4)]
    if "fewer" in fault:
        batches[1] = dataclasses.replace(batches[1], sequences=3)
    sent: list[torch.Tensor] = []
    with pytest.raises(StopIteration):  # a wrong sum over the other ranks
        agreement(batches[1], batches[1].step, lambda mine: next(iter(sent.append(mine) or [])))

    def outcome():
        return agreement(batches[0], 4, lambda mine: mine + sent[0])

    if fault == "none":
        assert outcome().targets == sum(batch.targets for batch in batches)
        assert outcome().digest == f"{loader(config(whole)).batch(4).digest:016x}"
    else:
        with pytest.raises(DataError, match="step 5: all ranks together have read"):
            outcome()
