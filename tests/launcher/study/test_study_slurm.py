"""Studies with `--slurm`, on a cluster of substitutes that execute every job on this machine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from played_study import BASE, Folder, play
from slurm_cluster import Cluster

from headway.launcher.base.errors import HeadwayError, NoInputError, SpecError
from headway.launcher.cli.main import main
from headway.launcher.study.cluster.cell import train_part
from headway.launcher.study.cluster.submit import Arrays
from headway.launcher.study.ladder.run import run_file, status_file

QUICK = Path(__file__).parents[2] / "quick.py"

PLAYED = """
import os, sys
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]  # it is forked like a rank
from headway.launcher.report import study
from headway.launcher.study.cluster import cell
cell.train_command = lambda arguments: [sys.executable, "trainer.py", *arguments]
study.draw_all = lambda *_: []  # drawn in test_report.py
from headway.launcher.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, fork_server):
    made = Folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    play(monkeypatch)
    monkeypatch.setattr("headway.launcher.report.study.draw_all", lambda *_: [])
    (tmp_path / "played.py").write_text(PLAYED)
    python = tmp_path / "python-of-the-nodes"
    python.write_text(
        '#!/bin/bash\n[ "$1 $2 $3" = "-P -m headway.launcher" ] || exit 99\n'
        f'exec {sys.executable} -S -E {QUICK} {fork_server.path} played.py "${{@:4}}"\n'
    )
    python.chmod(0o755)
    return made


@pytest.fixture
def cluster(folder, monkeypatch):
    made = Cluster(folder.path)
    monkeypatch.setenv("PATH", str(made.bin), prepend=os.pathsep)
    return made


def submit(folder: Folder, *more: str, follows: bool = False, limit: int | None = None, **options) -> int:
    python = f"launch.slurm.python={folder.path / 'python-of-the-nodes'}"
    return run_file(folder.study, [python, *more], arrays=Arrays(limit=limit, follows=follows), **options)


def status(folder: Folder, capsys) -> dict[str, tuple[str, str]]:
    """Cell -> (state, job) as `study status` prints them."""
    capsys.readouterr()
    status_file(folder.study)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:] if "seed-" in line]
    return {row[0]: (row[1], row[-1] if "job" in row else "") for row in rows}


def jobs_file(folder: Folder) -> dict:
    return json.loads((folder.out / "slurm" / "jobs.json").read_text())


def test_a_study_goes_from_nothing_to_a_report_in_one_array_and_a_last_job(folder, cluster, capsys):
    assert submit(folder, limit=3) == 0
    said = capsys.readouterr().out
    assert "submitted job 100: 4 cells in 4 elements" in said and "job 101 goes on" in said
    array, last = cluster.jobs()
    assert array["options"]["array"] == "0-3%3"
    assert last["after"] == [100] and "array" not in last["options"] and last["options"]["ntasks"] == "1"
    index = json.loads((folder.out / "slurm" / "array-1.json").read_text())
    assert [parts[0]["key"] for parts in index] == ["gqa/seed-1", "routed/seed-1", "gqa/seed-2", "routed/seed-2"]
    assert folder.trained() == [] and status(folder, capsys)["gqa/seed-1"] == ("queued", "100_0")

    assert cluster.run(2) == [("100_0", 0), ("100_1", 0)]
    assert folder.trained() == ["gqa/seed-1", "routed/seed-1"]
    assert status(folder, capsys) == {
        "gqa/seed-1": ("done", ""),
        "routed/seed-1": ("done", ""),
        "gqa/seed-2": ("queued", "100_2"),
        "routed/seed-2": ("queued", "100_3"),
    }
    assert cluster.run() == [("100_2", 0), ("100_3", 0), ("101", 0)], (
        folder.out / "slurm" / "next-101.log"
    ).read_text()
    assert (folder.out / "report.html").exists()
    outcomes = json.loads((folder.out / "outcomes.json").read_text())
    assert {key: o["exit_code"] for key, o in outcomes.items()} == dict.fromkeys(
        ("gqa/seed-1", "routed/seed-1", "gqa/seed-2", "routed/seed-2"), 0
    )
    assert submit(folder) == 0 and len(cluster.jobs()) == 2, "everything is done: nothing is submitted"


