"""Finished cells of one study from several folders become one folder with a report, or one message and nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study_folders import StudyFolder, bind, change_record

from headway.launcher.api import load_study as open_study
from headway.launcher.cli.main import main
from headway.launcher.compare.cell_record import record_file, write_record
from headway.launcher.run.run_dir import RunDir

VARIANTS = ["gqa", "rgqa-k2"]


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch):
    monkeypatch.setattr("headway.launcher.report.study.draw_all", lambda *_: [])


@pytest.fixture
def made(tmp_path, monkeypatch) -> Callable[..., StudyFolder]:
    """`made(name, seeds)`: the folder of a study with the cells of some seeds, as another machine would have it."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, seeds: list[int]) -> StudyFolder:
        folder = StudyFolder(Path(name), VARIANTS, seeds)
        folder.write()
        for variant in VARIANTS:
            for seed in seeds:
                bind(folder.run_dir(variant, seed))
                (folder.run_dir(variant, seed) / "checkpoints" / "step-1").mkdir(parents=True)
        return folder

    return make


def as_records(folder: StudyFolder) -> Path:
    """A folder of records, with the design, of the study in a folder."""
    records = Path(f"{folder.out}-records")
    for variant in VARIANTS:
        for seed in folder.seeds:
            key = f"{variant}/seed-{seed}"
            path = record_file(records, key)
            write_record(folder.run_dir(variant, seed), path, key=key, variant=variant, seed=seed, budget=1.0)
    design = json.loads((folder.out / "study.json").read_text())
    (records / "study.json").write_text(json.dumps({**design, "records": "."}))
    return records


