"""`train.validate_first` validates before the first step, once, and changes nothing else."""

import json
import math

import pytest
from run_folders import trajectory

from headway.launcher.run.record_check import RecordCheck, check_records
from headway.launcher.run.records import read_run
from headway.launcher.run.run_dir import RunDir, spec_hash
from headway.launcher.spec.load import load_spec

OPTIONS = ("train.tokens=5120", "checkpoint.every_tokens=1280", "train.validate_every_tokens=1280")


def test_the_first_validation_is_at_step_0_and_training_is_the_same(headway):
    for name, value in (("with", "true"), ("without", "false")):
        done = headway.train(*OPTIONS, f"train.validate_first={value}", f"run_dir={name}")
        assert done.returncode == 0, done.stderr
    found, plain = (RunDir(headway.folder / name) for name in ("with", "without"))
    first, *others = [r for r in found.read_metrics() if r["kind"] == "validation"]
    assert (first["step"], first["tokens"], first["train_s"]) == (0, 0, 0.0)
    vocabulary = json.loads(found.spec.read_text())["model"]["vocab_size"]
    assert first["loss"] == pytest.approx(math.log(vocabulary), abs=0.2)
    assert [r["loss"] for r in others] == [r["loss"] for r in plain.read_metrics() if r["kind"] == "validation"]
    assert [r for r in trajectory(found.path) if r[:1] != (0,)] == trajectory(plain.path)
    assert read_run(found.path).validation.tokens.tolist() == [0, 1280, 2560, 3840, 5120]


@pytest.mark.parametrize("fault", ["save:begin#1:kill", "save:after_rename#2:kill"])
def test_a_resume_does_not_repeat_the_first_validation(headway, fault):
    run = RunDir(headway.folder / "runs" / "tiny")
    options = (*OPTIONS, "train.validate_first=true")
    assert headway.train(*options, "launch.restarts=0", env={"HEADWAY_FAULT": fault}).returncode != 0
    assert not run.is_complete() and any(r["kind"] == "validation" for r in run.read_metrics())
    assert headway.train(*options).returncode == 0
    assert [r["step"] for r in run.read_metrics() if r["kind"] == "validation"] == [0, 5, 10, 15, 20]
    assert check_records(run.path) == RecordCheck(checked=True)


def test_runs_of_versions_without_the_key_keep_their_hash(headway):
    spec = load_spec(headway.spec).spec.model_dump(mode="json")
    older = json.loads(json.dumps(spec))
    del older["train"]["validate_first"]
    assert spec_hash(older) == spec_hash(spec)
    spec["train"]["validate_first"] = True
    assert spec_hash(older) != spec_hash(spec)
