"""Finished cells are kept as small records: they count as done without their folders, and are refused like folders.

Training is played by a small script, as in test_study.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from played_study import BASE, Folder

from headway.launcher.base.errors import SpecError
from headway.launcher.cli.main import main
from headway.launcher.hosts.forked import VARIABLE
from headway.launcher.study import run as study_module
from headway.launcher.study.config import load_study
from headway.launcher.study.run import run_study

ALL = ["gqa/seed-1", "routed/seed-1", "gqa/seed-2", "routed/seed-2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Folder(tmp_path)
    made.rewrite("seeds: [1, 2]", "seeds: [1, 2]\nrecords: kept/cells")
    monkeypatch.setattr(
        study_module, "cell_command", lambda plan, cell: [sys.executable, "trainer.py", *cell.overrides]
    )
    monkeypatch.setenv(VARIABLE, "not-used")  # no fork server, which the playing trainer would not use
    monkeypatch.setattr("headway.launcher.report.study.draw_all", lambda *_: [])  # drawn in test_report.py
    return made


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Place for the records of one study, which all tests copy: they are the same wherever the study is."""
    return tmp_path_factory.mktemp("template") / "cells"


@pytest.fixture
def kept(folder, template) -> Path:
    """The records of a study that was run, whose folder is gone."""
    cells = folder.path / "kept" / "cells"
    if template.exists():
        shutil.copytree(template, cells)
        return cells
    assert run_study(folder.study) == 0
    folder.trained()
    shutil.rmtree(folder.out)
    shutil.copytree(cells, template)
    return cells


def states(folder: Folder, capsys) -> dict[str, tuple[str, bool, str]]:
    capsys.readouterr()
    assert main(["study", "status", str(folder.study), "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    return {c["cell"]: (c["state"], c["from_record"], c["detail"]) for c in cells}


def test_records_are_relative_to_the_study_file(tmp_path):
    (tmp_path / "yaml").mkdir()
    made = Folder(tmp_path / "yaml")
    assert load_study(made.study).records is None
    made.rewrite("seeds: [1, 2]", "seeds: [1, 2]\nrecords: ../docs/cells")
    assert load_study(made.study).records == tmp_path / "yaml" / "../docs/cells"


def test_a_record_is_written_when_its_cell_has_finished(folder):
    folder.behave({"routed/seed-1": "fail"})
    assert run_study(folder.study) == 1
    records = folder.path / "kept" / "cells"
    files = [p for p in records.rglob("*.json") if p.name != "timing.json"]  # there if cells trained at once
    assert sorted(str(p.relative_to(records)) for p in files) == [
        "gqa/seed-1.json",
        "gqa/seed-2.json",
        "routed/seed-2.json",
        "study.json",
    ]
    assert not any(str(folder.path) in p.read_text() for p in files)  # records are the same wherever the study is
    before = {p: p.stat().st_mtime_ns for p in files}
    folder.behave({})
    assert run_study(folder.study) == 0
    assert (records / "routed/seed-1.json").exists()
    assert {p: p.stat().st_mtime_ns for p in before} == before  # nothing for git to see


def test_cells_that_finished_before_records_were_asked_for_get_theirs(folder):
    folder.rewrite("\nrecords: kept/cells", "")
    assert run_study(folder.study) == 0
    assert not (folder.path / "kept").exists()
    folder.rewrite("seeds: [1, 2]", "seeds: [1, 2]\nrecords: kept/cells")
    folder.trained()
    assert run_study(folder.study) == 0
    assert folder.trained() == [] and len(list((folder.path / "kept/cells").glob("*/seed-*.json"))) == 4


def test_a_cell_with_a_record_is_done_without_its_folder(folder, kept, capsys):
    assert states(folder, capsys)["gqa/seed-2"][:2] == ("done", True)
    (kept / "gqa/seed-2.json").unlink()
    assert main(["study", "status", str(folder.study)]) == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert {row[0]: row[1] for row in rows}["routed/seed-1"] == "done (record)"
    assert run_study(folder.study) == 0
    assert folder.trained() == ["gqa/seed-2"]
    assert "3 of 4 cells are done already" in capsys.readouterr().out
    assert run_study(folder.study) == 0
    assert folder.trained() == []


def test_the_report_from_records_alone_is_that_from_the_folders(folder, capsys):
    assert run_study(folder.study) == 0
    report = (folder.out / "report.md").read_text()
    shutil.rmtree(folder.out)
    capsys.readouterr()
    assert main(["study", "report", str(folder.study)]) == 0  # study.json is gone too
    again = (folder.out / "report.md").read_text()

    def numbers(text: str) -> str:
        return text.partition("## Provenance")[0]

    assert numbers(again) == numbers(report) and "PAIRED" in report
    assert "4 of 4 cells were read from their records" in again


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.rewrite("attention.top_k: 1", "attention.top_k: 2"), "attention.top_k: 1 in its record, 2 now"),
        (lambda f: (f.path / "base.yaml").write_text(BASE.replace("3.0e-3", "1.0e-3")), "optimizer.lr: 0.003 in its"),
    ],
)
def test_a_record_of_another_definition_is_refused(folder, kept, change, says):
    change(folder)
    with pytest.raises(SpecError) as error:
        run_study(folder.study)
    assert says in str(error.value) and "--fresh" in str(error.value)
    assert folder.trained() == []


