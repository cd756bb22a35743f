"""`model.branch_start`: every run records how strongly its branches start, and a target sets it on every layout."""

import json
import shutil
import subprocess
import sys

import pytest

from headway.launcher.run.run_dir import RunDir, identity, spec_hash
from headway.launcher.spec.load import load_spec

LAYOUTS = {
    "one": (),
    "data": ("launch.processes=2", "train.micro_batch=1"),
    "stages": ("launch.processes=4", "parallel.tensor=2", "parallel.pipeline=2"),
    "sequence": ("launch.processes=2", "parallel.context=2"),
    "zero3": ("launch.processes=2", "parallel.zero=3", "parallel.precision=bf16"),
}
SHORT = ("train.tokens=1024", "train.validate_every_tokens=1024", "checkpoint.every_tokens=512")


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def runs(headway_once):
    """One training under a target, in every layout."""
    for name, overrides in LAYOUTS.items():
        done = headway_once.train(*overrides, *SHORT, f"run_dir={name}", "model.branch_start=0.4")
        assert done.returncode == 0, done.stderr
    return headway_once.folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_branch_of_every_layer_starts_with_the_target(runs, layout):
    (start,) = records(runs / layout, "start")
    assert start["step"] == 0 and start["layers"].keys() == {"layer_00", "layer_01"}
    tolerance = 1e-2 if layout == "zero3" else 5e-4  # bf16
    for ratios in start["layers"].values():
        assert ratios["attention"] == pytest.approx(0.4, rel=tolerance) and ratios["mlp"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factors_are_equal_on_every_layout_and_losses_within_rounding(runs, layout):
    assert (runs / layout / "branch_start.json").read_bytes() == (runs / "one" / "branch_start.json").read_bytes()
    tolerance = 5e-3 if layout == "zero3" else 1e-5
    for one, other in zip(records(runs / "one", "train"), records(runs / layout, "train"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=tolerance)


def test_a_run_as_drawn_records_its_start_and_needs_no_factors(headway):
    done = headway.train(*SHORT, "run_dir=drawn")
    assert done.returncode == 0, done.stderr
    (start,) = records(headway.folder / "drawn", "start")
    assert all(ratio > 0 for layer in start["layers"].values() for ratio in layer.values())
    assert not (headway.folder / "drawn" / "branch_start.json").exists()


def test_a_resumed_run_keeps_its_factors_and_its_one_record_of_the_start(headway):
    assert headway.train(*SHORT, "run_dir=whole", "model.branch_start=0.4").returncode == 0
    folder = headway.folder / "cut"
    shutil.copytree(headway.folder / "whole", folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000004", ignore_errors=True)
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    shutil.rmtree(last)
    before = (folder / "branch_start.json").read_bytes()
    done = headway.train(*SHORT, "run_dir=cut", "model.branch_start=0.4")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and (folder / "branch_start.json").read_bytes() == before
    assert len(records(folder, "start")) == 1
    losses = [[r["loss"] for r in records(headway.folder / name, "train")] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_a_run_folder_of_before_the_key_existed_goes_on(headway):
    spec = load_spec(headway.spec).spec
    run = RunDir(headway.folder / "older")
    run.adopt(spec)
    older = json.loads(run.spec.read_text())
    assert older["model"].pop("branch_start") == "as_drawn"
    run.spec.write_text(json.dumps(older))
    run.adopt(spec)  # no SpecError
    newer = spec.model_dump(mode="json")
    assert identity(newer) == identity(older) and spec_hash(newer) == spec_hash(older)
    for section, key in (("init", "run"), ("checkpoint", "keep_at_tokens")):
        older[section].pop(key)
    run.spec.write_text(json.dumps(older))
    run.adopt(spec)
    assert spec_hash(newer) == spec_hash(older)
    newer["model"]["branch_start"] = 0.4
    assert spec_hash(newer) != spec_hash(older)


def test_a_rank_ends_without_the_teardown_of_its_interpreter():
    """A thread of gloo has aborted ranks there, after all their work. What they printed arrives."""
    code = (
        "import atexit\n"
        "from headway.launcher.train.worker import leave\n"
        "atexit.register(print, 'teardown')\n"
        "print('done', end='')\n"
        "leave(75)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (75, "done", "")
