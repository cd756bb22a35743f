"""`headway train --extend`: more tokens for a run, equal to a run trained from its start, or the reason why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from run_folders import records, trajectory

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.cli.main import main
from headway.launcher.run.extending import extension
from headway.launcher.spec.load import load_spec

# 20 steps, of which the last 4 decay; checkpoints of steps 5, 10, 15 and 20 are kept.
SHORT = ("train.tokens=5120", "schedule.decay_fraction=0.2", "checkpoint.keep=4")
LONG = ("train.tokens=7680", "schedule.decay_fraction=0.2", "checkpoint.keep=4")


@pytest.fixture(scope="module")
def folder(headway_once):
    for overrides in ((*SHORT, "run_dir=short"), (*LONG, "run_dir=whole")):
        done = headway_once.train(*overrides)
        assert done.returncode == 0, done.stderr
    return headway_once.folder


def test_an_extended_run_equals_one_trained_from_its_start(folder, headway_once):
    before = sorted(path.name for path in (folder / "short" / "checkpoints").iterdir())
    done = headway_once.train(*LONG, "run_dir=short", "--extend")
    assert done.returncode == 0, done.stderr
    assert "extends short from step 15 in short-7680" in done.stderr and "up to step 17" in done.stderr
    assert trajectory(folder / "short-7680") == trajectory(folder / "whole")
    assert len(records(folder / "short-7680")) == 30
    assert sorted(path.name for path in (folder / "short" / "checkpoints").iterdir()) == before
    again = headway_once.train(*LONG, "run_dir=short", "--extend")
    assert again.returncode == 0 and "already complete" in again.stdout
    assert "goes on with short-7680, a branch of short@15" in again.stderr


@pytest.fixture
def spec_of(folder: Path, headway_once, monkeypatch):
    monkeypatch.chdir(folder)
    file = next(folder.glob("*.yaml"))
    return lambda *overrides: load_spec(file, list(overrides)).spec


def test_a_run_without_a_checkpoint_of_its_stable_part_says_what_to_do(folder, spec_of):
    shutil.copytree(folder / "short", folder / "late")
    for step in (5, 10, 15):
        shutil.rmtree(folder / "late" / "checkpoints" / f"step-{step:010d}")
    with pytest.raises(SpecError, match=r"up to step 17 only \(wsd .*: 20\); .*keep_at_tokens=\[4352\]"):
        extension(spec_of(*LONG, "run_dir=late"))


def test_what_cannot_be_extended_is_refused(folder, spec_of):
    with pytest.raises(SpecError, match=r"train.tokens is 5,120, and the run in short has 5,120; give more"):
        extension(spec_of(*SHORT, "run_dir=short"))
    with pytest.raises(NoInputError, match=r"--extend: .*none"):
        extension(spec_of(*LONG, "run_dir=none"))
    with pytest.raises(SpecError, match=r"leave out --extend, or init.run"):
        extension(spec_of(*LONG, "run_dir=short", "init.run=short@5"))


def test_a_run_from_given_weights_is_extended_without_reading_them_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = Path(__file__).parents[3] / "yaml" / "base" / "tiny.yaml"
    begin = ["init.weights=weights", "init.convert.how=mean", f"init.sha256={'a' * 64}"]
    (tmp_path / "runs/tiny/checkpoints/step-0000000005").mkdir(parents=True)
    (tmp_path / "runs/tiny/spec.json").write_text(load_spec(tiny, begin).spec.model_dump_json())
    assert main(["train", str(tiny), *begin, "train.tokens=400000", "--extend", "--print-config", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["init"]["run"] == "runs/tiny@5" and shown["run_dir"] == "runs/tiny-400000"
    assert {shown["init"][key] for key in ("weights", "convert", "sha256")} == {None}


def test_rates_that_depend_on_the_length_from_the_start_are_named(folder, spec_of):
    shutil.copytree(folder / "short", folder / "cosine")
    file = folder / "cosine" / "spec.json"
    spec = spec_of(SHORT[0], "run_dir=cosine", "schedule={type: cosine, warmup_tokens: 512}")
    file.write_text(spec.model_dump_json())
    with pytest.raises(SpecError, match=r"cosine schedule.*use schedule.type: wsd"):
        extension(spec_of(LONG[0], "run_dir=cosine", "schedule={type: cosine, warmup_tokens: 512}"))