def test_a_second_command_submits_nothing_twice_and_says_what_runs(folder, cluster, capsys):
    assert submit(folder) == 0
    cluster.set_state("100_1", "RUNNING")
    cluster.set_state("100_2", "FAILED")  # ended without a finished cell
    capsys.readouterr()
    assert submit(folder) == 0
    said = capsys.readouterr().out
    assert "2 queued, 1 running (job 100)" in said and "submitted job 102: 1 cell in 1 element" in said
    third = json.loads((folder.out / "slurm" / "array-2.json").read_text())
    assert [[p["key"] for p in parts] for parts in third] == [["gqa/seed-2"]]
    assert cluster.jobs()[3]["after"] == [100, 102], "the new last job waits for both arrays"
    assert submit(folder) == 0
    assert len(cluster.jobs()) == 4, "neither an array nor a last job"
    assert status(folder, capsys)["routed/seed-1"] == ("running", "100_1")


def test_a_failed_cell_is_submitted_again_by_its_user_but_not_by_the_last_job(folder, cluster, capsys):
    folder.behave({"routed/seed-1": "fail"})
    assert submit(folder) == 0
    assert dict(cluster.run()) == {"100_0": 0, "100_1": 74, "100_2": 0, "100_3": 0, "101": 1}
    assert len(cluster.jobs()) == 2 and (folder.out / "report.html").exists()
    assert status(folder, capsys)["routed/seed-1"][0] == "failed"
    outcome = json.loads((folder.out / "outcomes.json").read_text())["routed/seed-1"]
    assert outcome["last_lines"][-1] == "error: the disk is on fire"
    folder.behave({})
    folder.trained()
    assert submit(folder) == 0
    assert dict(cluster.run()) == {"102_0": 0, "103": 0}
    assert folder.trained() == ["routed/seed-1"]


def insert(folder: Folder, text: str) -> None:
    """Let the playing trainer do something before its first step."""
    trainer = folder.path / "trainer.py"
    before = "def stop(*_):"
    assert before in trainer.read_text()
    trainer.write_text(trainer.read_text().replace(before, text + before))


def test_an_element_that_saved_is_requeued_and_continues(folder, cluster):
    insert(folder, "if not Path(key[:3]).exists():\n    Path(key[:3]).touch()\n    sys.exit(75)\n")
    folder.rewrite("seeds: [1, 2]", "seeds: [1]")
    assert submit(folder) == 0
    assert cluster.run(4) == [("100_0", 75), ("100_0", 0), ("100_1", 75), ("100_1", 0)]
    assert [job["states"] for job in cluster.jobs()] == [
        dict.fromkeys(("100_0", "100_1"), "COMPLETED"),
        {"101": "PENDING"},
    ]
    assert folder.trained() == ["gqa/seed-1"] * 2 + ["routed/seed-1"] * 2


def test_without_requeue_an_element_that_saved_waits_for_its_user(folder, cluster):
    insert(folder, 'if key.startswith("gqa"):\n    sys.exit(75)\n')
    folder.rewrite("seeds: [1, 2]", "seeds: [1]")
    assert submit(folder, "launch.slurm.requeue=false") == 0
    options = cluster.jobs()[0]["options"]
    assert "no-requeue" in options and "requeue" not in options
    assert cluster.run() == [("100_0", 75), ("100_1", 0), ("101", 1)]


def test_cells_of_smaller_budgets_continue_in_the_element_of_their_full_run(folder, cluster, capsys):
    folder.rewrite("seeds: [1, 2]", "seeds: [1]\nbudgets: [0.5, 1]")
    base = folder.path / "base.yaml"
    base.write_text(BASE.replace("optimizer:", "schedule: {decay_fraction: 0.4}\noptimizer:").replace("2560", "5120"))
    folder.behave({"routed/seed-1": "fail"})
    assert submit(folder) == 0
    index = json.loads((folder.out / "slurm" / "array-1.json").read_text())
    assert [[p["key"] for p in parts] for parts in index] == [
        ["gqa/seed-1", "gqa/seed-1.budget-0.5"],
        ["routed/seed-1", "routed/seed-1.budget-0.5"],
    ]
    assert dict(cluster.run()) == {"100_0": 0, "100_1": 74, "101": 1}
    assert folder.trained() == ["gqa/seed-1", "gqa/seed-1.budget-0.5", "routed/seed-1"]
    outcomes = json.loads((folder.out / "outcomes.json").read_text())
    assert "its full run failed" in outcomes["routed/seed-1.budget-0.5"]["last_lines"][0]
    folder.behave({})
    assert submit(folder) == 0
    assert dict(cluster.run()) == {"102_0": 0, "103": 0}
    assert folder.trained() == ["routed/seed-1", "routed/seed-1.budget-0.5"]


