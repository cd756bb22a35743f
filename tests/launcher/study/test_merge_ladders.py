"""Studies with sizes and trials from several folders become one ladder, or one message and nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ladder_folders import LadderFolder, tuning
from study_folders import StudyFolder, bind

from headway.launcher.cli.main import main
from headway.launcher.compare.cell_record import record_file, write_record
from headway.launcher.compare.ladder.read import read_ladder

VARIANTS = ["gqa", "rgqa-k1"]
TRIAL = "sizes/tiny/tune/optimizer.lr/0.001"


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a ladder of three sizes with 3, 2 and 2 seeds, tuned values, and the trials of one value."""
    monkeypatch.chdir(tmp_path)
    ladder = LadderFolder(Path("whole"), variants=VARIANTS)
    ladder.write(scale={"train.global_batch": 0.5}, tune={"optimizer.lr": {"grid": [1e-3]}})
    trials = StudyFolder(ladder.out / TRIAL, VARIANTS, [101])
    trials.write()
    for name in ladder.names:
        (ladder.folder(name) / "tuning.json").write_text(json.dumps(tuning(dict.fromkeys(VARIANTS, 0.002))))
    for card in ladder.out.rglob("run.json"):
        bind(card.parent)
    return ladder.out


def part(whole: Path, name: str, keep: Callable[[str], bool]) -> Path:
    """A copy of the ladder with those cells (`sizes/tiny/cells/gqa/seed-1`) that `keep` names."""
    shutil.copytree(whole, name)
    for cell in sorted(Path(name).glob("**/cells/*/seed-*")):
        if not keep(cell.relative_to(name).as_posix()):
            shutil.rmtree(cell)
    return Path(name)


def as_records(folder: Path) -> Path:
    """The records of all cells of a ladder, with the files of its design and without run folders."""
    records = Path(f"{folder}-records")
    for file in folder.rglob("study.json"):
        study = file.parent
        kept = records / study.relative_to(folder)
        kept.mkdir(parents=True, exist_ok=True)
        for cell in study.glob("cells/*/seed-*"):
            key, seed = f"{cell.parent.name}/{cell.name}", int(cell.name.removeprefix("seed-"))
            what: dict[str, Any] = {"key": key, "variant": cell.parent.name, "seed": seed, "budget": 1.0}
            write_record(cell, record_file(kept, key), **what)
        (kept / "study.json").write_text(json.dumps({**json.loads(file.read_text()), "records": "."}))
        if (study / "tuning.json").exists():
            shutil.copy(study / "tuning.json", kept)
    shutil.copy(folder / "ladder.json", records)
    return records


def merged(capsys: pytest.CaptureFixture[str], *sources: Path, to: str = "joint") -> dict[str, Any]:
    capsys.readouterr()
    assert main(["study", "merge", *map(str, sources), "--to", to, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *sources: Path) -> str:
    """The message, after which nothing is written."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(["study", "merge", *map(str, sources), "--to", "joint"]) == 64
    assert sorted(Path().rglob("*")) == before
    return capsys.readouterr().err


def losses(folder: Path | str) -> dict[str, Any]:
    return {size.name: size.losses for size in read_ladder(Path(folder)).result.sizes}


@pytest.mark.parametrize("form", ["run folders", "records"])
def test_cells_of_two_machines_become_one_ladder(whole, capsys, form):
    a = part(whole, "a", lambda cell: "tiny" in cell and "seed-3" not in cell)
    b = part(whole, "b", lambda cell: "tiny" not in cell or "seed-3" in cell)
    found = merged(capsys, a, as_records(b) if form == "records" else b)
    assert set(found["parts"]) == {TRIAL, "sizes/tiny", "sizes/small", "sizes/medium"}
    assert [len(found["parts"][f"sizes/{name}"]["cells"]) for name in ("tiny", "small", "medium")] == [6, 4, 4]
    assert losses("joint") == losses(whole) and len(losses(whole)["tiny"]["gqa"]) == 3
    assert json.loads(Path("joint/sizes/small/tuning.json").read_text()) == tuning(dict.fromkeys(VARIANTS, 0.002))
    assert (Path("joint") / TRIAL / "cells/gqa/seed-101/summary.json").exists()
    record = json.loads(Path("joint/ladder.json").read_text())
    assert record["command"].startswith("headway study merge a ") and record["scale"] == {"train.global_batch": 0.5}
    if form == "records":
        assert Path("joint/records/sizes/small/gqa/seed-1.json").exists()


def test_a_size_that_one_folder_lacks_comes_from_the_other(whole, capsys):
    a, b = part(whole, "a", lambda cell: "tiny" in cell), part(whole, "b", lambda cell: "tiny" not in cell)
    for folder, gone in ((a, "medium"), (b, "tiny")):
        shutil.rmtree(folder / "sizes" / gone)
        record = json.loads((folder / "ladder.json").read_text())
        record["sizes"] = [size for size in record["sizes"] if size["name"] != gone]
        (folder / "ladder.json").write_text(json.dumps(record))
    merged(capsys, a, b)
    assert losses("joint") == losses(whole)


def test_the_report_of_the_joint_ladder_can_be_written(whole, capsys):
    merged(capsys, part(whole, "a", lambda cell: "seed-1" in cell), part(whole, "b", lambda cell: "seed-1" not in cell))
    assert main(["study", "report", "joint"]) == 0
    assert "3 sizes" in Path("joint/report.md").read_text()


def change(folder: Path, file: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / file).read_text())
    edit(content)
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        ("ladder.json", lambda r: r.update(scale={}), "scale: {'train.global_batch': 0.5} in a, {} in b"),
        ("ladder.json", lambda r: r["sizes"][0].update(tokens=5), "size tiny: tokens: None in a, 5 in b"),
        (
            "sizes/small/tuning.json",
            lambda r: r["keys"]["optimizer.lr"]["variants"]["gqa"].update(chosen=0.004),
            "sizes/small: tuned optimizer.lr of gqa: 0.002 in a, 0.004 in b",
        ),
        ("sizes/tiny/study.json", lambda r: r.update(margin_nats=0.5), "study: margin_nats: "),
    ],
)
def test_ladders_that_differ_are_refused(whole, capsys, file, edit, words):
    a, b = part(whole, "a", lambda cell: True), part(whole, "b", lambda cell: True)
    change(b, file, edit)
    assert words in refused(capsys, a, b)


def test_sizes_of_other_versions_are_refused(whole, capsys):
    a, b = part(whole, "a", lambda cell: "tiny" in cell), part(whole, "b", lambda cell: "tiny" not in cell)
    for card in b.rglob("run.json"):
        change(card.parent, "run.json", lambda r: r.update(versions={"headway": "9.9", "torch": "2.13.0"}))
    text = refused(capsys, a, b)
    assert "version of headway: " in text and "'9.9'" in text


def test_a_plain_study_is_no_part_of_a_ladder(whole, capsys):
    text = refused(capsys, whole, whole / "sizes" / "small")
    assert "whole has sizes or trials and whole/sizes/small has not" in text


def test_without_a_finished_cell_nothing_is_written(whole, capsys):
    assert "no finished cell to merge" in refused(capsys, part(whole, "a", lambda cell: False))
