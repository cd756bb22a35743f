"""`headway rm`: deletes what Headway wrote, after asking, and nothing else."""

import io
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from headway.launcher.cli.main import main
from headway.launcher.cli.removing import _delete_in
from headway.launcher.run.folders import kind_of
from headway.launcher.run.run_dir import RunDir


@pytest.fixture
def place(tmp_path, monkeypatch, make_run, make_study):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/one")
    make_run(tmp_path / "runs/two")
    make_study(tmp_path / "studies/s")
    return tmp_path


def refused(capsys, *words, code=64):
    """The message; nothing may have changed."""
    before = sorted(Path().rglob("*"))
    assert main(["rm", *words]) == code
    assert sorted(Path().rglob("*")) == before
    return capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_run_is_deleted_and_the_bytes_are_said(place, capsys):
    size = sum(file.stat().st_size for file in (place / "runs/one").rglob("*") if file.is_file())
    assert main(["rm", "runs/one", "--yes"]) == 0
    assert f"freed {size:,} bytes" in capsys.readouterr().out
    assert not (place / "runs/one").exists() and (place / "runs/two/metrics.jsonl").exists()


def test_traces_and_files_of_trackers_belong_to_a_run(place):
    run = place / "runs/one"
    for name in ("traces", "wandb"):
        (run / name).mkdir()
    (run / "wandb/latest-run").symlink_to("offline-run-1")  # W&B makes such links
    for name in ("wandb.json", "mlflow.json", "traces/step-3.rank-0.json.gz"):
        (run / name).write_text("{}")
    assert main(["rm", "runs/one", "--yes"]) == 0
    assert not run.exists()


@pytest.mark.parametrize("name", ["inspection", "converted", ".converted.staging"])
def test_folders_that_other_commands_write_belong_to_a_run(place, name):
    (place / "runs/one" / name).mkdir()
    (place / "runs/one" / name / "page.html").write_text("page")
    assert main(["rm", "runs/one", "--yes"]) == 0
    assert not (place / "runs/one").exists()


def test_all_records_below_a_study_are_deleted_with_it(place, capsys):
    records = place / "studies/s/records"
    for name in ("study.json", "timing.json", "a/seed-1.json", "evaluations/a/seed-1.json", "tune/k/1/a/seed-7.json"):
        (records / name).parent.mkdir(parents=True, exist_ok=True)
        (records / name).write_text("{}")
    (records / "a/notes.txt").write_text("mine")
    assert "notes.txt" in refused(capsys, "studies/s", "--yes")
    (records / "a/notes.txt").unlink()
    assert main(["rm", "studies/s", "--yes"]) == 0
    assert not (place / "studies/s").exists()


def test_a_study_is_deleted_with_its_runs(place):
    assert main(["rm", "studies/s", "studies/s/cells/a/seed-1", "studies/s", "--yes"]) == 0
    assert not (place / "studies/s").exists() and (place / "studies").is_dir()


def test_probe_tasks_are_deleted_with_their_studies(place, make_study):
    make_study(place / "studies/p/task")
    (place / "studies/p/probe.json").write_text(json.dumps({"tasks": ["task"]}))
    (place / "studies/p/probe.html").write_text("table")
    assert main(["rm", "studies/p", "--yes"]) == 0
    assert not (place / "studies/p").exists()


def test_a_study_with_sizes_is_deleted_with_its_sizes_and_trials(place, make_study, capsys):
    make_study(place / "studies/l/sizes/s")
    make_study(place / "studies/l/sizes/s/tune/optimizer.lr/0.001")
    (place / "studies/l/ladder.json").write_text(json.dumps({"sizes": [{"name": "s", "folder": "sizes/s"}]}))
    (place / "studies/l/report.html").write_text("report")
    assert main(["ls", "studies", "--json"]) == 0
    kinds = {row["name"]: row["kind"] for row in json.loads(capsys.readouterr().out)}
    assert kinds["studies/l"] == "ladder"
    (place / "studies/l/sizes/s/tune/notes").mkdir()
    (place / "studies/l/sizes/s/tune/notes/mine").mkdir()
    assert "not of Headway" in refused(capsys, "studies/l", "--yes")
    (place / "studies/l/sizes/s/tune/notes/mine").rmdir()
    (place / "studies/l/sizes/s/tune/notes").rmdir()
    assert main(["rm", "studies/l", "--yes"]) == 0
    assert not (place / "studies/l").exists()


def test_checkpoints_alone_are_deleted_and_records_stay(place, capsys):
    assert main(["rm", "runs/one", "studies/s", "--checkpoints", "--yes"]) == 0
    assert "freed 3,000 bytes" in capsys.readouterr().out
    for run in ("runs/one", "studies/s/cells/a/seed-1", "studies/s/cells/b/seed-1"):
        assert not (place / run / "checkpoints").exists()
        assert (place / run / "spec.json").exists() and (place / run / "metrics.jsonl").exists()
    assert (place / "studies/s/report.html").exists() and (place / "runs/two/checkpoints").exists()