def merged(capsys, *sources: Path | str, to: str = "joint") -> dict[str, Any]:
    capsys.readouterr()
    assert main(["study", "merge", *map(str, sources), "--to", to, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *sources: Path | str, to: str = "joint", status: int = 64) -> str:
    """The message, after which nothing is written."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(["study", "merge", *map(str, sources), "--to", to]) == status
    assert sorted(Path().rglob("*")) == before
    return capsys.readouterr().err


def losses(folder: Path | str) -> dict[tuple[str, int], float]:
    return {(c["variant"], c["seed"]): c["loss"] for c in open_study(folder).cells()}


def test_seeds_of_two_machines_become_one_study(made, capsys):
    a, b, whole = made("a", [1, 2]), made("b", [3]), made("whole", [1, 2, 3])
    outcome = {"exit_code": 0, "wall_s": 9.5, "last_lines": ["done"], "log": "/a/place/log"}
    (b.out / "outcomes.json").write_text(json.dumps({"gqa/seed-3": outcome}))
    (b.out / "matching.json").write_text("{}")
    found = merged(capsys, a.out, b.out)
    assert len(found["cells"]) == 6 and found["left_out"] == []
    assert losses("joint") == losses(whole.out)
    files = {p.name for p in Path("joint/cells/gqa/seed-3").iterdir()}
    assert files == {"spec.json", "run.json", "run_id.json", "metrics.jsonl", "summary.json"}  # no checkpoints
    outcomes = json.loads(Path("joint/outcomes.json").read_text())
    assert outcomes["gqa/seed-3"] == {"exit_code": 0, "wall_s": 9.5} and outcomes["gqa/seed-1"] == {"exit_code": 0}
    assert Path("joint/matching.json").read_text() == "{}"
    capsys.readouterr()
    assert main(["study", "report", "joint", "--json"]) == 0
    variants = json.loads(capsys.readouterr().out)["variants"]
    assert [v["validation_loss"]["n"] for v in variants] == [3, 3]
    assert main(["study", "report", str(whole.out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variants"] == variants


def test_records_and_run_folders_are_merged_alike(made, capsys):
    a, b = made("a", [1]), made("b", [2])
    records = as_records(b)
    shutil.rmtree(b.out)
    found = merged(capsys, a.out, records)
    assert {c["cell"]: c["record"] for c in found["cells"]} == {
        "gqa/seed-1": False,
        "rgqa-k2/seed-1": False,
        "gqa/seed-2": True,
        "rgqa-k2/seed-2": True,
    }
    assert losses("joint") == losses(made("whole", [1, 2]).out)
    again = merged(capsys, "joint", to="again")  # what was merged can be merged
    assert len(again["cells"]) == 4 and losses("again") == losses("joint")


def test_ls_counts_records_and_rm_deletes_what_was_merged(made, capsys):
    a, b = made("a", [1]), made("b", [2])
    merged(capsys, a.out, as_records(b))
    assert main(["ls", "joint", "--json"]) == 0
    study = json.loads(capsys.readouterr().out)[0]
    assert (study["state"], study["cells_done"], study["tokens"]) == ("done", 4, 4 * 40_000)
    Path("joint/records/gqa/notes.txt").touch()
    assert main(["rm", "joint", "--yes"]) == 64
    assert "notes.txt: is not of Headway" in capsys.readouterr().err
    Path("joint/records/gqa/notes.txt").unlink()
    assert main(["rm", "joint", "--yes"]) == 0 and not Path("joint").exists()


def test_cells_without_a_design_use_that_of_another_folder(made, capsys):
    a, b = made("a", [1, 2]), made("b", [1, 2])
    for seed, folder in ((2, a), (1, b)):
        for variant in VARIANTS:
            shutil.rmtree(folder.run_dir(variant, seed))
    (b.out / "study.json").unlink()
    assert len(merged(capsys, a.out, b.out / "cells")["cells"]) == 4
    assert "none of the folders has a study.json" in refused(capsys, b.out, to="other")


def test_a_study_file_names_its_folder(made, capsys):
    a = made("a", [1])
    Path("base.yaml").write_text("data: {seq_len: 32}\n")
    text = "study: demo\nbase: base.yaml\nout: a\nseeds: [1]\nvariants: {gqa: {attention.type: gqa}}\n"
    Path("demo.yaml").write_text(text)
    assert len(merged(capsys, "demo.yaml")["cells"]) == 2
    shutil.rmtree(a.out)
    assert "no study was started in a" in refused(capsys, "demo.yaml", to="other")


def test_unfinished_and_damaged_cells_are_named_and_left_out(made, capsys):
    a = made("a", [1, 2])
    (a.run_dir("gqa", 1) / "summary.json").unlink()
    metrics = a.run_dir("rgqa-k2", 2) / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    found = merged(capsys, a.out)
    assert {c["cell"] for c in found["cells"]} == {"gqa/seed-2", "rgqa-k2/seed-1"}
    assert {(one["key"], one["state"]) for one in found["left_out"]} == {
        ("gqa/seed-1", "partial"),
        ("rgqa-k2/seed-2", "damaged"),
    }
    states = {f"{c['variant']}/seed-{c['seed']}": c["state"] for c in open_study("joint").cells()}
    assert states["gqa/seed-1"] == "missing" and states["rgqa-k2/seed-2"] == "missing"
    main(["study", "merge", str(a.out), "--to", "other"])
    assert "left out: rgqa-k2/seed-2 of a: damaged: metrics.jsonl has" in capsys.readouterr().out


def test_a_whole_copy_replaces_a_damaged_one(made, capsys):
    a, b = made("a", [1]), made("b", [1])
    (a.run_dir("gqa", 1) / "metrics.jsonl").unlink()
    found = merged(capsys, a.out, b.out)
    assert {c["cell"]: c["from"] for c in found["cells"]} == {"gqa/seed-1": "b", "rgqa-k2/seed-1": "a"}


def test_a_record_cut_in_the_middle_is_named(made, capsys):
    records = as_records(made("a", [1]))
    file = records / "gqa/seed-1.json"
    file.write_text(file.read_text()[: file.stat().st_size // 2])
    found = merged(capsys, records)
    (one,) = found["left_out"]
    assert one["state"] == "damaged" and "is cut or changed" in one["detail"]
    file.unlink()
    (records / "rgqa-k2/seed-1.json").write_text("{")
    message = refused(capsys, records, to="other")
    assert "no finished cell to merge" in message and "rgqa-k2/seed-1 of a-records: damaged" in message


# ---------------------------------------------------------------- what is refused


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def other_data(b: StudyFolder) -> None:
    edit(b.run_dir("gqa", 2) / "run.json", data_fingerprint="e" * 64)


def other_torch(b: StudyFolder) -> None:
    edit(b.run_dir("gqa", 2) / "run.json", versions={"headway": "0.1.0", "torch": "3+cpu"})


def other_mechanism(b: StudyFolder) -> None:
    edit(b.run_dir("gqa", 2) / "run.json", mechanism={"package": "outside 1.0", "sources": "abc"})


def other_trained_spec(b: StudyFolder) -> None:
    spec = json.loads((b.run_dir("gqa", 2) / "spec.json").read_text())
    edit(b.run_dir("gqa", 2) / "spec.json", optimizer={**spec["optimizer"], "lr": 0.5})


def other_variant(b: StudyFolder) -> None:
    b.keys["rgqa-k2"]["attention.top_k"] = 3
    b.write_study()


def other_study(b: StudyFolder) -> None:
    change_record(b, study="another")


def other_margin(b: StudyFolder) -> None:
    change_record(b, margin_nats=0.5)


REFUSED: dict[Callable[[StudyFolder], None], str] = {
    other_data: f"cell gqa/seed-2: data fingerprint: '{'e' * 64}' in b, but '{'f' * 64}' in a (cell gqa/seed-1)",
    other_torch: "cell gqa/seed-2: version of torch: '3' in b, but '2' in a (cell gqa/seed-1)",
    other_mechanism: "cell gqa/seed-2: mechanism sources: {'package': 'outside 1.0', 'sources': 'abc'} in b, but None",
    other_trained_spec: "cell gqa/seed-2: optimizer.lr: 0.003 planned, 0.5 in b",
    other_variant: "variant rgqa-k2: keys: {'attention.type': 'rgqa', 'attention.top_k': 2} in a, {",
    other_study: "study: study: 'demo' in a, 'another' in b",
    other_margin: "study: margin_nats: None in a, 0.5 in b",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_cells_that_differ_are_refused_in_one_message(made, capsys, change):
    a, b = made("a", [1]), made("b", [2])
    change(b)
    message = refused(capsys, a.out, b.out)
    assert REFUSED[change] in message and "nothing was written" in message


def test_records_of_other_data_are_refused_too(made, capsys):
    a, b = made("a", [1]), made("b", [2])
    other_data(b)
    assert "cell gqa/seed-2: data fingerprint" in refused(capsys, a.out, as_records(b))


def test_one_cell_with_two_results_is_refused(made, capsys):
    a, b = made("a", [1]), made("b", [1])
    run = RunDir(b.run_dir("gqa", 1))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for line in lines:
        for key in ("crc", "chain"):
            line.pop(key)
        if line["kind"] == "validation" and line["step"] == 8:
            line["loss"] = 1.25
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bind(run.path)
    message = refused(capsys, a.out, b.out)
    assert "cell gqa/seed-1: validation loss at 8,000 tokens: " in message and "1.25 in b" in message
    assert "1.25 in b" in refused(capsys, a.out, as_records(b))


def test_one_cell_with_other_batches_is_refused(made, capsys):
    a, b = made("a", [1]), made("b", [1])
    shutil.rmtree(b.run_dir("gqa", 1))
    b.write_run("gqa", 1, hash_of=lambda seed, step: step)
    assert "cell gqa/seed-1: batches: a and b differ, first at step 1" in refused(capsys, a.out, b.out)


def test_what_is_no_study_is_refused(made, capsys):
    a = made("a", [1])
    assert "nowhere: no such folder" in refused(capsys, a.out, "nowhere", status=66)
    Path("empty").mkdir()
    assert "empty: has neither study.json nor cells" in refused(capsys, a.out, "empty", status=66)
    (a.out / "study.json").write_text("{")
    assert "study.json: is damaged" in refused(capsys, a.out)


def test_a_full_folder_is_not_written_into(made, capsys):
    a = made("a", [1])
    assert "--to: a exists and is not an empty folder" in refused(capsys, a.out, to="a")
    Path("empty").mkdir()
    merged(capsys, a.out, to="empty")
    assert losses("empty") == losses(a.out)


def test_a_failed_copy_leaves_nothing(made, capsys, monkeypatch):
    a = made("a", [1])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "joint")

    monkeypatch.setattr("headway.launcher.study.merge.shutil.copyfile", full)
    assert "No space left on device" in refused(capsys, a.out, status=74)


def test_a_question_that_was_late_in_one_source_is_late_in_the_joint_study(made, capsys):
    a, b = made("a", [1]), made("b", [2])
    asks = ["rgqa-k1 is better than gqa", "rgqa-k2 is better than gqa"]
    edit(a.out / "study.json", asks=asks, asked_later={asks[0]: 2})
    edit(b.out / "study.json", asks=asks, asked_later={asks[0]: 1, asks[1]: 3})
    for to, sources in (("joint", (a.out, b.out)), ("again", (b.out, a.out))):
        merged(capsys, *sources, to=to)
        assert json.loads(Path(to, "study.json").read_text())["asked_later"] == {asks[0]: 2, asks[1]: 3}


def test_a_source_that_compares_runs_at_their_own_ends_makes_the_joint_study_do_so(made, capsys):
    a, b = made("a", [1]), made("b", [2])
    edit(b.out / "study.json", compare_at="ends")
    for to, sources in (("joint", (a.out, b.out)), ("again", (b.out, a.out))):
        merged(capsys, *sources, to=to)
        assert json.loads(Path(to, "study.json").read_text())["compare_at"] == "ends"
    merged(capsys, a.out, to="alone")
    assert "compare_at" not in json.loads(Path("alone/study.json").read_text())
