"""`headway ls`: what there is, how far it is, and what it takes."""

import json
import subprocess
import sys

import pytest

from headway.launcher.cli.main import main
from headway.launcher.run.run_dir import RunDir


@pytest.fixture
def rows(capsys):
    def of(*words):
        assert main(["ls", *map(str, words), "--json"]) == 0
        return {row["name"]: row for row in json.loads(capsys.readouterr().out)}

    return of


@pytest.fixture
def place(tmp_path, monkeypatch, make_run, make_study):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/one", validations={10: 2.5})
    make_run(tmp_path / "runs/two", step=3, complete=False)
    make_study(tmp_path / "studies/s")
    return tmp_path


def test_runs_and_studies_of_the_working_folder_are_listed(place, rows):
    found = rows()
    assert list(found) == ["runs/one", "runs/two", "studies/s"]
    one = found["runs/one"]
    assert (one["kind"], one["state"], one["step"], one["steps"], one["tokens"]) == ("run", "done", 10, 10, 320)
    assert one["validation_loss"] == 2.5 and found["runs/two"]["validation_loss"] is None
    assert one["bytes"] == sum(f.stat().st_size for f in (place / "runs/one").rglob("*") if f.is_file()) > 1000
    assert 0 <= one["age_s"] < 600
    study = found["studies/s"]
    assert (study["kind"], study["state"], study["cells_done"], study["cells"]) == ("study", "partial", 1, 3)
    assert study["tokens"] == 320 + 128 and study["validation_loss"] is None


def test_a_study_that_is_named_is_followed_by_its_runs(place, rows):
    assert list(rows("studies/s")) == ["studies/s", "studies/s/cells/a/seed-1", "studies/s/cells/b/seed-1"]
    assert list(rows("runs/one", place / "runs")) == ["runs/one", f"{place}/runs/one", f"{place}/runs/two"]


def test_the_state_of_a_study_is_that_of_its_cells(place, rows):
    (place / "studies/s/outcomes.json").write_text(json.dumps({"b/seed-1": {"exit_code": 70}}))
    assert rows("studies/s")["studies/s"]["state"] == "failed"
    for lock in ("study.lock", "ladder.lock"):
        with RunDir(place / "studies/s").locked(lock):
            assert rows("studies/s")["studies/s"]["state"] == "running"
    (place / "studies/s/outcomes.json").write_text(json.dumps({"b/seed-1": {"exit_code": 75}}))
    assert rows("studies/s")["studies/s"]["state"] == "partial"
    record = json.loads((place / "studies/s/study.json").read_text())
    (place / "studies/s/study.json").write_text(json.dumps(record | {"cells": record["cells"][:1]}))
    assert rows("studies/s")["studies/s"]["state"] == "done"


def test_the_table_says_that_the_loss_is_of_a_validation(place, capsys):
    assert main(["ls"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "name" and "validation loss" in head
    assert "2.5000" in lines[0] and "10/10" in lines[0] and "1/3 runs" in lines[2]
    assert " - " in lines[1] and "9.0000" not in "".join(lines)  # the loss of the last training batch


def test_links_hidden_folders_and_other_files_are_passed_over(place, rows, make_run):
    make_run(place / "runs/.hidden")
    make_run(place / "elsewhere/run")
    (place / "runs/link").symlink_to(place / "elsewhere/run")
    (place / "runs/loop").symlink_to(place / "runs")
    (place / "runs/notes.txt").write_text("mine")
    assert list(rows("runs")) == ["runs/one", "runs/two"]


def test_a_folder_without_any_says_so_and_one_that_is_not_there_is_no_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["ls"]) == 0
    assert "no runs or studies in ." in capsys.readouterr().out
    assert main(["ls", "none"]) == 66
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_hundreds_of_runs_are_listed_in_seconds_without_torch(tmp_path, make_run):
    for number in range(300):
        make_run(tmp_path / f"runs/{number}", validations={10: 2.5})
    code = (
        "import sys, time; from headway.launcher.cli.main import main; start = time.process_time(); main(['ls']); "
        "sys.exit('torch' in sys.modules or 'pydantic' in sys.modules or time.process_time() - start > 5)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 301