def test_a_record_of_other_data_is_refused(folder, kept, monkeypatch):
    from headway.launcher.compare.cell_record import record_text

    path = kept / "gqa/seed-1.json"
    content = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    path.write_text(record_text({**content, "card": {**content["card"], "data_fingerprint": "a" * 64}}))
    monkeypatch.setattr("headway.launcher.study.resolver.Resolver.data_facts", lambda *_: (32, "b" * 64))
    with pytest.raises(SpecError, match=r"gqa/seed-1: data fingerprint: 'a{64}' in its record, 'b{64}' now"):
        run_study(folder.study)


DAMAGES = {
    "cut in the middle": (lambda text: text[: len(text) // 2], "is cut or changed"),
    "a loss changed": (lambda text: text.replace('validation_loss":2.9', 'validation_loss":1.9'), "was changed"),
    "of another cell": (lambda text: None, "is the record of another cell, gqa/seed-1"),
    "empty": (lambda text: "", "is cut or changed"),
    "another format": (lambda text: text.replace('"format": 1', '"format": 99'), "in the format of this version"),
    "no mapping": (lambda text: "[]", "is no record"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_record_is_named_and_in_no_number(folder, kept, capsys, name):
    damage, says = DAMAGES[name]
    file = kept / "gqa/seed-2.json"
    text = file.read_text()
    changed = damage(text)
    assert changed != text
    file.write_text(changed if changed is not None else (kept / "gqa/seed-1.json").read_text())
    state, _, detail = states(folder, capsys)["gqa/seed-2"]
    assert state == "damaged" and says in detail and str(file) in detail.replace("./", "")
    assert run_study(folder.study) == 1
    assert folder.trained() == []
    page = (folder.out / "report.md").read_text()
    assert "DAMAGED: the records of 1 of 4 cells" in page
    capsys.readouterr()
    assert main(["study", "report", str(folder.study), "--json"]) == 0
    found = {v["name"]: v["validation_loss"]["n"] for v in json.loads(capsys.readouterr().out)["variants"]}
    assert found == {"gqa": 1, "routed": 2}


def test_a_damaged_record_of_a_whole_folder_is_written_anew(folder, capsys):
    run_study(folder.study)
    file = folder.path / "kept/cells/gqa/seed-1.json"
    whole = file.read_text()
    file.write_text(whole[:100])
    assert states(folder, capsys)["gqa/seed-1"][:2] == ("done", False)
    assert run_study(folder.study) == 0
    assert file.read_text() == whole


def test_no_record_is_made_of_a_damaged_folder(folder, capsys):
    run_study(folder.study)
    shutil.rmtree(folder.path / "kept")
    metrics = folder.out / "cells/gqa/seed-1/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert run_study(folder.study) == 1
    assert not (folder.path / "kept/cells/gqa/seed-1.json").exists()
    assert "gqa/seed-1: no record is kept" in capsys.readouterr().out


def test_the_design_among_the_records_does_not_depend_on_the_place(folder, kept):
    design = (kept / "study.json").read_text()
    assert str(folder.path) not in design and json.loads(design)["records"] == "."
    assert run_study(folder.study.relative_to(folder.path)) == 0  # named in another way
    assert (kept / "study.json").read_text() == design


def test_seeds_are_planned_from_records(folder, kept, capsys):
    assert main(["study", "plan", str(folder.study)]) == 64
    assert "the spread between runs needs" in capsys.readouterr().err  # the played losses have none


def test_fresh_moves_the_records_aside_too(folder, kept):
    assert run_study(folder.study, fresh=True) == 0
    assert folder.trained() == ALL
    (aside,) = kept.parent.glob("cells.old-*")
    assert len(list(aside.glob("*/seed-*.json"))) == 4 and len(list(kept.glob("*/seed-*.json"))) == 4


def test_budgets_of_a_full_run_of_which_only_the_record_is_left_are_trained_from_their_start(folder, kept, capsys):
    (folder.path / "base.yaml").write_text(BASE + "schedule: {type: wsd, decay_fraction: 0.2, warmup_tokens: 0}\n")
    assert run_study(folder.study, fresh=True) == 0
    folder.trained()
    shutil.rmtree(folder.out)
    folder.rewrite("seeds: [1, 2]", "seeds: [1, 2]\nbudgets: [0.5, 1]")
    capsys.readouterr()
    assert run_study(folder.study) == 0
    short = [f"{variant}/seed-{seed}.budget-0.5" for seed in (1, 2) for variant in ("gqa", "routed")]
    assert folder.trained() == short
    assert "only the record of the run is here; the cell is trained from its start" in capsys.readouterr().out
    shutil.rmtree(folder.out)
    assert run_study(folder.study) == 0
    assert folder.trained() == []  # done by records of their own
    assert "CONFOUND: runs that are not" not in (folder.out / "report.md").read_text()


# ---------------------------------------------------------------- questions that were stated late


FIRST, LATE = "routed is better than gqa", "routed is not worse than gqa by more than 0.5"


def asked(folder: Folder) -> tuple[list[str], dict[str, int]]:
    record = json.loads((folder.out / "study.json").read_text())
    kept = json.loads((folder.path / "kept" / "cells" / "study.json").read_text())
    assert (kept["asks"], kept.get("asked_later")) == (record["asks"], record.get("asked_later"))
    return record["asks"], record.get("asked_later", {})


def test_a_question_that_is_added_after_runs_is_recorded_and_shown_as_late(folder, capsys):
    folder.rewrite("seeds: [1, 2]", f"seeds: [1, 2]\nasks: [{FIRST}]")
    folder.behave({"routed/seed-2": "fail"})
    assert run_study(folder.study) == 1
    assert asked(folder) == ([FIRST], {})
    assert "| question, stated before the first run |" in (folder.out / "report.md").read_text()
    folder.rewrite(f"[{FIRST}]", f"[{FIRST}, {LATE}]")
    folder.behave({})
    assert run_study(folder.study) == 0
    assert asked(folder) == ([FIRST, LATE], {LATE: 3})
    page = (folder.out / "report.md").read_text()
    assert "stated before the first run |" not in page and f"{FIRST} (stated before the first run)" in page
    assert f"{LATE} (stated late: 3 runs had finished)" in page
    shutil.rmtree(folder.out)  # the records know it too
    assert run_study(folder.study) == 0
    assert asked(folder) == ([FIRST, LATE], {LATE: 3})
    folder.rewrite(f"[{FIRST}, {LATE}]", f"[{LATE}]")
    assert run_study(folder.study) == 0
    folder.rewrite(f"[{LATE}]", f"[{LATE}, {FIRST}]")  # left out for a while: all four have finished meanwhile
    assert run_study(folder.study) == 0
    assert asked(folder) == ([LATE, FIRST], {LATE: 3, FIRST: 4})


def test_questions_of_a_new_study_that_takes_finished_records_are_late(folder):
    assert run_study(folder.study) == 0
    shutil.rmtree(folder.out)
    (folder.path / "kept" / "cells" / "study.json").unlink()
    folder.rewrite("seeds: [1, 2]", f"seeds: [1, 2, 3]\nasks: [{FIRST}]")
    assert run_study(folder.study) == 0
    assert asked(folder) == ([FIRST], {FIRST: 4})
    assert f"{FIRST} (stated late: 4 runs had finished)" in (folder.out / "report.md").read_text()


def test_a_question_is_not_late_if_nothing_has_finished(folder):
    folder.behave(dict.fromkeys(ALL, "fail"))
    assert run_study(folder.study) == 1
    folder.rewrite("seeds: [1, 2]", f"seeds: [1, 2]\nasks: [{FIRST}]")
    folder.behave({})
    assert run_study(folder.study) == 0
    assert asked(folder) == ([FIRST], {})
