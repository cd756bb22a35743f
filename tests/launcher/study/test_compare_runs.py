"""Any runs become a report: variants by their specs, pairs by their batches; what cannot be compared is one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from study_folders import StudyFolder, bind, first_table

from headway.launcher.api import load_study as open_study
from headway.launcher.cli.main import main
from headway.launcher.study.compare_runs import variant_names

COST = {
    "num_params": 100_000,
    "params_by_part": {},
    "flops_per_token_useful": 2.0e6,
    "flops_per_token_executed": 2.2e6,
    "kv_bytes_per_token": 512,
}


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch):
    monkeypatch.setattr("headway.launcher.report.study.draw_all", lambda *_: [])


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., Path]:
    """`run(path, variant, seed)`: the folder of a finished run that no study planned."""
    monkeypatch.chdir(tmp_path)

    def make(path: str, variant: str = "gqa", seed: int = 1, *, card: dict[str, Any] | None = None, **more) -> Path:
        folder = StudyFolder(tmp_path / "made", [variant], [seed])
        folder.write_run(variant, seed, **more)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        made = folder.run_dir(variant, seed).rename(path)
        edit(made / "run.json", cost=COST, **(card or {}))
        edit(made / "spec.json", name=made.name)
        bind(made)
        return Path(path)

    return make


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def edit_spec(run: Path, section: str, **keys: Any) -> None:
    spec = json.loads((run / "spec.json").read_text())
    edit(run / "spec.json", **{section: spec[section] | keys})


def compared(capsys, *words: object, out: str = "report") -> dict[str, Any]:
    capsys.readouterr()
    assert main(["compare", *map(str, words), "--out", out, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words: object, status: int = 64) -> str:
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(["compare", *map(str, words)]) == status
    assert sorted(Path().rglob("*")) == before  # nothing was written
    return capsys.readouterr().err


def test_runs_of_one_spec_are_one_variant_and_pairs_are_found(run, capsys):
    runs = [run(f"runs/{v}.s{s}", v, s) for v in ("gqa", "rgqa-k2") for s in (1, 2, 3)]
    found = compared(capsys, *runs)
    assert found["pairing"] == "PAIRED" and found["baseline"] == "gqa"
    assert {v["name"]: v["validation_loss"]["n"] for v in found["variants"]} == {"gqa": 3, "rgqa-k2": 3}
    study = StudyFolder(Path("study"), ["gqa", "rgqa-k2"], [1, 2, 3])
    study.write()
    assert main(["study", "report", "study", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["variants"]
    for key in ("validation_loss", "difference", "speed_ratio"):
        assert [v[key] for v in found["variants"]] == [v[key] for v in planned]
    page = Path("report/report.md").read_text()
    assert page.startswith("# Comparison report")
    assert "| rgqa-k2 | `attention.type` | gqa | rgqa | intervention | the runs differ in it |" in page
    assert "confounds: see" not in page and "may have shared the machine" in page


def test_the_baseline_is_the_variant_of_a_named_run(run, capsys):
    a, b, c = run("runs/a"), run("runs/b", "rgqa-k2"), run("runs/c", "rgqa-k2", 2)
    assert compared(capsys, a, b, c)["baseline"] == "a"
    found = compared(capsys, a, b, c, "--baseline", c, out="other")
    assert found["baseline"] == "b" and [v["name"] for v in found["variants"]] == ["a", "b"]
    (other,) = [v for v in found["variants"] if v["difference"] is not None]
    assert other["name"] == "a"


def test_runs_on_the_same_data_are_paired_whatever_their_seeds(run, capsys):
    a, b = run("runs/a", "gqa", 1), run("runs/b", "rgqa-k2", 1)
    edit(b / "spec.json", seed=7)
    found = compared(capsys, a, b)
    assert found["pairing"] == "PAIRED"
    assert "| b | `seed` | 1 | 7 | CONFOUND |" in Path("report/report.md").read_text()


def test_runs_on_other_batches_are_unpaired(run, capsys):
    runs = [run("runs/a.s1", "gqa", 1), run("runs/a.s2", "gqa", 2)]
    runs += [run(f"runs/b.s{s}", "rgqa-k2", s, hash_of=lambda seed, step: 77 * seed + step) for s in (3, 4)]
    found = compared(capsys, *runs)
    assert found["pairing"] == "UNPAIRED"
    (difference,) = [v["difference"] for v in found["variants"] if v["difference"]]
    assert difference["low"] is not None and difference["n"] == 2
    assert "UNPAIRED: variants did not read the same data" in Path("report/report.md").read_text()


def test_one_run_per_variant_has_no_interval(run, capsys):
    compared(capsys, run("runs/a"), run("runs/b", "rgqa-k2"))
    page = Path("report/report.md").read_text()
    assert first_table(page)["b"][0].startswith("undecided")
    (row,) = open_study("report").comparison()[1:]
    assert row["difference"] is not None and row["difference_low"] is None


def test_an_unfinished_run_is_named_and_in_no_number(run, capsys):
    runs = [run("runs/a"), run("runs/b", "rgqa-k2"), run("runs/c.s2", "rgqa-k2", 2, steps=9)]
    found = compared(capsys, *runs)
    assert [v["validation_loss"]["n"] for v in found["variants"]] == [1, 1]
    assert "1 of 3 cells are not in the numbers below" in Path("report/report.md").read_text()


def test_a_comparison_can_be_repeated_and_names_its_own_folder(run, capsys):
    a, b = run("runs/a"), run("runs/b", "rgqa-k2")
    for _ in range(2):
        assert main(["compare", str(a), str(b)]) == 0
    assert Path("comparisons/a-b/report.html").exists()
    assert main(["study", "report", "comparisons/a-b"]) == 0
    assert "report: comparisons/a-b/report.html" in capsys.readouterr().out


def test_layouts_and_speed_options_tell_variants_apart_and_bookkeeping_does_not(run, capsys):
    a, b, c = run("runs/a", seed=1), run("runs/b", seed=1), run("runs/c", seed=2)
    edit(a / "spec.json", speed={"matmul": "spec"}, tracking={"log_every_steps": 1})
    edit(b / "spec.json", speed={"matmul": "fp8"}, tracking={"log_every_steps": 1})
    edit(c / "spec.json", speed={"matmul": "fp8"}, tracking={"log_every_steps": 9})
    found = compared(capsys, a, b, c)
    assert sorted(v["validation_loss"]["n"] for v in found["variants"]) == [1, 2]


# ---------------------------------------------------------------- names


class Named:
    def __init__(self, name: str, path: str) -> None:
        self.path, self.spec = Path(path), {"name": name}


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        ([[("q.gqa.seed-1", "x/1"), ("q.gqa.seed-2", "x/2")], [("q.sqa.seed-1", "x/3")]], ["q.gqa", "q.sqa"]),
        ([[("gqa-1", "1"), ("gqa-12", "2")], [("rgqa-s1", "3"), ("rgqa-s2", "4")]], ["gqa", "rgqa"]),
        ([[("tiny", "runs/a")], [("tiny", "runs/b")]], ["a", "b"]),
        ([[("tiny", "cells/gqa/seed-1")], [("tiny", "cells/sqa/seed-1")]], ["gqa", "sqa"]),
        ([[("tiny", "one/run")], [("tiny", "two/run")]], ["run-1", "run-2"]),
        ([[("", "_")], [("", "b")]], ["run-1", "b-2"]),
        ([[("a", "a")], [("b", "b"), ("c", "c")]], ["a", "b"]),
    ],
)
def test_variants_are_named_by_their_specs_or_folders(groups, names):
    made: list[list[Any]] = [[Named(*run) for run in group] for group in groups]
    assert variant_names(made) == names


# ---------------------------------------------------------------- what is refused


def test_one_run_or_one_spec_is_nothing_to_compare(run, capsys):
    a, b = run("runs/a", seed=1), run("runs/b", seed=2)
    assert "runs/a: one run alone has nothing to be compared with" in refused(capsys, a)
    assert "runs/a: is given twice" in refused(capsys, a, a)
    assert "the specs of all 2 runs are equal but for their seeds" in refused(capsys, a, b)


def test_a_repeated_seed_is_refused(run, capsys):
    runs = [run("runs/a"), run("runs/b", "rgqa-k2"), run("runs/c", "rgqa-k2")]
    assert "runs/c and runs/b have one spec and one seed" in refused(capsys, *runs)


def test_what_is_no_run_is_refused(run, capsys):
    a = run("runs/a")
    Path("empty").mkdir()
    assert "empty has no spec.json" in refused(capsys, a, "empty", status=66)
    assert "nowhere: no such folder" in refused(capsys, a, "nowhere", status=66)
    b = run("runs/b", "rgqa-k2")
    assert "--baseline: empty is not one of the runs" in refused(capsys, a, b, "--baseline", "empty")
    (b / "spec.json").write_text("{")
    assert "runs/b/spec.json: is damaged" in refused(capsys, a, b)


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "data": (lambda r: edit(r / "run.json", data_fingerprint="e" * 64), f"runs/b has data_fingerprint {'e' * 64}"),
    "vocabulary": (lambda r: edit(r / "run.json", vocab_size=99), "runs/b has vocab_size 99, runs/a has 512"),
    "validation": (lambda r: edit_spec(r, "train", validation_tokens=7), "runs/b has train.validation_tokens 7"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_losses_of_other_text_are_refused(run, capsys, name):
    change, says = OTHERS[name]
    a, b = run("runs/a"), run("runs/b", "rgqa-k2")
    change(b)
    message = refused(capsys, a, b)
    assert says in message and "cannot be compared" in message


def test_other_synthetic_tasks_are_refused(run, capsys):
    a, b = run("runs/a"), run("runs/b", "rgqa-k2")
    for r, pairs in ((a, 4), (b, 8)):
        edit(r / "run.json", data_fingerprint=None)
        edit_spec(r, "data", source={"type": "synthetic", "task": "mqar", "pairs": pairs})
    assert "runs/b has data.source.pairs 8, runs/a has 4" in refused(capsys, a, b)


def test_without_two_finished_variants_there_is_no_report(run, capsys):
    a, b = run("runs/a"), run("runs/b", "rgqa-k2", steps=9)
    message = refused(capsys, a, b)
    assert "fewer than two variants have a finished run" in message and "runs/b: partial" in message


def test_the_folder_of_something_else_is_not_written_into(run, capsys):
    a, b = run("runs/a"), run("runs/b", "rgqa-k2")
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    assert "out: mine is not the folder of a comparison" in refused(capsys, a, b, "--out", "mine")
    StudyFolder(Path("study"), ["gqa"], [1]).write()
    assert "--out: study is the folder of a study" in refused(capsys, a, b, "--out", "study")
