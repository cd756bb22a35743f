"""`init.run`: a run that continues another run's checkpoint under another end of the schedule."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from run_folders import records, steps_done, trajectory

from headway.launcher.run.branching import hash_of
from headway.parallel.manifest import read_manifest

# The parent of 40 steps never decays. A branch of 20 steps decays over its last 4, from step 17 on.
STABLE = ("schedule.decay_fraction=0", "checkpoint.keep=1", "checkpoint.keep_at_tokens=[2560,3900]")
SHORT = ("train.tokens=5120", "schedule.decay_fraction=0.2")


def checkpoints(run: Path) -> dict[int, Path]:
    return {int(path.name.removeprefix("step-")): path for path in sorted((run / "checkpoints").glob("step-*"))}


def tensors(run: Path, step: int) -> dict[str, str]:
    """Hash of each tensor file of a checkpoint: equal if all weights, moments and buffers are."""
    return {name: entry.xxh3_128 for name, entry in read_manifest(checkpoints(run)[step]).files.items()}


@pytest.fixture(scope="module")
def folder(headway_once):
    """`stable`, the parent, and `whole`, trained from its start under the schedule of the branches."""
    for overrides in ((*STABLE, "run_dir=stable"), (*SHORT, "run_dir=whole")):
        done = headway_once.train(*overrides)
        assert done.returncode == 0, done.stderr
    return headway_once.folder


@pytest.mark.parametrize("step", [10, 16])
def test_a_branch_before_the_decay_equals_a_run_trained_from_its_start(folder, headway_once, step):
    name = f"branch-{step}"
    done = headway_once.train(*SHORT, f"init.run=stable@{step}", f"run_dir={name}")
    assert done.returncode == 0, done.stderr
    run, whole = folder / name, folder / "whole"
    assert f"branched from stable/checkpoints/step-{step:010d} (step {step}/20)" in done.stdout
    assert f"branch     of stable after step {step}" in done.stdout and "note" not in done.stdout
    assert trajectory(run)[:20] == trajectory(whole)[:20] and len(records(run)) == 20
    assert records(run, "validation")[-1]["loss"] == records(whole, "validation")[-1]["loss"]
    assert tensors(run, 20) == tensors(whole, 20)
    assert records(run, "start") == records(whole, "start") and len(records(run, "heads")) == len(
        records(whole, "heads")
    )
    (event,) = records(run, "branch")
    assert event["step"] == step and event["path"] == "stable" and event["note"] is None
    assert event["run"] == json.loads((folder / "stable" / "run_id.json").read_text())
    stored = json.loads((run / "spec.json").read_text())
    assert stored["init"]["sha256"] == event["sha256"] == hash_of(checkpoints(folder / "stable")[step])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["resumes"] == 0
    parent_s = records(folder / "stable")[step - 1]["train_s"]
    assert summary["train_s"] > parent_s == records(run)[step - 1]["train_s"]


def test_keep_at_tokens_keeps_the_checkpoints_of_the_steps_that_reach_them(folder):
    # 3900 tokens lie within step 16. `every_tokens` saves every 5 steps, of which `keep: 1` leaves the last.
    assert list(checkpoints(folder / "stable")) == [10, 16, 40]


def test_a_branch_that_was_interrupted_goes_on_without_its_parent(folder, headway):
    shutil.copytree(folder / "stable", headway.folder / "stable")
    command = (*SHORT, "init.run=stable@10", "run_dir=cut")
    process = headway.start(*command, "checkpoint.every_tokens=null")
    run = headway.folder / "cut"
    headway.wait_for(lambda: steps_done(run) >= 12, process)
    os.kill(int((run / "logs" / "rank-0.pid").read_text()), signal.SIGKILL)  # before a checkpoint of its own
    process.communicate(timeout=60)
    assert checkpoints(run) == {}
    done = headway.train(*command)  # starts from the parent again
    assert done.returncode == 0 and "branched from" in done.stdout, done.stderr
    assert list(checkpoints(run)) == [15, 20]
    shutil.rmtree(checkpoints(run)[20])
    (run / "summary.json").unlink()
    shutil.rmtree(headway.folder / "stable")
    again = headway.train(*command)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout and "(step 15/20)" in again.stdout
    assert "branch     of stable after step 10" in again.stdout
    assert trajectory(run)[:20] == trajectory(folder / "whole")[:20] and len(records(run)) == 20
    assert tensors(run, 20) == tensors(folder / "whole", 20) and len(records(run, "branch")) == 1
    assert json.loads((run / "summary.json").read_text())["resumes"] == 1
