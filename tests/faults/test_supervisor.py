"""Faults and signals that end a run, restarts, and no process left behind."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import time

import pytest
from run_folders import alive, pids, records, trajectory

from headway.launcher.hosts.faults import CAUSE, Fault
from headway.launcher.hosts.restarts import Restarts
from headway.launcher.run.run_dir import RunDir

SAVED = ("train.tokens=2560000", "launch.processes=2", "tracking.tensorboard=false")
LONG = (*SAVED, "checkpoint.every_tokens=null")


def attempts(run):
    """Number of failed starts."""
    path = run / "logs" / "attempts.jsonl"
    return path.read_text().splitlines() if path.exists() else []


# ---------------------------------------------------------------- restarts


def test_the_launcher_restarts_ranks_that_die(headway):
    # F1, F28: a rank is killed by SIGKILL, as by the kernel when memory runs out.
    assert headway.train("launch.processes=2", "run_dir=whole").returncode == 0
    process = headway.start("launch.processes=2", "launch.restarts=2", "run_dir=killed")
    run = headway.folder / "killed"
    for saved in (5, 15, 25):
        folder = run / "checkpoints" / f"step-{saved:010d}"
        headway.wait_for(lambda folder=folder: folder.exists(), process)
        old = pids(run)
        os.kill(old[saved // 10 % 2], signal.SIGKILL)
        headway.wait_for(lambda old=old: not any(map(alive, old)), process)
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    assert stdout.count("restarting the ranks from the newest checkpoint") == 3 and "SIGKILL" in stdout
    assert trajectory(run) == trajectory(headway.folder / "whole")
    lines = [json.loads(line) for line in (run / "logs" / "attempts.jsonl").read_text().splitlines()]
    assert [line["started_again"] for line in lines] == [True] * 3 and "SIGKILL" in lines[0]["cause"]


def test_restarts_without_a_checkpoint_end_when_the_budget_is_spent(headway):
    env = {**headway.environment(), "HEADWAY_FAULT": "save:begin@1#1:kill"}
    done = headway.train("launch.processes=2", "run_dir=doomed", "launch.restarts=1", env=env)
    assert done.returncode == 70
    assert done.stdout.count("restarting the ranks") == 1
    assert "restarted 1 time(s) without a new checkpoint (limit: launch.restarts)" in done.stderr


def test_the_budget_is_reset_after_progress_and_mistakes_are_not_retried(tmp_path):
    run = RunDir(tmp_path)
    run.logs.mkdir()
    restarts, death = Restarts(run, 2), Fault(text="rank 0 was killed", again=True)

    def again(fault: Fault) -> bool:
        granted = restarts.grant(fault)
        assert granted is not None
        return granted.again

    assert [again(death) for _ in range(3)] == [True, True, False]
    (run.checkpoints / "step-0000000005").mkdir(parents=True)
    assert [again(death) for _ in range(3)] == [True, True, False]
    (run.checkpoints / "step-0000000009").mkdir()
    assert not again(Fault(text="a key is wrong", code=64, weight=CAUSE))
    assert restarts.grant(None) is None
    assert len((run.logs / "attempts.jsonl").read_text().splitlines()) == 7


def test_ranks_without_memory_are_named_and_restarted(headway):
    # F28: on each rank, by a memory limit. They die, or wait forever for a thread that could not start (CPython's
    # Thread.start), which is detected like any rank that hangs.
    common = ("launch.processes=2", "train.tokens=17920", "launch.hang_s=3")
    assert headway.train(*common, "run_dir=whole").returncode == 0
    run = headway.folder / "short"
    process = headway.start(*common, "launch.restarts=9", "run_dir=short")
    for victim, step in ((0, 20), (1, 45)):
        headway.wait_for(lambda step=step: any(r["step"] >= step for r in records(run)), process)
        limited, begun = pids(run)[victim], len(attempts(run))
        subprocess.run(["prlimit", "--pid", str(limited), "--as=1000000"], check=True)
        headway.wait_for(lambda limited=limited: not alive(limited), process)
        headway.wait_for(lambda begun=begun: len(attempts(run)) > begun, process)
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    assert stdout.count("restarting the ranks") == 2 and "rank 0" in stdout and "rank 1" in stdout
    assert trajectory(run) == trajectory(headway.folder / "whole")


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("signum", "target"),
    [
        (signal.SIGTERM, "rank"),
        (signal.SIGUSR1, "rank"),
        (signal.SIGHUP, "rank"),
        (signal.SIGINT, "launcher"),
        (signal.SIGHUP, "launcher"),
    ],
    ids=str,
)
def test_a_signal_to_the_launcher_or_to_one_rank_saves_and_ends_with_75(headway, signum, target):
    # F5
    process, run = headway.start(*LONG, "run_dir=run"), headway.folder / "run"
    headway.wait_for(lambda: len(records(run)) >= 3, process)
    began = time.monotonic()
    os.kill(process.pid if target == "launcher" else pids(run)[1], signum)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75, stderr
    assert time.monotonic() - began < 30
    last = records(run)[-1]["step"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{last:010d}"]
    assert "same command continues" in stderr


@pytest.mark.slow  # test_signal_storms.py has moments of its own
def test_signals_at_random_moments_lose_no_step(headway):
    # F5. `make soak` sends many more. Steps take milliseconds, so each start ends within a few saves.
    common = ("train.tokens=102400", "launch.processes=2", "tracking.tensorboard=false", "checkpoint.every_tokens=null")
    assert headway.train(*common, "run_dir=whole").returncode == 0
    run, chance = headway.folder / "stopped", random.Random(5)
    for number in range(6):  # each kind of signal to each process
        wanted = len(records(run)) + chance.randint(1, 20)
        process = headway.start(*common, "run_dir=stopped")
        headway.wait_for(lambda wanted=wanted: len(records(run)) > wanted, process)
        victim = (process.pid, *pids(run))[number % 3]
        began = time.monotonic()
        os.kill(victim, (signal.SIGTERM, signal.SIGUSR1)[number % 2])
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 75 and time.monotonic() - began < 30, stderr
        last = records(run)[-1]["step"]
        assert last < 400 and max(p.name for p in (run / "checkpoints").iterdir()) == f"step-{last:010d}"
    done = headway.train(*common, "run_dir=stopped")
    assert done.returncode == 0, done.stderr
    assert trajectory(run) == trajectory(headway.folder / "whole") and len(records(run)) == 400


def test_a_second_ctrl_c_ends_ranks_that_cannot_save(headway):
    # F5
    process, run = headway.start(*LONG, "run_dir=run"), headway.folder / "run"
    headway.wait_for(lambda: len(records(run)) >= 3, process)
    os.kill(pids(run)[1], signal.SIGSTOP)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 70 and "second Ctrl-C" in stderr, stderr
    assert time.monotonic() - began < 10 and not any(map(alive, pids(run)))


def test_a_signal_during_the_set_up_takes_effect_after_the_first_step(headway):
    process, run = headway.start(*LONG, "run_dir=run"), headway.folder / "run"
    headway.wait_for(lambda: (run / "logs" / "rank-1.beat").exists(), process)
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert len(records(run)) <= 1


def test_ranks_that_do_not_stop_in_time_are_killed_and_the_launcher_exits_with_70(headway):
    process, run = headway.start(*LONG, "run_dir=run", "launch.stop_s=2"), headway.folder / "run"
    headway.wait_for(lambda: len(records(run)) >= 3, process)
    os.kill(pids(run)[1], signal.SIGSTOP)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 70 and "launch.stop_s" in stderr and "before they had saved" in stderr, stderr
    assert time.monotonic() - began < 2 + 5
    assert not any(map(alive, pids(run)))


def test_stacks_are_written_on_request_and_training_continues(headway):
    process, run = headway.start(*LONG, "run_dir=run"), headway.folder / "run"
    headway.wait_for(lambda: len(records(run)) >= 3, process)
    process.send_signal(signal.SIGUSR2)
    log = run / "logs" / "rank-1.log"
    headway.wait_for(lambda: "most recent call first" in log.read_text(), process, 10)
    before = len(records(run))
    headway.wait_for(lambda: len(records(run)) > before + 2, process, 20)


# ---------------------------------------------------------------- no process left, no second launcher


def test_ranks_end_with_their_launcher_every_time(headway):
    # F3: five times of five
    run = headway.folder / "run"
    for attempt in range(5):
        process = headway.start(*SAVED, "run_dir=run")
        headway.wait_for(lambda attempt=attempt: len(records(run)) > 2 + 3 * attempt, process)
        ranks, launcher = pids(run), int((run / "run.lock").read_text().split()[0])
        os.kill(launcher, signal.SIGKILL)
        end = time.monotonic() + 5
        while any(map(alive, ranks)) and time.monotonic() < end:
            time.sleep(0.01)
        assert not any(map(alive, ranks)), attempt
        process.wait(timeout=10)


def test_a_stopped_rank_is_found_within_the_limit_plus_five_seconds_and_restarted(headway):
    # F4: at a limit of 5 s its stack is shown after 6 s at most
    overrides = ("launch.processes=2", "launch.hang_s=5", "launch.restarts=1", "train.tokens=25600")
    process = headway.start(*overrides, "run_dir=run")
    run = headway.folder / "run"
    headway.wait_for(lambda: len(records(run)) >= 8, process)
    began = time.monotonic()
    stopped = pids(run)[1]
    os.kill(stopped, signal.SIGSTOP)
    log = run / "logs" / "rank-0.log"
    headway.wait_for(lambda: "most recent call first" in log.read_text(), process, 30)
    assert time.monotonic() - began <= 6
    headway.wait_for(lambda: not alive(stopped), process, 30)
    assert time.monotonic() - began <= 5 + 5
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    assert "rank 1" in stdout and "it is stopped (SIGSTOP" in stdout and "restarting the ranks" in stdout


def test_two_launchers_on_one_folder_cannot_both_write(headway):
    first, second = (headway.start(*LONG, "run_dir=run") for _ in range(2))
    end = time.monotonic() + 30
    while first.poll() is None and second.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    refused, other = (first, second) if first.poll() is not None else (second, first)
    assert refused.returncode == 64 and "a live run holds this folder" in refused.communicate()[1]
    assert other.poll() is None


def test_an_address_in_use_is_reported_before_anything_starts(headway):
    # F29; hosts that are missing or cannot be reached: tests/launcher/hosts/test_launch_connect.py
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        began = time.monotonic()
        done = headway.train(f"launch.port={taken.getsockname()[1]}")
    assert done.returncode == 64 and re.search(r"launch\.port: \d+ is taken", done.stderr)
    assert time.monotonic() - began < 15


def test_torchrun_leaves_no_folder_behind_when_it_is_killed(headway_alone, tmp_path):
    # F24
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"], before = str(temporary), os.environ.get("TMPDIR")
    try:
        process, run = headway_alone.start(*LONG, "run_dir=run"), headway_alone.folder / "run"
        headway_alone.wait_for(lambda: len(records(run)) >= 1, process)
        process.kill()
        process.wait()
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before
    assert list(temporary.iterdir()) == []
