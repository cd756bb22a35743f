"""`headway train`, end to end in real processes: resume, signals, locks, and mistakes that get a clear message."""

import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from run_folders import records, steps_done, trajectory

from headway.launcher.base.errors import SpecError
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec

DROPOUT = ("model.dropout=0.2", "model.dropout_places=[embedding, branches, hidden, head]", "parallel.recompute=block")


@pytest.mark.parametrize(
    ("processes", "precision", "more"),
    [
        (1, "fp32", ()),
        (1, "bf16", ()),
        (2, "fp32", ()),
        # tests/faults/test_resume.py has two ranks in bf16, tests/parity two that drop
        pytest.param(2, "bf16", (), marks=pytest.mark.slow),
        pytest.param(2, "bf16", DROPOUT, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_continues_bit_for_bit(headway, processes, precision, more):
    common = (f"launch.processes={processes}", f"parallel.precision={precision}", *more)
    whole = headway.train(*common, "run_dir=whole")
    assert whole.returncode == 0, whole.stderr
    run = headway.folder / "killed"
    process = headway.start(*common, "run_dir=killed")
    headway.wait_for(lambda: steps_done(run) >= 13, process)
    os.kill(int((run / "logs" / f"rank-{processes - 1}.pid").read_text()), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode not in (0, 64)
    assert f"rank {processes - 1}" in stderr and "SIGKILL" in stderr
    assert "Traceback" not in stderr.split("|")[0]
    again = headway.train(*common, "run_dir=killed")
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    assert trajectory(run) == trajectory(headway.folder / "whole")
    assert len(records(run)) == 40
    summary = json.loads((run / "summary.json").read_text())
    assert summary["complete"] and summary["resumes"] == 1


def test_sigterm_saves_and_the_same_command_continues(headway):
    run = headway.folder / "stopped"
    process = headway.start("run_dir=stopped", "checkpoint.every_tokens=null")
    headway.wait_for(lambda: steps_done(run) >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "same command continues" in stderr
    stopped_at = records(run)[-1]["step"]
    assert list((run / "checkpoints").iterdir()) == [run / "checkpoints" / f"step-{stopped_at:010d}"]
    again = headway.train("run_dir=stopped", "checkpoint.every_tokens=null")
    assert again.returncode == 0 and f"(step {stopped_at}/40)" in again.stdout
    whole = headway.train("run_dir=whole")
    assert whole.returncode == 0
    assert trajectory(run) == trajectory(headway.folder / "whole")


def test_sigterm_does_not_claim_to_have_saved_what_could_not_be_saved(headway):
    run = headway.folder / "stuck"
    run.mkdir()
    (run / "checkpoints").write_text("a file where the folder should be")
    process = headway.start("run_dir=stuck", "checkpoint.every_tokens=null", "train.tokens=2560000")
    headway.wait_for(lambda: steps_done(run) >= 3, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 74, stderr
    assert "cannot be written" in stderr and "continues from step 0" in stderr


def test_killing_the_launcher_leaves_no_rank_behind(headway):
    run = headway.folder / "orphan"
    process = headway.start("run_dir=orphan", "launch.processes=2", "train.tokens=2560000")
    headway.wait_for(lambda: steps_done(run) >= 1, process)
    pids = [int((run / "logs" / f"rank-{r}.pid").read_text()) for r in (0, 1)]
    process.kill()
    process.wait()

    def gone() -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in pids)

    end = time.monotonic() + 5
    while not gone() and time.monotonic() < end:
        time.sleep(0.01)
    assert gone()


def test_a_second_launch_on_a_live_folder_is_refused(headway):
    run = headway.folder / "held"
    process = headway.start("run_dir=held", "train.tokens=2560000")
    headway.wait_for(lambda: steps_done(run) >= 1, process)
    second = headway.train("run_dir=held", "train.tokens=2560000")
    assert second.returncode == 64
    holder = (run / "run.lock").read_text()
    assert f"a live run holds this folder (process {holder})" in second.stderr
    assert re.fullmatch(rf"\d+ on {re.escape(socket.gethostname())}", holder)
    before = steps_done(run)
    headway.wait_for(lambda: steps_done(run) > before, process)


def test_a_finished_run_is_not_trained_again_and_a_folder_of_another_spec_is_refused(headway):
    assert headway.train("train.tokens=768").returncode == 0
    again = headway.train("train.tokens=768")
    assert again.returncode == 0 and "already complete" in again.stdout
    other = headway.train("train.tokens=768", "optimizer.lr=0.004")  # F14
    assert other.returncode == 64
    assert "run of another spec" in other.stderr and "optimizer.lr: 0.003 in the folder, 0.004 now" in other.stderr
    assert headway.train("train.tokens=768", "tracking.log_every_steps=2").returncode == 0


def test_a_run_that_ended_just_before_its_summary_is_completed_from_its_last_checkpoint(headway):
    assert headway.train("train.tokens=768").returncode == 0
    run = headway.folder / "runs" / "tiny"
    before = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()  # the loss is the checkpoint's to know
    again = headway.train("train.tokens=768")
    assert again.returncode == 0, again.stderr
    after = json.loads((run / "summary.json").read_text())
    for key in ("final_validation_loss", "steps", "tokens", "train_s"):
        assert after[key] == before[key]


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(headway):
    # F11
    assert headway.train("train.tokens=2560").returncode == 0
    run = headway.folder / "runs" / "tiny"
    (run / "summary.json").unlink()
    (run / "checkpoints").rename(headway.folder / "elsewhere")
    before = (run / "metrics.jsonl").read_bytes()
    done = headway.train("train.tokens=2560")
    assert done.returncode == 74 and "records tell of one of step 10" in done.stderr, done.stderr
    assert "Put it back" in done.stderr and (run / "metrics.jsonl").read_bytes() == before
    (headway.folder / "elsewhere").rename(run / "checkpoints")
    assert headway.train("train.tokens=2560").returncode == 0


def test_a_folder_that_is_no_run_is_left_alone(headway):
    other = headway.folder / "thesis"
    other.mkdir()
    (other / "chapter-1.txt").write_text("do not touch")
    done = headway.train("run_dir=thesis")
    assert done.returncode == 64 and "no run folder and not empty (it has chapter-1.txt)" in done.stderr
    assert [p.name for p in other.iterdir()] == ["chapter-1.txt"]


def test_a_rank_that_dies_at_start_is_named_with_its_log(headway):
    # A value of CUDA_VISIBLE_DEVICES leaves the check of devices to the ranks.
    done = headway.train("launch.processes=2", "launch.device=cuda", "launch.env={CUDA_VISIBLE_DEVICES: '0,1'}")
    assert done.returncode not in (0, 64)
    assert "rank " in done.stderr and "cuda" in done.stderr.lower()
    assert socket.gethostname() in done.stderr


def test_a_taken_port_is_said_before_anything_starts(headway):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = headway.train(f"launch.port={port}")
    assert done.returncode == 64
    assert f"launch.port: {port} is taken" in done.stderr and "leave launch.port out" in done.stderr
    assert not (headway.folder / "runs").exists()


def test_a_save_that_does_not_fit_on_disk_is_said_and_the_run_stops_in_the_end(headway_alone):
    run = headway_alone.folder / "runs" / "tiny"

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = headway_alone.train("checkpoint.max_failures=2", "tracking.tensorboard=false", preexec_fn=small_files)
    assert done.returncode == 74, done.stderr
    assert "CHECKPOINT OF STEP 5 FAILED (1 in a row)" in done.stdout
    assert "CHECKPOINT OF STEP 10 FAILED (2 in a row)" in done.stdout
    assert "Free space" in done.stderr
    assert list((run / "checkpoints").iterdir()) == []
    again = headway_alone.train("checkpoint.max_failures=2", "tracking.tensorboard=false")
    assert again.returncode == 0 and steps_done(run) == 40


def test_more_processes_give_the_same_batches_and_losses(headway):
    for processes in (1, 2, 4):
        done = headway.train(f"launch.processes={processes}", f"run_dir=p{processes}", "train.tokens=2560")
        assert done.returncode == 0, done.stderr
    one, two, four = (records(headway.folder / f"p{n}") for n in (1, 2, 4))
    for a, b, c in zip(one, two, four, strict=True):
        assert a["batch_hash"] == b["batch_hash"] == c["batch_hash"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and c["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_tensorboard_holds_every_step_once_after_a_resume(headway):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    process = headway.start()
    run = headway.folder / "runs" / "tiny"
    headway.wait_for(lambda: steps_done(run) >= 8, process)
    os.kill(int((run / "logs" / "rank-0.pid").read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    assert headway.train().returncode == 0
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [e.step for e in board.Scalars("train/loss")] == list(range(1, 41))
    assert {t.split("/")[0] for t in board.Tags()["scalars"]} == {
        "train",
        "val",
        "perf",
        "router",
        "heads",
        "checkpoint",
    }
    assert board.Tags()["images"] == ["router/load_router"]


def test_dry_run_prints_the_command_and_starts_nothing(headway):
    done = headway.train("--dry-run", "launch.processes=2")
    assert done.returncode == 0
    assert "torch.distributed.run" in done.stdout and "--nproc-per-node 2" in done.stdout
    assert "OMP_NUM_THREADS=1" in done.stdout
    assert not (headway.folder / "runs").exists()


def test_the_console_line_says_what_a_person_looks_for(headway):
    done = headway.train("train.tokens=768")
    line = next(text for text in done.stdout.splitlines() if text.startswith("step 3/3"))
    for word in ("100.0%", "loss ", "val ", "gnorm ", "lr ", "tok/s ", "mem ", "data ", "dead ", "eta "):
        assert word in line


# ---------------------------------------------------------------- the parts, without processes


@pytest.fixture
def spec(headway) -> Spec:
    return load_spec(headway.spec).spec


@pytest.mark.parametrize(
    "override",
    [
        *("train.tokens=20480", "train.global_batch=16", "model.vocab_size=64", "seed=7", "optimizer.lr=1e-4"),
        *("schedule.warmup_tokens=256", "data.seq_len=64", "model.width=64", "parallel.precision=bf16"),
        *("attention.top_k=2", "attention={type: gqa, heads: 4, kv_heads: 2, head_dim: 8}", "guard.spike=skip"),
    ],
)
def test_a_key_that_decides_the_result_cannot_change_at_a_resume(headway, spec, tmp_path, override):
    # F14
    run = RunDir(tmp_path)
    run.adopt(spec)
    (run.checkpoints / "step-0000000001").mkdir(parents=True)
    other = load_spec(headway.spec, [override]).spec
    with pytest.raises(SpecError, match=re.escape(override.partition("=")[0].partition(".")[0])):
        run.adopt(other)
    run.adopt(spec)


@pytest.mark.parametrize(
    "override",
    [
        *("name=other", "tracking.tensorboard=false", "checkpoint.keep=7", "guard.replicas_every_steps=7"),
        *("launch.processes=2", "parallel.zero=2", "data.workers=1", "data.prefetch=1", "parallel.recompute=block"),
    ],
)
def test_a_key_that_does_not_may(headway, spec, tmp_path, override):
    # F14
    run = RunDir(tmp_path)
    run.adopt(spec)
    (run.checkpoints / "step-0000000001").mkdir(parents=True)
    run.adopt(load_spec(headway.spec, [override]).spec)


@pytest.mark.parametrize("text", ["", '{"seed": 1, "opt'])
def test_a_spec_cut_off_before_the_first_checkpoint_is_written_anew(tmp_path, spec, text):
    run = RunDir(tmp_path)
    run.spec.write_text(text)
    run.adopt(spec)
    assert Spec.model_validate_json(run.spec.read_text()) == spec


@pytest.mark.parametrize("text", [None, "", '{"seed": 1, "opt'])
def test_checkpoints_whose_spec_cannot_be_read_are_not_continued(tmp_path, spec, text):
    run = RunDir(tmp_path)
    (run.checkpoints / "step-0000000001").mkdir(parents=True)
    if text is not None:
        run.spec.write_text(text)
    with pytest.raises(SpecError, match="missing or unreadable"):
        run.adopt(spec)


def test_records_are_cut_at_the_checkpoint_and_damaged_lines_left_out(tmp_path):
    run = RunDir(tmp_path)
    lines = [b'{"kind": "train", "step": %d, "x": 0.1}' % n for n in (1, 2, 3)]
    run.metrics.write_bytes(b"\n".join([lines[0], b"\xff\xfe broken", b"7", lines[1], lines[2], b'{"kind": "tr']))
    run.cut_metrics(last_step=2)
    assert [r["step"] for r in run.read_metrics()] == [1, 2]
    assert run.metrics.read_bytes().count(b"\n") == 2


def test_tensorboard_forgets_an_attempt_that_ended_before_its_first_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from headway.launcher.train.tracking import Tracker

    run = RunDir(tmp_path)
    for last_step, loss in ((4, 9.0), (2, 1.0)):
        tracker = Tracker(run, main=True, tensorboard=True, log_every_steps=1, total_steps=4, start_step=0)
        for step in range(1, last_step + 1):
            tracker.validation({"kind": "validation", "step": step, "loss": loss, "accuracy": 0.5, "targets": 1})
        tracker.close()
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("val/loss")] == [(1, 1.0), (2, 1.0)]


def test_a_lock_is_waited_for_while_its_holder_is_being_ended(tmp_path):
    run, held = RunDir(tmp_path), threading.Event()

    def hold() -> None:
        with run.locked("worker.lock"):
            held.set()
            time.sleep(0.3)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with pytest.raises(SpecError, match="a live run holds"), run.locked("worker.lock"):
        pass
    with run.locked("worker.lock", wait_s=10):
        pass
    holder.join()


@pytest.mark.parametrize(("error", "status"), [(OSError(28, "No space left on device"), 74), (OSError(2, "gone"), 1)])
def test_a_disk_that_is_full_outside_a_save_ends_with_the_status_of_storage(tmp_path, monkeypatch, error, status):
    from headway.launcher.train import worker

    class Left(BaseException):
        pass

    def fail(path: Path, stop: object) -> None:
        raise error

    def leave(code: int) -> None:
        raise Left(code)

    (tmp_path / "logs").mkdir()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path)])
    monkeypatch.setattr(worker, "_train", fail)
    monkeypatch.setattr(worker, "_own_log", lambda path, main: None)
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(worker, "StopFlag", lambda: None)
    monkeypatch.setattr(worker.os, "_exit", leave)
    with pytest.raises(Left) as caught:
        worker.main()
    assert caught.value.args == (status,)


def test_a_benchmark_without_a_spread_is_refused_before_anything_is_read():
    from headway.launcher.bench.step import bench_data, bench_step

    for measure in (bench_step, bench_data):
        with pytest.raises(SpecError, match="use at least 2"):
            measure(Path("absent.yaml"), [], steps=1, out=None)
