"""A cell whose records are not what its run wrote is named, and is in no number of the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study_folders import StudyFolder, bind, change_summary

from headway.launcher.api import load_run
from headway.launcher.api import load_study as open_study
from headway.launcher.cli.main import main
from headway.launcher.report import study as report_module
from headway.launcher.run.record_check import UNCHECKED, check_records
from headway.launcher.run.run_dir import RunDir

VARIANTS, SEEDS = ["gqa", "rgqa-k2", "switchhead"], [1, 2, 3]
BAD = "rgqa-k2/seed-2"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> StudyFolder:
    monkeypatch.setattr(report_module, "draw_all", lambda *_: [])  # the figures are not looked at here
    made = StudyFolder(tmp_path / "demo", VARIANTS, SEEDS)
    made.write()
    for variant in VARIANTS:
        for seed in SEEDS:
            bind(made.run_dir(variant, seed))
    variants = json.dumps({name: made.keys[name] for name in VARIANTS})
    text = f"study: demo\nbase: base.yaml\nout: {made.out}\nseeds: {SEEDS}\nvariants: {variants}\n"
    (tmp_path / "demo.yaml").write_text(text)
    (tmp_path / "base.yaml").write_text("data: {seq_len: 32}\n")
    return made


def told(folder: StudyFolder, capsys) -> tuple[dict[str, Any], str, dict[str, dict[str, Any]], str]:
    """Output of `study report --json`, the page, the cells of `study status --json`, and what stderr says."""
    file = str(folder.out.parent / "demo.yaml")
    capsys.readouterr()
    assert main(["study", "report", file, "--json"]) == 0
    report = capsys.readouterr()
    assert main(["study", "status", file, "--json"]) == 0
    cells = {c["cell"]: c for c in json.loads(capsys.readouterr().out)["cells"]}
    return json.loads(report.out), (folder.out / "report.md").read_text(), cells, report.err


def lines_of(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines(keepends=True)


def put(run: Path, lines: list[str]) -> None:
    (run / "metrics.jsonl").write_text("".join(lines))


def last_validation_removed(run: Path) -> None:
    lines = lines_of(run)
    (place,) = [i for i, line in enumerate(lines) if '"validation"' in line and '"step": 40,' in line]
    put(run, lines[:place] + lines[place + 1 :])


def last_line_torn(run: Path) -> None:
    lines = lines_of(run)
    put(run, [*lines[:-1], lines[-1][:30]])


def middle_removed(run: Path) -> None:
    lines = lines_of(run)
    (place,) = [i for i, line in enumerate(lines) if '"validation"' in line and '"step": 20,' in line]
    put(run, lines[:place] + lines[place + 1 :])


def first_removed(run: Path) -> None:
    put(run, lines_of(run)[1:])


def line_changed(run: Path) -> None:
    lines = lines_of(run)
    put(run, [*lines[:9], lines[9].replace('"step": ', '"step":  '), *lines[10:]])


def lines_swapped(run: Path) -> None:
    lines = lines_of(run)
    put(run, [*lines[:4], lines[5], lines[4], *lines[6:]])


def half_cut(run: Path) -> None:
    put(run, lines_of(run)[:30])


def metrics_missing(run: Path) -> None:
    (run / "metrics.jsonl").unlink()


def summary_of_another(run: Path) -> None:
    shutil.copy(run.parents[1] / "gqa" / "seed-1" / "summary.json", run)


def older_summary(run: Path) -> None:
    kept = {k: v for k, v in json.loads((run / "summary.json").read_text()).items() if k != "records"}
    (run / "summary.json").write_text(json.dumps(kept))


def total_changed(run: Path) -> None:
    change_summary(run, final_validation_loss=1.0)


def id_missing(run: Path) -> None:
    (run / "run_id.json").unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    last_validation_removed: "metrics.jsonl has 59 of the 60 lines that summary.json names",
    last_line_torn: "metrics.jsonl has 59 of the 60 lines",
    middle_removed: "lines were removed in 1 place",
    first_removed: "metrics.jsonl has 59 of the 60 lines",
    line_changed: "1 line is damaged",
    lines_swapped: "lines were removed in",
    half_cut: "metrics.jsonl has 30 of the 60 lines",
    metrics_missing: "metrics.jsonl is missing",
    summary_of_another: "summary.json belongs to another run",
    older_summary: "summary.json does not name the last record",
    total_changed: "summary.json says 1.0000",
    id_missing: "run_id.json is missing",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_cell_is_named_and_is_in_no_number(folder, capsys, damage):
    run = folder.run_dir("rgqa-k2", 2)
    shutil.copytree(run, whole := folder.out.parent / "whole")
    shutil.rmtree(run)
    without, *_ = told(folder, capsys)
    whole.rename(run)
    damage(run)
    with_damage, page, cells, alerts = told(folder, capsys)
    assert with_damage["variants"] == without["variants"]
    assert (with_damage["tokens"], with_damage["pairing"]) == (without["tokens"], without["pairing"])
    assert cells[BAD]["state"] == "damaged" and DAMAGES[damage] in cells[BAD]["detail"]
    assert cells[BAD]["validation_loss"] is None and cells[BAD]["training_batch_loss"] is None
    assert [key for key, c in cells.items() if c["state"] != "done"] == [BAD]
    assert page.splitlines()[2].startswith("> **DAMAGED: the records of 1 of 9 cells")
    (row,) = [line for line in page.replace("\\_", "_").splitlines() if line.startswith(f"| {BAD} | damaged |")]
    assert cells[BAD]["detail"] in row
    assert "DAMAGED: 1 of 9 cells" in alerts and BAD in alerts
    assert not [row for row in (folder.out / "curves.csv").read_text().splitlines() if row.startswith("rgqa-k2,2,")]


def test_an_undamaged_study_is_checked_whole_and_says_nothing(folder, capsys):
    report, page, cells, alerts = told(folder, capsys)
    assert [v["validation_loss"]["n"] for v in report["variants"]] == [3, 3, 3]
    assert {(c["state"], c["detail"]) for c in cells.values()} == {("done", "")}
    assert "DAMAGED" not in page + alerts and "without chained checksums" not in page


def swap(a: Path, b: Path, names: tuple[str, ...]) -> None:
    for name in names:
        one, other = (a / name).read_bytes(), (b / name).read_bytes()
        (a / name).write_bytes(other)
        (b / name).write_bytes(one)


@pytest.mark.parametrize("names", [("metrics.jsonl",), ("summary.json",), ("metrics.jsonl", "summary.json")])
@pytest.mark.parametrize("other", [("gqa", 2), ("rgqa-k2", 3)], ids=["variants", "seeds"])
def test_records_swapped_between_two_cells_are_noticed(folder, capsys, names, other):
    swap(folder.run_dir("rgqa-k2", 2), folder.run_dir(*other), names)
    report, _, cells, _ = told(folder, capsys)
    bad = {BAD, f"{other[0]}/seed-{other[1]}"}
    assert {key for key, c in cells.items() if c["state"] == "damaged"} == bad
    assert report["pairing"] == "PAIRED"
    assert sum(v["validation_loss"]["n"] for v in report["variants"]) == 7


def test_a_cell_without_a_summary_is_not_finished(folder, capsys):
    (folder.run_dir("rgqa-k2", 2) / "summary.json").unlink()
    report, page, cells, _ = told(folder, capsys)
    assert cells[BAD]["state"] == "partial" and f"| {BAD} | partial |" in page
    assert [v["validation_loss"]["n"] for v in report["variants"]] == [3, 2, 3]


def test_records_of_earlier_versions_are_read_with_a_note(folder, capsys):
    for seed in SEEDS:
        shutil.rmtree(folder.run_dir("gqa", seed))
        folder.write_run("gqa", seed)
    report, page, cells, _ = told(folder, capsys)
    assert [v["validation_loss"]["n"] for v in report["variants"]] == [3, 3, 3]
    assert {key for key, c in cells.items() if c["detail"] == UNCHECKED} == {f"gqa/seed-{seed}" for seed in SEEDS}
    assert "3 of 9 cells are of an earlier version, whose records are without chained checksums" in page
    # What their summaries say about the end of the records is compared all the same.
    last_validation_removed(folder.run_dir("gqa", 1))
    half_cut(folder.run_dir("gqa", 2))
    metrics_missing(folder.run_dir("gqa", 3))
    _, _, cells, _ = told(folder, capsys)
    assert [cells[f"gqa/seed-{seed}"]["state"] for seed in SEEDS] == ["damaged"] * 3


def test_all_readers_say_that_a_run_is_damaged(folder, capsys):
    run = folder.run_dir("rgqa-k2", 2)
    middle_removed(run)
    damage = check_records(run).damage
    assert damage is not None and load_run(run).damage == damage
    with pytest.warns(UserWarning, match="lines were removed in 1 place"):
        load_run(run).metrics("validation")
    states = {(c["variant"], c["seed"]): (c["state"], c["loss"]) for c in open_study(folder.out).cells()}
    assert states["rgqa-k2", 2] == ("damaged", None) and states["gqa", 2][0] == "done"
    capsys.readouterr()
    assert main(["ls", str(run), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["validation_loss"]) == ("damaged", None)
    assert main(["board", str(run), "--rebuild", "--no-server"]) == 0
    captured = capsys.readouterr()
    assert "lines were removed in 1 place" in captured.out and f"DAMAGED: {run}" in captured.out + captured.err


def test_records_that_are_read_without_their_run_are_left_out(folder):
    a, b = folder.run_dir("gqa", 1), folder.run_dir("gqa", 2)
    foreign = lines_of(b)[20]
    put(a, [*lines_of(a)[:20], foreign, *lines_of(a)[20:]])
    steps = [r["step"] for r in RunDir(a).read_metrics() if r["kind"] == "train"]
    assert steps == list(range(1, 41))
    assert "1 line belongs to another run" in str(check_records(a).damage)
