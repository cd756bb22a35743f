"""Budgets of a study: what is planned, in which order it runs, and that a branch gives the numbers of a whole run.

Training is played by a script, except in the tests at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from played_study import BASE, Folder, play
from run_folders import records, steps_done, trajectory

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.cli.main import main
from headway.launcher.run.run_dir import read_mapping
from headway.launcher.spec.load import load_spec
from headway.launcher.study import run as study_module
from headway.launcher.study.config import load_study
from headway.launcher.study.probe_config import load_probe
from headway.launcher.study.run import run_study

WSD = BASE.replace("optimizer:", "schedule: {decay_fraction: 0.4}\noptimizer:").replace("tokens: 2560", "tokens: 5120")
"""20 steps of 256 tokens. Budget 0.5 has 10 steps, 7 without decay; budget 0.25 has 5, 4 of them without decay."""

ONE_SEED = ["gqa/seed-1", "gqa/seed-1.budget-0.25", "gqa/seed-1.budget-0.5"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Folder(tmp_path)
    (tmp_path / "base.yaml").write_text(WSD)
    made.rewrite("seeds: [1, 2]", "seeds: [1, 2]\nbudgets: [1, 0.25, 0.5]")
    return made


@pytest.fixture
def played(folder, monkeypatch):
    play(monkeypatch)
    monkeypatch.setattr(study_module, "_report", lambda out: out / "report.html")
    return folder


def base(folder: Folder, old: str, new: str) -> None:
    assert old in WSD
    (folder.path / "base.yaml").write_text(WSD.replace(old, new))


# ---------------------------------------------------------------- planning


def test_the_budgets_of_a_variant_follow_its_full_run(folder):
    plan = folder.plan()
    keys = [c.key for c in plan.cells]
    assert keys[:6] == [*ONE_SEED, *(key.replace("gqa", "routed") for key in ONE_SEED)]
    assert keys[6:] == [key.replace("seed-1", "seed-2") for key in keys[:6]]
    assert [c.spec.run_dir for c in plan.cells] == [f"studies/small/cells/{key}" for key in keys]
    assert len({c.spec.name for c in plan.cells}) == len(keys)
    assert [c.budget for c in plan.cells[:3]] == [1.0, 0.25, 0.5]


def test_a_smaller_budget_is_the_end_of_its_own_schedule_on_a_checkpoint_of_the_full_run(folder):
    full, quarter, half = folder.plan().cells[:3]
    assert [c.spec.steps for c in (full, quarter, half)] == [20, 5, 10]
    assert full.spec.init.run is None
    assert full.spec.checkpoint.keep_at_tokens == (4 * 256, 7 * 256)
    assert quarter.spec.init.run == "studies/small/cells/gqa/seed-1@4"
    assert half.spec.init.run == "studies/small/cells/gqa/seed-1@7"
    assert quarter.spec.checkpoint.keep_at_tokens == half.spec.checkpoint.keep_at_tokens == ()
    assert half.spec.schedule == full.spec.schedule
    assert half.whole is not None and half.whole.spec.init.run is None
    assert half.whole.spec.model_copy(update={"init": half.spec.init}) == half.spec


def test_the_full_runs_of_a_study_are_the_same_runs_without_budgets(folder):
    """A study that was trained before it had budgets keeps its cells."""
    from headway.launcher.run.run_dir import identity

    with_budgets = [c for c in folder.plan().cells if c.budget == 1]
    folder.rewrite("budgets: [1, 0.25, 0.5]\n", "")
    without = folder.plan().cells
    assert [c.key for c in with_budgets] == [c.key for c in without]
    assert [identity(c.resolved()) for c in with_budgets] == [identity(c.resolved()) for c in without]
    assert {c.spec.checkpoint.keep_at_tokens for c in without} == {()}


def test_the_overrides_of_every_cell_make_its_spec_on_a_command_line(folder):
    base(folder, "train: {", "checkpoint: {keep_at_tokens: [512, 1024]}\ntrain: {")
    plan = folder.plan("train.tokens=7680")
    for cell in plan.cells:
        assert load_spec(plan.study.base, cell.overrides).spec == cell.spec
    assert plan.cells[0].spec.steps == 30
    assert plan.cells[0].spec.checkpoint.keep_at_tokens == (512, 1024, 5 * 256, 10 * 256)


def test_budgets_are_rounded_up_to_whole_steps_without_errors_of_floats(folder):
    folder.rewrite("[1, 0.25, 0.5]", "[0.07, 0.1, 0.26, 1]")  # in floats 0.07 x 100 is 7.000000000000001
    assert [c.spec.steps for c in folder.plan("train.tokens=25600").cells[:4]] == [100, 7, 10, 26]
    assert [c.spec.steps for c in folder.plan("train.tokens=25500").cells[:4]] == [100, 7, 10, 26]


def test_a_budget_is_a_fraction_of_the_tokens_of_its_variant(folder):
    folder.rewrite("attention.top_k: 1}", "attention.top_k: 1, train.tokens: 10240}")
    assert {(c.variant, c.budget): c.spec.steps for c in folder.plan().cells} == {
        **{("gqa", 1.0): 20, ("gqa", 0.25): 5, ("gqa", 0.5): 10},
        **{("routed", 1.0): 40, ("routed", 0.25): 10, ("routed", 0.5): 20},
    }


def test_cosine_schedules_are_trained_from_their_start(folder, capsys):
    base(folder, "{decay_fraction: 0.4}", "{type: cosine}")
    cells = folder.plan("train.tokens=20480").cells
    assert {c.spec.init.run for c in cells} == {None} and {c.whole for c in cells} == {None}
    assert {c.spec.checkpoint.keep_at_tokens for c in cells} == {()}
    run_study(folder.study, ["train.tokens=20480"], dry_run=True)
    shown = capsys.readouterr().out
    assert "budget 0.5: 10,240 tokens, 40 steps; cosine: trained from its start" in shown
    assert "the budgets add 240 steps to the 320 steps of the full runs (+75.0%)" in shown


def test_a_schedule_without_decay_leaves_a_step_to_train(folder):
    base(folder, "decay_fraction: 0.4", "decay_fraction: 0")
    assert [c.branch_step for c in folder.plan().cells[:3]] == [0, 4, 9]


def test_the_design_says_where_budgets_begin_and_what_they_cost(folder, capsys):
    assert run_study(folder.study, dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "2 variants x 2 seeds x 3 budgets = 12 cells" in shown
    assert "budget 0.25: 1,280 tokens, 5 steps: continues its full run at step 4, 1 to train" in shown
    assert "budget 0.5: 2,560 tokens, 10 steps: continues its full run at step 7, 3 to train" in shown
    assert "the budgets add 16 steps to the 80 steps of the full runs (+20.0%)" in shown
    assert shown.count("init.run=studies/small/cells/") == 8
    assert not folder.out.exists()


def test_given_weights_are_those_of_the_full_run_only(folder):
    base(folder, "train: {", "init: {weights: given}\ntrain: {")
    full, quarter, _ = folder.plan().cells[:3]
    assert (full.spec.init.weights, full.spec.init.run) == ("given", None)
    assert (quarter.spec.init.weights, quarter.spec.init.run) == (None, "studies/small/cells/gqa/seed-1@4")
    assert quarter.whole is not None and quarter.whole.spec.init == full.spec.init
    assert quarter.spec.model.branch_start == full.spec.model.branch_start


@pytest.mark.parametrize(
    ("budgets", "says"),
    [
        ("[0.5]", "budget 1, the full run, is missing; write [0.5, 1]"),
        ("[0.5, 0.5, 1]", "given twice"),
        ("[0, 1]", "above 0 and up to 1"),
        ("[0.5, 1, 2]", "above 0 and up to 1"),
        ("[.nan, 1]", "budgets"),
        ("[]", "budgets"),
        ("half", "budgets"),
        ("[0.5, 0.46, 1]", "0.5 of variant gqa is 10 steps (2,560 tokens), and so is budget 0.46"),
        ("[0.96, 1]", "20 steps (5,120 tokens), and so is budget 1.0"),
    ],
)
def test_budgets_that_are_not_possible_are_one_located_message(folder, budgets, says):
    folder.rewrite("[1, 0.25, 0.5]", budgets)
    with pytest.raises((SpecError, NoInputError)) as error:
        folder.plan()
    assert says in str(error.value) and "small.yaml:6:" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "decay_fraction: 0.4",
            "warmup_tokens: 1280",
            "0.25 of variant gqa is 5 steps (1,280 tokens), which ends with",
        ),
        ("top_k: 1}", "top_k: 1, attention.k_schedule: [{until_tokens: 2048, top_k: 2}]}", "attention.k_schedule"),
        ("train: {", "init: {run: other@3}\ntrain: {", "variant gqa has init.run"),
    ],
)
def test_a_spec_that_is_too_short_at_a_budget_is_refused_with_the_budget(folder, old, new, says):
    if old in WSD:
        base(folder, old, new)
    else:
        folder.rewrite(old, new)
    with pytest.raises(SpecError) as error:
        folder.plan()
    assert says in str(error.value) and "small.yaml:6:1: budgets: " in str(error.value)


def test_an_argument_cannot_set_budgets(folder):
    with pytest.raises(SpecError, match="budgets belongs to the study"):
        folder.plan("budgets=[1]")


def test_probe_tasks_have_no_budgets(folder):
    folder.rewrite("variants:", "tasks: {copy: {data.source.task: copy}}\nvariants:")
    with pytest.raises(SpecError, match="probe tasks are compared at their full length"):
        load_probe(folder.study)
    folder.rewrite("[1, 0.25, 0.5]", "[1]")
    assert load_probe(folder.study).tasks["copy"].config.budgets == [1.0]


def test_study_json_holds_the_budget_of_every_cell(played):
    run_study(played.study)
    record = read_mapping(played.out / "study.json")
    assert record["budgets"] == [0.25, 0.5, 1.0]
    cells = {cell["run_dir"]: cell for cell in record["cells"]}
    assert [cell["budget"] for cell in record["cells"][:3]] == [1.0, 0.25, 0.5]
    half = cells["cells/gqa/seed-1.budget-0.5"]
    assert (half["variant"], half["seed"], half["spec"]["train"]["tokens"]) == ("gqa", 1, 2560)
    assert half["spec"]["init"]["run"] == "studies/small/cells/gqa/seed-1@7"
    assert "init.run=studies/small/cells/gqa/seed-1@7" in half["overrides"]


def test_a_study_without_budgets_says_so_in_study_json(played):
    played.rewrite("budgets: [1, 0.25, 0.5]\n", "")
    run_study(played.study)
    record = read_mapping(played.out / "study.json")
    assert record["budgets"] == [1.0] and {cell["budget"] for cell in record["cells"]} == {1.0}


# ---------------------------------------------------------------- running


def test_full_runs_come_before_their_budgets_and_nothing_is_trained_twice(played):
    assert run_study(played.study) == 0
    cells = sorted(played.plan().cells, key=lambda c: c.budget < 1)  # stable
    assert played.trained() == [c.key for c in cells]
    assert [r["step"] for r in records(played.out / "cells/gqa/seed-1.budget-0.5")] == [8, 9, 10]
    assert (played.out / "logs/gqa.seed-1.budget-0.5.log").is_file()
    assert run_study(played.study) == 0
    assert played.trained() == []


def test_budgets_of_a_failed_full_run_are_not_tried(played, capsys):
    played.behave({"gqa/seed-1": "fail"})
    assert run_study(played.study) == 1
    assert [key for key in played.trained() if key.startswith("gqa/seed-1")] == ["gqa/seed-1"]
    outcomes = read_mapping(played.out / "outcomes.json")
    for key in ONE_SEED[1:]:
        assert outcomes[key]["exit_code"] == 74 and "its full run failed" in outcomes[key]["last_lines"][-1]
    shown = capsys.readouterr().out
    (row,) = (line for line in shown.splitlines() if line.startswith("gqa/seed-1.budget-0.25"))
    assert "failed" in row and "its full run failed" in row
    played.behave({})
    assert run_study(played.study) == 0
    assert played.trained() == ONE_SEED


def test_budgets_continue_a_checkpoint_that_a_full_run_wrote_before_it_failed(played):
    played.behave({"gqa/seed-1": "late"})
    assert run_study(played.study) == 1
    outcomes = read_mapping(played.out / "outcomes.json")
    assert {key: outcomes[key]["exit_code"] for key in ONE_SEED} == dict(zip(ONE_SEED, [74, 0, 0], strict=True))


@pytest.mark.parametrize("complete", [True, False])
def test_budgets_are_trained_whole_where_the_full_run_has_passed_without_their_checkpoint(played, complete, capsys):
    played.rewrite("budgets: [1, 0.25, 0.5]\n", "")
    run_study(played.study)
    played.trained()
    if not complete:
        (played.out / "cells/gqa/seed-1/summary.json").unlink()
        (played.out / "cells/gqa/seed-1/checkpoints/step-0000000012").mkdir(parents=True)
    played.rewrite("seeds: [1, 2]", "seeds: [1, 2]\nbudgets: [0.25, 0.5, 1]")
    played.behave({} if complete else {"gqa/seed-1": "fail"})
    capsys.readouterr()
    assert run_study(played.study) == (0 if complete else 1)
    shown = capsys.readouterr().out
    assert "note: gqa/seed-1.budget-0.5: its full run has no checkpoint of step 7" in shown
    folder = played.out / "cells/gqa/seed-1.budget-0.5"
    assert [r["step"] for r in records(folder)] == list(range(1, 11))
    record = read_mapping(played.out / "study.json")
    (cell,) = (c for c in record["cells"] if c["run_dir"] == "cells/gqa/seed-1.budget-0.5")
    assert cell["spec"]["init"]["run"] is None and not any("init.run" in word for word in cell["overrides"])
    played.trained()
    played.behave({})
    assert run_study(played.study) == 0  # and they stay as they were trained
    assert played.trained() == ([] if complete else ["gqa/seed-1"])


def test_a_budget_that_was_begun_goes_on_as_it_was_begun(played):
    """Also when the checkpoint of the full run is gone, or is there now."""
    played.behave({"gqa/seed-1.budget-0.5": "late"})
    run_study(played.study)
    shutil.rmtree(played.out / "cells/gqa/seed-1/checkpoints")
    run_study(played.study, dry_run=True)
    study_module.refuse_changed(played.plan())
    from headway.launcher.study.branches import way_of

    (half,) = (c for c in played.plan().cells if c.key == "gqa/seed-1.budget-0.5")
    assert way_of(half).cell.spec.init.run is not None
    spec = read_mapping(half.run_dir / "spec.json")
    spec["init"]["run"] = None
    (half.run_dir / "spec.json").write_text(json.dumps(spec))
    (played.out / "cells/gqa/seed-1/checkpoints/step-0000000007").mkdir(parents=True)
    study_module.refuse_changed(played.plan())
    assert way_of(half).cell.spec.init.run is None


def test_a_hash_that_the_first_start_filled_in_is_no_change(played):
    run_study(played.study)
    path = played.out / "cells/gqa/seed-1.budget-0.5/spec.json"
    spec = read_mapping(path)
    spec["init"]["sha256"] = "a" * 64
    path.write_text(json.dumps(spec))
    study_module.refuse_changed(played.plan())
    base(played, "decay_fraction: 0.4", "decay_fraction: 0.3")
    with pytest.raises(SpecError, match=r"gqa/seed-1\.budget-0\.5: schedule\.decay_fraction"):
        study_module.refuse_changed(played.plan())


def test_a_study_that_is_stopped_in_a_budget_continues_there(played):
    played.behave({"gqa/seed-1.budget-0.5": "start"})

    def interrupt() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and not (played.out / "cells/gqa/seed-1.budget-0.5/spec.json").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert run_study(played.study) == 75
    full = [f"{variant}/seed-{seed}" for seed in (1, 2) for variant in ("gqa", "routed")]
    assert played.trained() == [*full, *ONE_SEED[1:]]
    played.behave({})
    assert run_study(played.study) == 0
    assert played.trained()[0] == "gqa/seed-1.budget-0.5"


def test_status_shows_budgets_as_cells_of_their_own(played, capsys):
    run_study(played.study)
    played.rewrite("[1, 0.25, 0.5]", "[1, 0.5]")
    capsys.readouterr()
    assert main(["study", "status", str(played.study)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:4]] == ["gqa/seed-1", "gqa/seed-1.budget-0.5", "routed/seed-1"]
    assert shown[2].split()[1:5] == ["done", "2,560", "2.9000", "3.0000"]
    assert "not in the study any more: gqa/seed-1.budget-0.25, gqa/seed-2.budget-0.25, routed/seed-1" in shown[-1]
    assert main(["study", "status", str(played.study), "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(c["cell"], c["budget"]) for c in cells[:2]] == [("gqa/seed-1", 1.0), ("gqa/seed-1.budget-0.5", 0.5)]


def test_a_study_with_budgets_can_be_removed(played):
    run_study(played.study)
    assert main(["rm", str(played.out), "--yes"]) == 0
    assert not played.out.exists()


# ---------------------------------------------------------------- for real


@pytest.fixture
def trained(folder, headway, monkeypatch):
    """The study with budget 0.5, whose cells are trained by `headway train` from the fork server."""
    folder.rewrite("[1, 0.25, 0.5]", "[0.5, 1]")
    for key, value in headway.environment().items():
        monkeypatch.setenv(key, value)
    return folder


def whole_run(folder: Folder, headway, key: str) -> Path:
    """A run of the same spec, trained from its start without the study."""
    (cell,) = (c for c in folder.plan().cells if c.key == key)
    assert cell.whole is not None and cell.spec.init.run is not None
    overrides = [word for word in cell.whole.overrides if not word.startswith("run_dir=")]
    done = headway.run("train", str(folder.path / "base.yaml"), *overrides, "run_dir=whole")
    assert done.returncode == 0, done.stderr
    return folder.path / "whole"


def test_a_budget_has_the_numbers_of_a_run_from_its_start_in_every_bit(trained, headway):
    assert run_study(trained.study) == 0
    rows = {c["cell"]: c for c in study_module.status_record(load_study(trained.study))["cells"]}
    assert len(rows) == 8 and {c["state"] for c in rows.values()} == {"done"}
    assert {c["tokens"] for c in rows.values() if c["budget"] == 0.5} == {2560}
    for key in ("gqa/seed-1.budget-0.5", "routed/seed-2.budget-0.5"):
        run, whole = trained.out / "cells" / key, whole_run(trained, headway, key)
        assert len(records(run, "branch")) == 1 and not records(whole, "branch")
        assert trajectory(run) == trajectory(whole) and steps_done(run) == 10
        assert rows[key]["validation_loss"] == read_mapping(whole / "summary.json")["final_validation_loss"]
        full = trained.out / "cells" / key.removesuffix(".budget-0.5")
        assert records(full)[9]["loss"] != records(run)[9]["loss"]  # the decay makes a difference
        shutil.rmtree(whole)
    assert run_study(trained.study) == 0
    assert {c["state"] for c in study_module.status_record(load_study(trained.study))["cells"]} == {"done"}


def test_a_study_that_is_killed_in_a_branch_continues_in_it(trained, headway, monkeypatch):
    """The full run saves steps 7 and 8; the branch saves step 8 and then sleeps, so that it is killed after it."""
    base(trained, "train: {", "checkpoint: {keep_at_tokens: [2048]}\ntrain: {")
    trained.rewrite("seeds: [1, 2]", "seeds: [1]")
    monkeypatch.setattr(study_module, "_report", lambda out: out / "report.html")
    branch = trained.out / "cells/gqa/seed-1.budget-0.5"
    environment = {**headway.environment(), "HEADWAY_FAULT": "save:after_rename#1:sleep=5"}
    command = headway.command("study", "run", "small.yaml", "--jobs", "1")
    study = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    headway.wait_for(lambda: (branch / "checkpoints/step-0000000008").exists(), study)
    launcher = int((branch / "run.lock").read_text().split()[0])
    study.kill()
    os.kill(launcher, signal.SIGKILL)
    study.wait()
    assert not (branch / "summary.json").exists()
    assert run_study(trained.study) == 0
    assert read_mapping(branch / "summary.json")["resumes"] == 1
    assert [r["step"] for r in records(branch, "resume")] == [8]
    assert trajectory(branch) == trajectory(whole_run(trained, headway, "gqa/seed-1.budget-0.5"))