def test_a_terminal_is_asked(place, monkeypatch, capsys):
    for answer in ("n\n", "\n", ""):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert main(["rm", "runs/one"]) == 1
        assert "nothing was deleted" in capsys.readouterr().out and (place / "runs/one/spec.json").exists()
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert main(["rm", "runs/one"]) == 0
    assert not (place / "runs/one").exists()


def test_without_a_terminal_yes_is_required(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "--yes" in refused(capsys, "runs/one")


@pytest.mark.parametrize("lock", ["run.lock", "worker.lock"])
def test_a_run_that_is_held_is_refused(place, capsys, lock):
    with RunDir(place / "runs/two").locked(lock):
        said = refused(capsys, "runs/one", "runs/two", "--yes")
    assert "runs/two" in said and "live process" in said


def test_a_study_is_refused_while_it_or_one_of_its_cells_is_held(place, capsys):
    for folder, lock in (("studies/s", "study.lock"), ("studies/s/cells/b/seed-1", "run.lock")):
        with RunDir(place / folder).locked(lock):
            assert "live process" in refused(capsys, "studies/s", "--yes")
    with RunDir(place / "studies/s").locked("study.lock"):  # it may begin this cell at any moment
        assert "live process" in refused(capsys, "studies/s/cells/a/seed-1", "--yes")


def test_a_link_is_refused_and_what_it_leads_to_stays(place, capsys):
    (place / "link").symlink_to(place / "runs/one")
    assert "is a link" in refused(capsys, "link", "--yes")
    (place / "link").unlink()
    outside = place / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("mine")
    (place / "runs/two/checkpoints").rename(place / "moved")
    (place / "runs/two/checkpoints").symlink_to(outside)
    assert "is a link" in refused(capsys, "runs/two", "--yes")
    assert "is a link" in refused(capsys, "runs/two", "--checkpoints", "--yes")
    (place / "runs/one/checkpoints/there").symlink_to(outside)  # deeper: the link goes, what it leads to stays
    assert main(["rm", "runs/one", "--yes"]) == 0
    assert (outside / "kept.txt").read_text() == "mine"


@pytest.mark.parametrize("words", [["runs"], ["."], ["/"], ["other"], ["other/notes.txt"], ["runs/one", "other"]])
def test_anything_else_is_refused(place, capsys, words):
    (place / "other").mkdir()
    (place / "other/notes.txt").write_text("mine")
    assert "no run, study or probe folder" in refused(capsys, *words, "--yes")


def test_what_is_not_there_is_no_input(place, capsys):
    assert str(place / "none") in refused(capsys, "runs/one", "none", "--yes", code=66)


@pytest.mark.parametrize(
    "foreign", ["runs/one/notes.txt", "runs/one/src/a.py", "studies/s/thesis.tex", "studies/s/cells/b/seed-1/mine.py"]
)
def test_a_folder_with_files_of_others_is_refused(place, capsys, foreign):
    (place / foreign).parent.mkdir(exist_ok=True)
    (place / foreign).write_text("mine")
    said = refused(capsys, "/".join(foreign.split("/")[:2]), "--yes")
    assert "not of Headway" in said and "move it away" in said


def test_a_folder_that_only_looks_like_one_is_refused(place, capsys):
    (place / "docs").mkdir()
    (place / "docs/study.json").write_text("{}")
    (place / "docs/report.md").write_text("kept")
    assert "no runs" in refused(capsys, "docs", "--yes")
    (place / "api").mkdir()
    (place / "api/spec.json").write_text('{"openapi": 3}')
    assert "no spec of a run" in refused(capsys, "api", "--yes")


def test_the_folder_one_stands_in_is_refused(place, capsys, monkeypatch):
    monkeypatch.chdir(place / "runs/one/logs")
    assert main(["rm", str(place / "runs/one"), "--yes"]) == 64
    assert "the folder you are in" in capsys.readouterr().err and (place / "runs/one/spec.json").exists()


def test_a_deletion_that_is_interrupted_anywhere_can_be_begun_again(tmp_path, monkeypatch, make_study):
    monkeypatch.chdir(tmp_path)
    left = {"unlink": os.unlink, "rmdir": os.rmdir}
    interrupted = 0
    for last in range(1, 200, 2):
        make_study(tmp_path / "s")
        calls = iter(range(last))

        def interrupt(name, *words, real, calls=calls, **options):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return real(name, *words, **options)

        with monkeypatch.context() as patch:
            for name, real in left.items():
                patch.setattr(os, name, partial(interrupt, real=real))
            code = main(["rm", "s", "--yes"])
        if code == 0:
            break
        interrupted += 1
        assert code == 130
        if kind_of(tmp_path / "s") is None:  # everything is gone but what says that somebody is here
            assert [path.name for path in (tmp_path / "s").iterdir()] in ([], ["study.lock"])
            shutil.rmtree(tmp_path / "s")
        assert not (tmp_path / "s").exists() or main(["rm", "s", "--yes"]) == 0
        assert not (tmp_path / "s").exists()
    assert interrupted > 10


def test_a_folder_that_becomes_a_link_meanwhile_is_not_followed(place):
    (place / "link").symlink_to(place / "runs/one")
    with pytest.raises(OSError):
        _delete_in(place / "link", ["checkpoints"])
    assert (place / "runs/one/checkpoints").is_dir()
