"""A stop at an inconvenient moment ends soon, states correctly what is saved, and the run continues later."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from run_folders import records, trajectory

from headway.launcher.base.errors import HeadwayError
from headway.launcher.hosts.faults import CAUSE, PREEMPTED, STOPPED, Ended, explain, stopped
from headway.launcher.hosts.place import Place
from headway.launcher.hosts.processes import become_child
from headway.launcher.hosts.stopping import stoppable
from headway.launcher.run.heartbeat import Heartbeat, beat_file, read_beat
from headway.launcher.run.run_dir import RunDir

HERE = Place(host=0, hosts=1, processes=2, name="here")
COMMON = ("launch.processes=2", "run_dir=run", "tracking.tensorboard=false")


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    return run


# ---------------------------------------------------------------- stops during other work


def test_a_stop_during_validation_or_a_save_ends_soon_and_loses_nothing(headway):
    # F5: validation of 50,000 tokens takes about a second here; the save is delayed by a second.
    common = (*COMMON, "train.validation_tokens=51200", "train.validate_every_tokens=5120")
    run = headway.folder / "run"

    def section() -> str:
        beat = read_beat(beat_file(run / "logs", 0))
        return beat.section if beat is not None else ""

    process = headway.start(*common)
    headway.wait_for(lambda: section() == "validate", process)
    steps = len(records(run))
    stop(process, signal.SIGTERM)
    assert records(run)[-1]["step"] == steps + 1 and newest(run) == steps + 1

    os.environ["HEADWAY_FAULT"] = "save:begin@0#1:sleep=1"
    try:
        process = headway.start(*common)
    finally:
        del os.environ["HEADWAY_FAULT"]
    headway.wait_for(lambda: list((run / "checkpoints").glob(".staging-*")), process)
    stop(process, signal.SIGUSR1)
    assert newest(run) == records(run)[-1]["step"] > steps + 1
    assert not list((run / "checkpoints").glob(".staging-*"))

    assert headway.train(*common).returncode == 0
    assert headway.train(*common[:1], *common[2:], "run_dir=whole").returncode == 0
    assert trajectory(run) == trajectory(headway.folder / "whole")


def stop(process: subprocess.Popen, signum: int) -> None:
    began = time.monotonic()
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, stderr
    assert time.monotonic() - began < 30


def newest(run) -> int:
    return max(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*"))


def test_a_stop_between_two_starts_ends_the_launcher_at_once(headway):
    env = {"HEADWAY_FAULT": "save:begin@1#1:kill"}
    os.environ |= env
    try:
        process = headway.start(*COMMON, "launch.restarts=3")
    finally:
        del os.environ["HEADWAY_FAULT"]
    attempts = headway.folder / "run" / "logs" / "attempts.jsonl"
    headway.wait_for(lambda: attempts.exists() and len(attempts.read_text().splitlines()) == 2, process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)  # it waits for two seconds now
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == PREEMPTED and "stopped by SIGTERM while no ranks ran" in stderr, stderr
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_stop_before_the_ranks_are_started_exits_with_75(signum):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Ended) as ended, stoppable():
        os.kill(os.getpid(), signal.SIGUSR2)  # requests the stacks of ranks, but no ranks run
        os.kill(os.getpid(), signum)
        time.sleep(5)
    assert ended.value.exit_code == PREEMPTED and not ended.value.fault.again
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------- messages and exit statuses


@pytest.mark.parametrize(
    ("beats", "saved", "code", "words"),
    [
        ([("setup", 0), ("setup", 0)], 0, PREEMPTED, "no step is lost, and the same command continues from step 0"),
        ([("data", 1), ("step", 1)], 0, PREEMPTED, "continues from step 0"),
        ([("step", 8), ("data", 9)], 5, 70, "steps 6 to 8 are lost, and the same command continues from step 5"),
        ([("save", 8), ("save", 8)], 5, 70, "steps 6 to 8 are lost"),
        ([("save", 8), ("save", 8)], 8, PREEMPTED, "no step is lost, and the same command continues from step 8"),
        ([], 8, PREEMPTED, "continues from step 8"),
    ],
)
def test_a_stop_with_killed_ranks_exits_with_75_only_if_no_step_is_lost(run, beats, saved, code, words):
    for rank, (section, step) in enumerate(beats):
        heart = Heartbeat(beat_file(run.logs, rank), rank)
        heart.beat("step", 1)  # so that the next beat is not in the first step
        heart.beat(section, step)
    if saved:
        (run.checkpoints / f"step-{saved:010d}").mkdir(parents=True)
    for fault in (stopped(run, HERE, "and killed"), explain(run, HERE, 1, signalled=True, died={})):
        assert fault.code == code and fault.weight == STOPPED and not fault.again and words in fault.text


@pytest.mark.parametrize(("section", "again"), [("setup", False), ("first step", False), ("step", True)])
def test_an_error_before_the_first_step_is_not_retried(run, section, again):
    heart = Heartbeat(beat_file(run.logs, 0), 0)
    for _ in range({"setup": 0, "first step": 1, "step": 2}[section]):
        heart.beat("step", 1)
    report = {"rank": 0, "exit_code": None, "type": "RuntimeError", "message": "no such device"}
    (run.logs / "rank-0.error.json").write_text(json.dumps(report))
    fault = explain(run, HERE, 1, signalled=False, died={})
    assert fault.again is again and fault.weight == CAUSE and fault.code == HeadwayError.exit_code
    assert (
        explain(run, HERE, 1, signalled=False, died={1: -9}).again is again
    )  # reported by a peer that lost the connection
    (run.logs / "rank-0.error.json").unlink()
    assert explain(run, HERE, 1, signalled=False, died={1: -9}).again  # killed: a restart may help


def test_processes_between_launcher_and_ranks_ignore_usr_signals():
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], preexec_fn=become_child)
    try:
        for signum in (signal.SIGUSR1, signal.SIGUSR2):
            child.send_signal(signum)
        time.sleep(0.2)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
