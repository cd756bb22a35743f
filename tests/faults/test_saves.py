"""Interrupted saves and full disks never lose the newest complete checkpoint and never end training."""

import pytest
from run_folders import trajectory
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headway.parallel.manifest import steps_on_disk

EACH = ("save:begin", "save:after_file", "load:after_verify")
FIRST = (
    *("save:before_manifest", "save:after_manifest", "save:after_rename"),
    *("retention:before_delete", "retention:after_manifest"),
)
COMMON = ("launch.processes=2", "train.tokens=25600", "checkpoint.keep=1")


@pytest.mark.parametrize("ranks", [(1,), pytest.param((0, 1), marks=pytest.mark.slow)], ids=["one", "each"])
def test_a_kill_at_any_point_of_a_save_loses_only_that_save(headway, ranks):
    # F2: eight points. Points that every rank passes are tested on `ranks`, the others on rank 0, which passes them.
    assert headway.train(*COMMON, "run_dir=whole").returncode == 0
    run, reached = headway.folder / "cut", 0
    points = [f"{name}@{rank}" for name in EACH[:2] for rank in ranks] + [f"{name}@0" for name in FIRST]
    points += [f"{EACH[2]}@{rank}" for rank in ranks]
    for number, point in enumerate(points):
        fault = {"HEADWAY_FAULT": f"{point}#{1 if point.startswith('load') else 2}:kill"}
        done = headway.train(*COMMON, "run_dir=cut", env={**headway.environment(), **fault})
        assert done.returncode not in (0, 64, 74), (point, done.stdout[-500:], done.stderr)
        assert f"rank {point[-1]}" in done.stderr, (point, done.stderr)
        newest = int(steps_on_disk(run / "checkpoints")[0].name[-4:])
        assert newest > reached or point.startswith("load"), point
        assert "checkpoint skipped" not in done.stdout, point
        if number and not point.startswith("load"):
            assert f"(step {reached}/" in done.stdout, point
        reached = newest
    done = headway.train(*COMMON, "run_dir=cut")
    assert done.returncode == 0, done.stderr
    assert trajectory(run) == trajectory(headway.folder / "whole")
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-0000000100"]


@pytest.mark.parametrize(
    "point",
    ["save:begin@0", "save:begin@1", "save:after_file@1", "save:before_manifest@0", "save:after_manifest@0"],
)
def test_a_save_without_disk_space_fails_on_all_ranks_and_training_continues(headway, point):
    # F6: data on either rank, the manifest, the rename
    env = {**headway.environment(), "HEADWAY_FAULT": f"{point}#2:enospc"}
    done = headway.train("launch.processes=2", "run_dir=full", "train.tokens=5120", env=env)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "checkpoint" in line.lower()]
    assert "checkpoint of step 5 written" in said[0]
    assert "CHECKPOINT OF STEP 10 FAILED (1 in a row)" in said[1] and "No space left" in said[1]
    assert "the last whole one is of step 5" in said[1] and "checkpoint of step 15 written" in said[2]
    folder = headway.folder / "full" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-0000000015", "step-0000000020"]
    shown = EventAccumulator(str(headway.folder / "full" / "tensorboard"))
    shown.Reload()
    failures = [(event.step, event.value) for event in shown.Scalars("checkpoint/failed_in_a_row")]
    assert failures == [(5, 0), (10, 1), (15, 0), (20, 0)]


def test_saves_that_never_succeed_end_the_run_with_74(headway):
    faults = ";".join(f"save:begin@1#{n}:enospc" for n in range(2, 9))
    env = {**headway.environment(), "HEADWAY_FAULT": faults}
    done = headway.train("launch.processes=2", "run_dir=full", env=env)
    assert done.returncode == 74 and "it continues from step 5" in done.stderr, done.stderr
    assert [p.name for p in (headway.folder / "full" / "checkpoints").iterdir()] == ["step-0000000005"]
    again = headway.train("launch.processes=2", "run_dir=full", "checkpoint.every_tokens=null")
    assert again.returncode == 0 and "(step 5/40)" in again.stdout


def test_checkpoints_and_logs_may_be_links_to_folders_elsewhere(headway):
    run, disk = headway.folder / "runs" / "tiny", headway.folder / "disk"
    run.mkdir(parents=True)
    for name in ("checkpoints", "logs"):
        (disk / name).mkdir(parents=True)
        (run / name).symlink_to(disk / name)
    options = ("train.tokens=2560", "checkpoint.every_tokens=1280")
    fault = {**headway.environment(), "HEADWAY_FAULT": "save:after_rename#2:kill"}
    assert headway.train(*options, "launch.restarts=0", env=fault).returncode != 0
    again = headway.train(*options)
    assert again.returncode == 0 and "resumed from" in again.stdout
    assert (disk / "checkpoints" / "step-0000000010").is_dir() and (disk / "logs" / "rank-0.log").is_file()
    assert (run / "checkpoints").is_symlink() and (run / "logs").is_symlink()


def test_a_staging_link_is_named_by_a_run_with_what_to_do(headway):
    checkpoints = headway.folder / "runs" / "tiny" / "checkpoints"
    checkpoints.mkdir(parents=True)
    left = checkpoints / ".staging-0000000003"
    left.symlink_to(headway.folder)
    options = ("train.tokens=2560", "checkpoint.every_tokens=1280")
    done = headway.train(*options)
    assert done.returncode == 74 and headway.spec.is_file()
    assert f"{left.name}: a link" in done.stderr and "Move it elsewhere, then start the same command" in done.stderr
    assert "Free space" not in done.stdout + done.stderr
    left.unlink()
    assert headway.train(*options).returncode == 0