def test_an_element_trains_its_cell_for_real(folder, cluster):
    folder.rewrite("seeds: [1, 2]", "seeds: [1]")
    assert run_file(folder.study, arrays=Arrays()) == 0  # with the Python and the trainer of Headway
    assert cluster.run(1) == [("100_0", 0)], (folder.out / "slurm" / "100_0.log").read_text()
    summary = json.loads((folder.out / "cells" / "gqa" / "seed-1" / "summary.json").read_text())
    assert summary["complete"] is True and summary["tokens"] == 2560
    assert json.loads((folder.out / "outcomes.json").read_text())["gqa/seed-1"]["exit_code"] == 0


@pytest.mark.slow  # arrays and ladders are tested apart in the other tests
def test_a_tuned_ladder_goes_from_nothing_to_a_report(folder, cluster, capsys):
    folder.become_ladder()
    folder.rewrite("seeds: [1, 2]", "seeds: [1]")
    folder.rewrite("sizes: [s, m], carry: fit, ", "sizes: [s], carry: same, ")
    assert submit(folder) == 0
    capsys.readouterr()
    assert status_file(folder.study) == 0
    shown = capsys.readouterr().out
    assert shown.count(" queued ") == 6 and "job 100_5" in shown and shown.count(" missing ") == 5
    ended = cluster.run()
    assert {code for _, code in ended} == {0}, ended
    tuning = json.loads((folder.out / "sizes" / "s" / "tuning.json").read_text())["keys"]["optimizer.lr"]
    assert tuning["grid"] == [5e-4, 1e-3, 2e-3, 4e-3]
    assert tuning["variants"]["gqa"]["chosen"] == pytest.approx(2.5e-3, rel=0.01)
    assert (folder.out / "report.html").exists() and (folder.out / "sizes" / "m" / "report.html").exists()
    # the grid, one value beyond its edge, the cells of all sizes, the check at l; after each the job that goes on
    sizes = [job["options"].get("array") for job in cluster.jobs()]
    assert sizes == ["0-5", None, "0-1", None, "0-4", None, "0-2", None]
    keys = [key.rpartition("seed-")[2] for key in folder.trained()]
    assert keys == ["101"] * (3 * 2 + 2) + ["1"] * 5 + ["101"] * 3


def test_an_array_above_the_limit_of_the_cluster_is_split(folder, tmp_path, monkeypatch):
    cluster = Cluster(tmp_path, largest=3)
    monkeypatch.setenv("PATH", str(cluster.bin), prepend=os.pathsep)
    assert submit(folder) == 0
    assert [job["options"].get("array") for job in cluster.jobs()] == ["0-2", "0-0", None]
    assert cluster.jobs()[-1]["after"] == [100, 101]
    assert {code for _, code in cluster.run()} == {0} and len(folder.trained()) == 4


def test_cells_that_need_other_jobs_have_arrays_of_their_own(folder, cluster):
    folder.rewrite("routed: {", "routed: {launch.hosts: 2, train.micro_batch: 4, ")
    assert submit(folder) == 0
    shapes = [(job["options"]["nodes"], job["options"].get("array")) for job in cluster.jobs()]
    assert shapes == [("1", "0-1"), ("2", "0-1"), ("1", None)]
    assert all("launch.address=$first" in job["script"] for job in cluster.jobs()[1:2])
    assert "launch.address" not in cluster.jobs()[0]["script"], "one host needs no name"


