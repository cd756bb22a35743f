"""A folder of one kind where another is wanted: the message has the paths that were meant, to copy."""

import json

import pytest

from headway.launcher.base.errors import NoInputError
from headway.launcher.cli.main import main
from headway.launcher.run.folders import cells_of, find_run, kind_of, runs_in

SPEC = "name: mine\n"


def said(capsys, *words):
    code = main(list(words))
    return code, capsys.readouterr().err


@pytest.fixture
def place(tmp_path, monkeypatch, make_run, make_study):
    """A run, a study, probe tasks and specs in the working folder."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/mine")
    make_study(tmp_path / "studies/s")
    make_study(tmp_path / "studies/p/task")
    (tmp_path / "studies/p/probe.json").write_text(json.dumps({"tasks": ["task", "later"], "path": "p.yaml"}))
    (tmp_path / "mine.yaml").write_text(SPEC)
    (tmp_path / "s.yaml").write_text("study: s\nbase: mine.yaml\nvariants: {a: {}}\n")
    return tmp_path


def test_kinds_are_told_by_their_files(place):
    kinds = {name: kind_of(place / name) for name in ("runs/mine", "studies/s", "studies/p", "studies", "mine.yaml")}
    assert kinds == {
        "runs/mine": "run",
        "studies/s": "study",
        "studies/p": "probe",
        "studies": None,
        "mine.yaml": None,
    }
    assert [path.parent.name for path in runs_in(place / "studies/s")] == ["a", "b"]
    assert [path.parent.name for path in runs_in(place / "studies/p")] == ["a", "b"]


def test_a_record_cannot_lead_out_of_its_folder(place):
    record = {"cells": [{"run_dir": "../../runs/mine"}, {"run_dir": str(place / "runs/mine")}, {"run_dir": 7}, "x"]}
    (place / "studies/s/study.json").write_text(json.dumps(record))
    assert cells_of(place / "studies/s") == []


@pytest.mark.parametrize(
    "words", [["generate", "PATH", "text"], ["export", "PATH", "out", "--to", "hf"], ["checkpoint", "list", "PATH"]]
)
@pytest.mark.parametrize("step", [False, True])
def test_a_study_where_a_run_is_wanted_names_its_runs(place, capsys, words, step):
    more = ["--step", "5"] if step and words[0] != "generate" else []
    for path in ("studies/s", "s.yaml"):
        code, text = said(capsys, *(word.replace("PATH", path) for word in words), *more)
        assert code == 66
        lines = [line.strip() for line in text.splitlines()]
        assert lines[1:] == ["studies/s/cells/a/seed-1", "studies/s/cells/b/seed-1"], text


def test_probe_tasks_where_a_run_is_wanted_name_their_runs(place):
    with pytest.raises(NoInputError, match="studies/p/task/cells/a/seed-1"):
        find_run(place / "studies/p")


def test_a_spec_where_a_run_is_wanted_names_its_run_folder(place, capsys):
    code, text = said(capsys, "checkpoint", "show", "mine.yaml")
    assert code == 66 and text.rstrip().endswith("name the run's folder: runs/mine")
    (place / "other.yaml").write_text("base: mine.yaml\nrun_dir: elsewhere\n")
    code, text = said(capsys, "generate", "other.yaml", "text")
    assert code == 66 and "elsewhere (once `headway train other.yaml` has made it)" in text


def test_what_is_not_there_is_said_with_its_whole_path(place, capsys):
    code, text = said(capsys, "generate", "runs/none", "text")
    assert code == 66 and str(place / "runs/none") in text and "headway ls" in text
    assert find_run(place / "runs/mine").path == place / "runs/mine"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("studies/s", "s.yaml, and `headway study run s.yaml` continues it"),
        ("studies/s/cells/a/seed-1", "it is a run of the study in "),
        ("runs/mine", "name the file that the run was started with"),
        ("studies/p", "its file is p.yaml"),
    ],
)
@pytest.mark.parametrize("words", [["study", "status"], ["train"], ["probe", "report"], ["plan"]])
def test_a_folder_where_a_file_is_wanted_names_its_file(place, capsys, words, path, expected):
    code, text = said(capsys, *words, path)
    assert code == 66 and expected in text and "Traceback" not in text
