"""A study trains what is missing, never mixes definitions, and goes on past failures and interruptions.

Training itself is played by a small script: these are tests of the study. One test at the end trains for real.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from played_study import BASE, Folder, play

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.cli.main import main
from headway.launcher.compare.cells import cell_state
from headway.launcher.compare.fairness import deviation
from headway.launcher.run.run_dir import flatten
from headway.launcher.study import run as study_module
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import plan_study
from headway.launcher.study.run import refuse_changed, report_study, run_study, status_study

ALL = ["gqa/seed-1", "routed/seed-1", "gqa/seed-2", "routed/seed-2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Folder(tmp_path)
    play(monkeypatch)
    monkeypatch.setattr(study_module, "_report", lambda out: out / "report.html")  # drawn in test_report.py
    return made


# ---------------------------------------------------------------- planning


def test_cells_are_seed_major_and_paired(folder):
    plan = folder.plan()
    assert [c.key for c in plan.cells] == ALL
    for cell in plan.cells:
        assert cell.spec.seed == cell.spec.data.seed == cell.seed
        assert cell.spec.run_dir == f"studies/small/cells/{cell.key}"


def test_sizes_are_matched_to_the_baseline(folder):
    baseline, routed = folder.plan().variants
    assert baseline.matched is None and baseline.free_value == 96
    assert routed.matched is not None
    assert routed.free_value == routed.matched.value
    assert routed.matched.target == baseline.cost.num_params
    assert routed.cost.num_params == routed.matched.cost
    assert {c.spec.model.ffn_width for c in folder.plan().cells if c.variant == "routed"} == {routed.matched.value}


def test_the_overrides_of_a_cell_make_its_spec_on_a_command_line(folder):
    from headway.launcher.spec.load import load_spec

    folder.rewrite("attention.top_k: 1}", "attention: {top_k: 1}}\n  dual: {attention.type: switchhead, "
                   "attention.experts: 2, attention.top_k: 1}")  # fmt: skip
    plan = folder.plan("attention.heads=8", "optimizer.betas=[0.9, 0.99]", "attention.type=gqa")
    assert {c.spec.attention.type for c in plan.cells} == {"gqa", "rgqa", "switchhead"}
    for cell in plan.cells:
        assert load_spec(plan.study.base, cell.overrides).spec == cell.spec


def test_trackers_group_the_cells_of_a_study(folder):
    plan = folder.plan("tracking.wandb.mode=offline", "tracking.mlflow={uri: 'sqlite:///x.db', group: mine}")
    for cell in plan.cells:
        tracking = cell.spec.tracking
        assert tracking.wandb is not None and tracking.wandb.group == "small"
        assert tracking.mlflow is not None and tracking.mlflow.group == "mine"
    assert all(cell.spec.tracking.services == () for cell in folder.plan().cells)


def test_arguments_change_the_base_and_the_variant_wins(folder):
    plan = folder.plan("attention.type=rgqa", "attention.top_k=2", "optimizer.lr=1e-3")
    by_variant = {c.variant: c.spec for c in plan.cells}
    assert by_variant["gqa"].attention.top_k == 2
    assert by_variant["routed"].attention.top_k == 1
    assert {s.optimizer.lr for s in by_variant.values()} == {1e-3}


def test_the_quickstart_study_is_legal_and_matched():
    quickstart = Path(__file__).parents[3] / "yaml" / "quickstart.yaml"
    # a synthetic source with as many tokens needs no dataset
    source = ["data.source.type=synthetic", "data.source.task=copy", "data.source.vocab_size=4096"]
    plan = plan_study(load_study(quickstart), source)
    assert len(plan.cells) == len(plan.study.config.seeds) * len(plan.variants)
    assert {c.spec.attention.type for c in plan.cells} == {"gqa", "rgqa", "switchhead"}
    residuals = [v.matched.residual for v in plan.variants if v.matched]
    assert len(residuals) == len(plan.variants) - 1
    assert plan.study.config.match is not None
    assert max(map(abs, residuals)) <= plan.study.config.match.tolerance


def test_every_variant_starts_alike_unless_a_spec_says_otherwise(folder):
    plan = plan_study(load_study(folder.study))
    assert {cell.spec.model.branch_start for cell in plan.cells} == {0.3}
    assert all("model.branch_start=0.3" in cell.overrides for cell in plan.cells)
    folder.rewrite("seeds: [1, 2]", "seeds: [1, 2]\nbranch_start: zero")
    assert {c.spec.model.branch_start for c in plan_study(load_study(folder.study)).cells} == {"zero"}
    folder.rewrite("routed: {", "routed: {model.branch_start: as_drawn, ")
    starts = {c.variant: c.spec.model.branch_start for c in plan_study(load_study(folder.study)).cells}
    assert starts == {"gqa": "zero", "routed": "as_drawn"}
    base = folder.path / "base.yaml"
    base.write_text(base.read_text().replace("model: {", "model: {branch_start: 0.7, "))
    starts = {c.variant: c.spec.model.branch_start for c in plan_study(load_study(folder.study)).cells}
    assert starts == {"gqa": 0.7, "routed": "as_drawn"}


def test_a_variant_that_is_validated_on_other_tokens_is_refused(folder):
    folder.rewrite("attention.top_k: 1}", "attention.top_k: 1, train.validation_tokens: 512}")
    with pytest.raises(SpecError, match=r"variant routed has train.validation_tokens: 512, and the baseline gqa 256"):
        folder.plan()


def test_a_question_about_what_is_not_compared_is_refused(folder):
    folder.rewrite("seeds: [1, 2]", "seeds: [1, 2]\nasks: [moa is better than gqa]")
    with pytest.raises(SpecError, match="moa is not a variant"):
        load_study(folder.study)


def test_without_match_sizes_stay_as_written(folder):
    folder.rewrite("match: {multiple: 4, tolerance: 2%}\n", "")
    assert {c.spec.model.ffn_width for c in folder.plan().cells} == {96}


@pytest.mark.parametrize("key", ["seed=3", "data.seed=3", "run_dir=x", "name=x"])
def test_what_the_study_sets_cannot_be_an_argument(folder, key):
    with pytest.raises(SpecError, match="the study sets"):
        folder.plan(key)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("seeds: [1, 2]", "seeds: [1, 1]", "given twice"),
        ("seeds: [1, 2]", "seeds: []", "seeds"),
        ("seeds: [1, 2]", "seeds: [-1]", "from 0"),
        ("seeds: [1, 2]", "seds: [1, 2]", "seeds"),
        ("seeds: [1, 2]", "seeds: [1]\nbaseline: rooted", "Did you mean routed"),
        ("tolerance: 2%", "tolerance: two%", "not a percentage"),
        ("  gqa:\n", "  ../gqa:\n", "cannot name a folder"),
        ("attention.top_k: 1}", "seed: 7}", "the study sets seed"),
        ("attention.top_k: 1}", "model.ffn_width: 64}", "`match` solves model.ffn_width"),
        ("attention.top_k: 1}", "attention: {type: gqa}}", "given twice"),
        ("attention.top_k: 1}", "attention.topk: 1}", "attention.top_k"),
        ("attention.type: rgqa", "attention.type: rgga", "rgqa"),
        ("attention.top_k: 1", "attention.top_k: 9", "top_k"),
        ("base: base.yaml", "base: bare.yaml", "bare.yaml"),
    ],
)
def test_a_mistake_in_the_study_is_one_located_message(folder, old, new, says):
    folder.rewrite(old, new)
    with pytest.raises((SpecError, NoInputError)) as error:
        folder.plan()
    assert says in str(error.value)
    assert ".yaml" in str(error.value)


# ---------------------------------------------------------------- running


def test_every_cell_is_trained_once_and_a_second_run_trains_nothing(folder, capsys):
    assert run_study(folder.study) == 0
    assert folder.trained() == ALL
    assert run_study(folder.study) == 0
    assert folder.trained() == []
    assert "4 of 4 cells are done already" in capsys.readouterr().out


def test_output_is_shown_with_cell_number_and_eta_and_kept(folder, capfd):
    run_study(folder.study)
    lines = capfd.readouterr().out.splitlines()
    assert any(
        line.startswith("[2/4 routed/seed-1 | study eta ") and line.endswith("] step 7/10 loss") for line in lines
    )
    assert "step 10/10 loss" in (folder.out / "logs" / "routed.seed-2.log").read_text()


def test_a_failing_cell_is_recorded_the_others_go_on_and_it_is_tried_again(folder, capsys):
    folder.behave({"routed/seed-1": "fail"})
    assert run_study(folder.study) == 1
    assert folder.trained() == ALL
    assert "routed/seed-1  failed" in capsys.readouterr().out
    outcome = json.loads((folder.out / "outcomes.json").read_text())["routed/seed-1"]
    assert outcome["exit_code"] == 74
    assert outcome["last_lines"][-1] == "error: the disk is on fire"
    folder.behave({})
    assert run_study(folder.study) == 0
    assert folder.trained() == ["routed/seed-1"]


def test_training_that_ends_without_a_complete_summary_is_a_failure(folder):
    folder.behave({"gqa/seed-1": "half"})
    assert run_study(folder.study) == 1
    status = cell_state(
        folder.out / "cells/gqa/seed-1", json.loads((folder.out / "outcomes.json").read_text())["gqa/seed-1"]
    )
    assert status.state == "failed" and "without a complete summary" in status.detail


def test_a_damaged_cell_is_named_and_not_trained_again(folder, capsys):
    assert run_study(folder.study) == 0
    metrics = folder.out / "cells" / "routed" / "seed-2" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    folder.trained()
    capsys.readouterr()
    assert run_study(folder.study) == 1
    assert folder.trained() == []
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("routed/seed-2")]
    assert row.split()[1] == "damaged" and "no validation of the last step" in row


def test_seeds_and_variants_can_be_added(folder):
    run_study(folder.study)
    folder.trained()
    folder.rewrite("seeds: [1, 2]", "seeds: [1, 2, 3]")
    folder.rewrite("  gqa:\n", "  gqa:\n  wide: {attention.kv_heads: 4}\n")
    assert run_study(folder.study) == 0
    assert folder.trained() == ["wide/seed-1", "wide/seed-2", "gqa/seed-3", "wide/seed-3", "routed/seed-3"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda f: f.rewrite("attention.top_k: 1", "attention.top_k: 2"), "attention.top_k: 1 in the folder, 2 now"),
        (
            lambda f: (f.path / "base.yaml").write_text(BASE.replace("3.0e-3", "1.0e-3")),
            "optimizer.lr: 0.003 in the folder",
        ),
    ],
)
def test_a_changed_definition_is_refused_and_nothing_is_lost(folder, change, key):
    run_study(folder.study)
    folder.trained()
    before = {p: p.read_bytes() for p in folder.out.rglob("*") if p.is_file()}
    change(folder)
    with pytest.raises(SpecError) as error:
        run_study(folder.study)
    assert key in str(error.value)
    assert "another `out` folder" in str(error.value) and "--fresh" in str(error.value)
    assert folder.trained() == []
    assert {p: p.read_bytes() for p in folder.out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("start", [{"weights": "somewhere"}, {"run": "stable@3"}])
def test_a_hash_that_the_start_of_a_cell_filled_in_is_no_change_and_another_one_is(folder, start):
    (key, value), found = *start.items(), "a" * 64
    overrides = [f"init.{key}={value}"]
    assert run_study(folder.study, overrides) == 0
    file = folder.out / "cells/gqa/seed-1/spec.json"
    stored = json.loads(file.read_text())
    stored["init"]["sha256"] = found
    file.write_text(json.dumps(stored))
    plan = folder.plan(*overrides)
    refuse_changed(plan)
    assert deviation(plan.cells[0].resolved(), stored) == []
    other = folder.plan(*overrides, f"init.sha256={'b' * 64}")
    with pytest.raises(SpecError, match=rf"gqa/seed-1: init\.sha256: '{found}' in the folder, 'b{{64}}' now"):
        refuse_changed(other)
    assert deviation(other.cells[0].resolved(), stored) == [("init.sha256", "b" * 64, found)]
    with pytest.raises(SpecError, match=r"gqa/seed-1: init\.sha256: 'a{64}' in the folder, None now"):
        refuse_changed(folder.plan())  # without given weights it is another run


def test_fresh_moves_the_older_folder_aside(folder):
    run_study(folder.study)
    folder.trained()
    folder.rewrite("attention.top_k: 1", "attention.top_k: 2")
    assert run_study(folder.study, fresh=True) == 0
    assert folder.trained() == ALL
    (aside,) = folder.out.parent.glob("small.old-*")
    assert (aside / "cells/gqa/seed-1/summary.json").exists()


def test_changes_that_do_not_change_a_result_are_not_refused(folder):
    run_study(folder.study)
    assert run_study(folder.study, ["tracking.log_every_steps=5", "data.workers=0"]) == 0


def test_a_dry_run_shows_sizes_and_commands_and_writes_nothing(folder, capsys):
    assert run_study(folder.study, dry_run=True) == 0
    shown = capsys.readouterr().out
    assert shown.count("run_dir=studies/small/cells/") == 4
    assert "model.ffn_width" in shown and "residual" in shown
    assert not folder.out.exists()


def test_a_note_on_several_variants_is_shown_once_with_their_names(folder, capsys):
    more = "".join(f"  mla-{n}: {{attention: {{type: mla, latent: {n}, rope_dim: 4}}}}\n" for n in (8, 12))
    folder.study.write_text(folder.study.read_text() + more)
    assert run_study(folder.study, dry_run=True) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "attention.kv_heads" in line]
    assert len(notes) == 1 and notes[0].startswith("note: mla-8, mla-12: attention.kv_heads")


def test_a_second_run_of_a_live_study_is_refused(folder):
    from headway.launcher.run.run_dir import RunDir

    with RunDir(folder.out).locked("study.lock"), pytest.raises(SpecError, match="live run holds"):
        run_study(folder.study)


def test_study_json_holds_the_resolved_design(folder):
    run_study(folder.study)
    record: dict[str, Any] = json.loads((folder.out / "study.json").read_text())
    assert record["baseline"] == "gqa" and record["seeds"] == [1, 2]
    (routed,) = (v for v in record["variants"] if v["name"] == "routed")
    assert routed["keys"] == {"attention.type": "rgqa", "attention.top_k": 1}
    assert abs(routed["matched"]["residual"]) <= 0.02
    for cell in record["cells"]:
        assert flatten(cell["spec"])["data.seed"] == cell["seed"]
        assert flatten(cell["spec"])["model.vocab_size"] == 32
        assert f"seed={cell['seed']}" in cell["overrides"]


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_the_running_cell_in_order_and_the_study_with_75(folder, number, capfd):
    folder.behave({"routed/seed-1": "hang"})
    metrics = folder.out / "cells/routed/seed-1/metrics.jsonl"

    def interrupt() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if metrics.exists() and metrics.read_text().count("train") >= 3:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.02)

    before = signal.getsignal(number)
    threading.Thread(target=interrupt, daemon=True).start()
    assert run_study(folder.study) == 75
    assert signal.getsignal(number) is before
    assert "saved a checkpoint" in capfd.readouterr().out
    assert folder.trained() == ["gqa/seed-1", "routed/seed-1"]
    folder.behave({})
    assert run_study(folder.study) == 0
    assert folder.trained() == ALL[1:]


def test_a_cell_that_is_stopped_while_it_starts_has_not_failed(folder, capsys):
    folder.behave({"gqa/seed-1": "start"})

    def interrupt() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and not (folder.out / "cells/gqa/seed-1/metrics.jsonl").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert run_study(folder.study) == 75
    capsys.readouterr()
    status_study(folder.study)
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["gqa/seed-1", "missing"]


# ---------------------------------------------------------------- status


def test_status_shows_every_cell_of_the_study(folder, capsys):
    folder.behave({"routed/seed-1": "fail", "gqa/seed-2": "half"})
    run_study(folder.study)
    (folder.out / "outcomes.json").write_text(
        json.dumps({k: v for k, v in json.loads((folder.out / "outcomes.json").read_text()).items() if "routed" in k})
    )
    folder.rewrite("seeds: [1, 2]", "seeds: [1, 2, 3]")
    capsys.readouterr()
    assert status_study(folder.study) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "cell" and head.index("validation loss") < head.index("training-batch loss")
    rows = {line.split()[0]: line.split()[1:5] for line in lines}
    assert rows["gqa/seed-1"] == ["done", "2,560", "2.9000", "3.0000"]
    assert rows["routed/seed-1"][0] == "failed"
    assert rows["gqa/seed-2"] == ["partial", "1,280", "3.4000", "3.5000"]
    assert rows["routed/seed-3"] == ["missing", "0", "-", "-"]


def test_status_as_json_names_both_losses(folder, capsys):
    folder.behave({"routed/seed-1": "fail"})
    run_study(folder.study)
    capsys.readouterr()
    assert main(["study", "status", str(folder.study), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    cells = {cell["cell"]: cell for cell in record["cells"]}
    assert (record["study"], record["out"]) == ("small", "studies/small") and list(cells) == ALL
    done, failed = cells["gqa/seed-1"], cells["routed/seed-1"]
    assert (done["variant"], done["seed"], done["state"], done["tokens"]) == ("gqa", 1, "done", 2560)
    assert (done["validation_loss"], done["training_batch_loss"]) == (2.9, 3.0)
    assert failed["state"] == "failed" and "disk is on fire" in failed["detail"]
    assert (failed["validation_loss"], failed["training_batch_loss"]) == (None, None)


def test_a_quiet_run_prints_its_report_and_what_failed(folder, capfd):
    folder.behave({"routed/seed-1": "fail"})
    assert main(["study", "run", str(folder.study), "--quiet"]) == 1
    said = capfd.readouterr()
    assert said.out == "report: studies/small/report.html\n"
    assert said.err.count("\n") == 1 and "[routed/seed-1] FAILED: exit code 74: error: the disk is on fire" in said.err


def test_a_dry_run_as_json_holds_the_command_of_every_cell(folder, capfd):
    assert main(["study", "run", str(folder.study), "--dry-run", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert len(record["commands"]) == len(record["cells"]) == 4
    assert folder.trained() == []


def test_status_names_cells_that_left_the_study(folder, capsys):
    run_study(folder.study)
    folder.rewrite("seeds: [1, 2]", "seeds: [1]")
    capsys.readouterr()
    status_study(folder.study)
    assert "not in the study any more: gqa/seed-2, routed/seed-2" in capsys.readouterr().out


def test_a_report_of_nothing_says_how_to_start(folder):
    with pytest.raises(SpecError, match="headway study run"):
        report_study(folder.study)


# ---------------------------------------------------------------- for real


def test_the_command_of_a_cell_is_headway_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = Folder(tmp_path).plan("optimizer.lr=1e-3")
    command = study_module.cell_command(plan, plan.cells[0])
    assert command[:6] == [sys.executable, "-P", "-m", "headway.launcher", "train", str(plan.study.base)]
    assert "optimizer.lr=1e-3" in command and "run_dir=studies/small/cells/gqa/seed-1" in command


# ---------------------------------------------------------------- what is refused before anything is done


@pytest.mark.parametrize("options", [{}, {"fresh": True}, {"dry_run": True}])
def test_cells_that_would_be_submitted_to_slurm_are_refused(folder, options, monkeypatch):
    old = Path("studies/small/cells/old.txt")
    old.parent.mkdir(parents=True)
    old.write_text("kept")
    monkeypatch.setattr(study_module, "cell_command", lambda *_: pytest.fail("a command was made"))
    with pytest.raises(SpecError, match=r"^launch\.method: slurm submits a job and does not wait .*torchrun"):
        run_study(folder.study, ["launch.method=slurm"], **options)
    assert old.read_text() == "kept" and [p.name for p in Path("studies").iterdir()] == ["small"]
    assert [p.name for p in Path("studies/small").iterdir()] == ["cells"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_study_for_devices_that_are_not_here_is_refused_before_a_folder_is_moved_or_made(folder, fresh, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if fresh:
        Path("studies/small/cells").mkdir(parents=True)
    with pytest.raises(SpecError, match=r"^launch\.device: cuda is not available"):
        run_study(folder.study, ["launch.device=cuda"], fresh=fresh)
    assert [str(p) for p in Path().glob("studies/*")] == ["studies/small"] * fresh
    assert not Path("studies/small/study.json").exists()


def test_a_finished_study_for_devices_that_are_not_here_is_read(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert run_study(folder.study, ["launch.device=cuda"]) == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_study(folder.study, ["launch.device=cuda"]) == 0
    with pytest.raises(SpecError, match=r"^launch\.device: cuda is not available"):
        run_study(folder.study, ["launch.device=cuda"], fresh=True)  # all cells would be trained again
    assert (folder.out / "study.json").exists()