def test_the_scripts_pass_on_what_the_spec_says(folder, cluster):
    keys = ("partition=gpu", "time='4:00:00'", "memory=64G", "setup=['export FROM_SETUP=1']", "srun=[--cpu-bind=cores]")
    assert submit(folder, *(f"launch.slurm.{k}" for k in (*keys, "options=[--qos=low, --exclusive]"))) == 0
    array, last = cluster.jobs()
    right = {"partition": "gpu", "time": "4:00:00", "mem": "64G", "qos": "low", "exclusive": "", "cpus-per-task": "1"}
    assert array["options"].items() >= right.items()
    assert last["options"].items() >= {"partition": "gpu", "qos": "low", "nodes": "1"}.items()
    assert not {"exclusive", "mem", "gpus-per-node"} & last["options"].keys(), "the last job needs little"
    assert all("\nexport FROM_SETUP=1\nset -u\n" in job["script"] for job in (array, last))
    cluster.run(1)
    assert cluster.srun_options() == [
        ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--cpus-per-task=1", "--cpu-bind=cores"]
    ]


def test_without_sbatch_there_is_one_message_and_nothing_is_written(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder.path))
    with pytest.raises(HeadwayError, match=r"no sbatch on this machine.*login node"):
        submit(folder)
    assert not folder.out.exists()


def test_a_rejected_job_loses_nothing(folder, cluster):
    (cluster.queue / "reject").write_text("Invalid partition name specified")
    with pytest.raises(HeadwayError, match=r"Invalid partition name.*sinfo"):
        submit(folder)
    (cluster.queue / "reject").unlink()
    assert submit(folder) == 0
    assert {code for _, code in cluster.run()} == {0} and len(folder.trained()) == 4


def test_a_queue_that_does_not_answer_stops_a_submission_but_not_the_status(folder, cluster, capsys):
    assert submit(folder) == 0
    (cluster.queue / "broken").touch()
    with pytest.raises(HeadwayError, match=r"cannot tell .*Unable to contact.*must not train the same cell"):
        submit(folder)
    capsys.readouterr()
    assert status_file(folder.study) == 0
    out = capsys.readouterr().out
    assert "missing" in out and "note: squeue cannot tell" in out
    (cluster.bin / "squeue").unlink()
    assert status_file(folder.study) == 0
    assert "there is no squeue" in capsys.readouterr().out
    assert len(cluster.jobs()) == 2


def test_other_commands_are_refused_while_jobs_are_queued(folder, cluster, capsys):
    assert submit(folder) == 0
    with pytest.raises(HeadwayError, match="scancel 100 101"):
        run_file(folder.study)
    with pytest.raises(HeadwayError, match="--fresh would move"):
        submit(folder, fresh=True)
    assert main(["rm", str(folder.out), "--yes"]) == 70
    assert "scancel 100 101" in capsys.readouterr().err
    cluster.run()
    assert run_file(folder.study) == 0
    assert main(["rm", str(folder.out), "--yes"]) == 0 and not folder.out.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--slurm", "--jobs", "2"], "--jobs: with --slurm"),
        (["--array-limit", "2"], "add --slurm"),
        (["--slurm", "launch.method=torchrun"], "sets torchrun"),
        (["launch.method=slurm"], "add --slurm"),
    ],
)
def test_options_that_do_not_go_together_are_refused(folder, cluster, capsys, words, reason):
    assert main(["study", "run", str(folder.study), *words]) == 64
    assert reason in capsys.readouterr().err
    assert cluster.jobs() == [] and not folder.out.exists()


def test_sizes_matched_by_times_of_this_machine_are_refused(folder, cluster):
    folder.rewrite("match: {multiple", "match: {quantity: wall_clock, multiple")
    with pytest.raises(SpecError, match=r"match\.quantity: wall_clock is measured where the command runs"):
        submit(folder)


def test_an_index_file_that_is_not_right_is_named(tmp_path):
    with pytest.raises(NoInputError, match="cannot be read"):
        train_part(tmp_path / "array-1.json", 0, 0)
    (tmp_path / "array-1.json").write_text("[]")
    with pytest.raises(HeadwayError, match="has no element 3"):
        train_part(tmp_path / "array-1.json", 3, 0)
