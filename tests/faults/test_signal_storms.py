"""Many signals at once, SIGHUP among them, stop a run or study as one SIGTERM does: saved, status 75, no step lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from run_folders import pids, records, trajectory

STORM = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
LONG = ("train.tokens=102400", "launch.processes=2", "tracking.tensorboard=false", "checkpoint.every_tokens=null")

STUDY = """
study: small
base: tiny.yaml
out: out
match: null
seeds: [1]
variants: {rgqa: {}, gqa: {attention.type: gqa}}
"""


@contextlib.contextmanager
def storm(*targets: int):
    """Send the signals of `STORM` to processes in turn, every few milliseconds, until the context ends."""
    over = threading.Event()

    def blow() -> None:
        for signum in itertools.cycle(STORM):
            for target in targets:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(target, signum)
            if over.wait(0.003):
                return

    thread = threading.Thread(target=blow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def newest(run: Path) -> int:
    return max((int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*")), default=0)


@pytest.mark.parametrize(
    "ranks_too", [pytest.param(False, marks=pytest.mark.slow), True], ids=["launcher", "launcher and ranks"]
)
def test_a_storm_of_signals_loses_no_step_and_ends_with_75(headway_alone, ranks_too):
    run = headway_alone.folder / "run"
    process = headway_alone.start(*LONG, "run_dir=run")
    headway_alone.wait_for(lambda: len(records(run)) >= 3, process)
    with storm(process.pid, *(pids(run, 2) if ranks_too else [])):
        _, stderr = process.communicate(timeout=90)
    assert process.returncode == 75, stderr
    assert stderr.count("stopping: the ranks finish") == 1 and "same command continues" in stderr, stderr
    assert newest(run) == records(run)[-1]["step"] < 400


def test_a_closed_terminal_costs_nothing(headway):
    run = headway.folder / "run"
    assert headway.train("launch.processes=2", "run_dir=whole").returncode == 0
    process = headway.start("launch.processes=2", "run_dir=run")
    headway.wait_for(lambda: len(records(run)) >= 3, process)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and newest(run) == records(run)[-1]["step"], stderr
    assert headway.train("launch.processes=2", "run_dir=run").returncode == 0
    assert trajectory(run) == trajectory(headway.folder / "whole")


def test_nohup_keeps_a_run_alive(headway_alone):
    run = headway_alone.folder / "run"
    command = headway_alone.command("train", str(headway_alone.spec), "train.tokens=5120", "run_dir=run")
    process = subprocess.Popen(["nohup", *command], cwd=headway_alone.folder, stdout=-3, stderr=-3)
    headway_alone.started.append(process)
    headway_alone.wait_for(lambda: len(records(run)) >= 1, process)
    for target in (process.pid, *pids(run, 1)):
        os.kill(target, signal.SIGHUP)
    assert process.wait(timeout=90) == 0 and len(records(run)) == 20


def test_a_storm_of_signals_stops_a_study_in_order(headway_alone):
    folder = headway_alone.folder
    (folder / "study.yaml").write_text(STUDY)
    command = [sys.executable, "-P", "-m", "headway.launcher", "study", "run", "study.yaml", "train.tokens=102400"]
    command += ["checkpoint.every_tokens=null", "--jobs", "2"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    headway_alone.started.append(process)
    runs = [folder / "out/cells" / variant / "seed-1" for variant in ("rgqa", "gqa")]
    end = time.monotonic() + 90
    while any(len(records(run)) < 3 for run in runs) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    with storm(process.pid):
        said, _ = process.communicate(timeout=90)
    assert process.returncode == 75, said
    for run in runs:
        assert newest(run) == records(run)[-1]["step"] < 400, said
    assert said.count("the running 2 cells stop") == 1
