"""A report from records of cells has the numbers of the report from their run folders."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from study_folders import STEPS, TOKENS_PER_STEP, StudyFolder, bind, change_record, change_summary, with_start

from headway.launcher.compare.analyse import analyse
from headway.launcher.compare.cell_record import (
    CellRecord,
    DamagedRecord,
    NoRecordError,
    read_record,
    record_file,
    record_of,
    write_record,
)
from headway.launcher.compare.fairness import run_differences
from headway.launcher.report.charts import chart_json
from headway.launcher.report.plots import study as plots
from headway.launcher.report.plots.heads import draw_heads
from headway.launcher.report.study import report
from headway.launcher.run.lines import encode
from headway.launcher.run.records import read_run
from headway.launcher.run.run_dir import RunDir

VARIANTS, SEEDS, BUDGETS = ["gqa", "rgqa-k1", "switchhead"], [1, 2], (0.25, 0.5, 1.0)


def keep(folder: StudyFolder, variant: str, seed: int, budget: float = 1.0) -> None:
    """Replace a run folder by its record."""
    run = folder.run_dir(variant, seed, budget)
    key = f"{run.parent.name}/{run.name}"
    path = record_file(folder.out / "records", key)
    write_record(run, path, key=key, variant=variant, seed=seed, budget=budget)
    shutil.rmtree(run)


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, Path]:
    """The study folder with run folders, and the same study with records alone."""
    made = []
    for name in ("folders", "records"):
        folder = StudyFolder(tmp_path_factory.mktemp(name) / "demo", VARIANTS, SEEDS, BUDGETS)
        folder.write()
        change_record(folder, records="records")
        with_start(folder, "gqa", 0.3)
        for variant in VARIANTS:
            for seed in SEEDS:
                for budget in BUDGETS:
                    bind(folder.run_dir(variant, seed, budget))
                    if name == "records":
                        keep(folder, variant, seed, budget)
        made.append(folder.out)
    return made[0], made[1]


def test_every_table_and_sentence_is_the_same(both, monkeypatch):
    monkeypatch.setattr("headway.launcher.report.study.draw_all", lambda *_: [])  # compared below
    pages = []
    for out in both:
        report(out)
        pages.append((out / "report.md").read_text().partition("## Provenance"))
    assert pages[0][0] == pages[1][0] and "Routers and heads" in pages[0][0]
    assert "18 of 18 cells were read from their records" in pages[1][2] and "from their records" not in pages[0][2]
    for name in ("report.csv", "routers.csv", "heads.csv"):
        one, other = ([{k: v for k, v in row.items() if k != "run_dir"} for row in rows(out / name)] for out in both)
        assert one == other and one
    curves = [rows(out / "curves.csv") for out in both]
    one, other = ([r for r in found if r["kind"] == "validation"] for found in curves)
    assert one == other and one
    assert {r["kind"] for r in curves[1]} == {"validation", "train-mean"}


@pytest.mark.parametrize("validations", [True, False], ids=["validation curves", "training curves"])
def test_every_figure_is_the_same(both, monkeypatch, validations):
    drawings = []
    for out in both:
        result = analyse(out)
        if not validations:  # then the loss is that of training
            monkeypatch.setattr(plots, "ENOUGH", 10**6)
        for draw in (plots._loss, plots._effects, plots.draw_trend, plots.draw_pareto, draw_heads):
            drawing = draw(result)
            assert drawing is not None and drawing.chart is not None, draw
            drawings.append((chart_json(drawing.chart), drawing.caption))
    half = len(drawings) // 2
    assert drawings[:half] == drawings[half:]


def long_run(path: Path, steps: int) -> Path:
    """A run folder of 8 routed layers with 40 validations."""
    folder = StudyFolder(path / "demo", ["switchhead"], [1])
    folder.write()
    run = folder.run_dir("switchhead", 1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rng, heads, router = np.random.default_rng(0), {}, {}
    for layer in range(8):
        heads[f"layer_{layer:02d}"] = {"member": "value expert", "members": 4} | dict(
            zip(("c_w", "c_q", "c_o", "effective_rank", "cka"), rng.random(5).tolist(), strict=True)
        )
        router[f"layer_{layer:02d}"] = StudyFolder.routers("switchhead", layer)
    first = next(line for line in lines if line["kind"] == "train")
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            at = {"step": step, "tokens": step * TOKENS_PER_STEP, "train_s": step * 0.31 + float(rng.random())}
            record = {**first, **at, "loss": float(rng.random()), "batch_hash": f"{step:016x}", "router": router}
            record |= {"step_s": float(rng.random()), "data_s": float(rng.random()), "grad_norm": float(rng.random())}
            file.write(encode(record) + "\n")
            if step % (steps // 40) == 0:
                validation = {"kind": "validation", **at, "loss": float(rng.random()), "accuracy": float(rng.random())}
                validation |= {"targets": 20477, "standard_error": float(rng.random()), "documents": 20}
                file.write(encode(validation) + "\n")
                file.write(encode({"kind": "heads", **at, "layers": heads}) + "\n")
    change_summary(run, steps=steps, tokens=steps * TOKENS_PER_STEP, final_validation_loss=None)
    bind(run)
    return run


def test_a_record_of_ten_thousand_steps_is_small(tmp_path):
    run = long_run(tmp_path, 10_000)
    path = tmp_path / "record.json"
    write_record(run, path, key="switchhead/seed-1", variant="switchhead", seed=1, budget=1.0)
    found = read_record(path, "switchhead/seed-1")
    assert isinstance(found, CellRecord) and found.steps.count == 10_000 and len(found.run.validation) == 40
    assert found.chain == json.loads((run / "summary.json").read_text())["records"]

    assert path.stat().st_size < 30_000
    assert (run / "metrics.jsonl").stat().st_size > 10_000_000


# ---------------------------------------------------------------- pairing


@pytest.fixture
def pair(tmp_path, monkeypatch) -> StudyFolder:
    monkeypatch.setattr("headway.launcher.report.study.draw_all", lambda *_: [])
    folder = StudyFolder(tmp_path / "demo", ["gqa", "rgqa-k2"], [1])
    folder.write_study()
    change_record(folder, records="records")
    return folder


@pytest.mark.parametrize("kept", [["gqa"], ["rgqa-k2"], ["gqa", "rgqa-k2"]], ids=lambda kept: "+".join(kept))
def test_a_difference_in_one_batch_is_found_from_records(pair, kept):
    pair.write_run("gqa", 1)
    pair.write_run("rgqa-k2", 1, hash_of=lambda seed, step: seed * 1000 + step + (step == 23))
    for variant in kept:
        keep(pair, variant, 1)
    pairing = analyse(pair.out).pairing
    assert pairing.status == "UNPAIRED"
    assert "first at step 23" in pairing.lines[0]  # 40 steps: every one is a mark


def test_an_unfinished_folder_is_compared_with_a_record(pair):
    pair.write_run("gqa", 1)
    keep(pair, "gqa", 1)
    pair.write_run("rgqa-k2", 1, steps=17)
    assert analyse(pair.out).pairing.lines[0] == "seed 1: rgqa-k2 and gqa: 17 common steps, all hashes equal"


# ---------------------------------------------------------------- what is no record


def test_of_an_unfinished_or_damaged_run_no_record_is_made(pair):
    pair.write_run("gqa", 1, steps=STEPS // 2)
    args = {"key": "gqa/seed-1", "variant": "gqa", "seed": 1, "budget": 1.0}
    with pytest.raises(NoRecordError, match="not finished"):
        record_of(pair.run_dir("gqa", 1), **args)
    pair.write_run("rgqa-k2", 1)
    run = RunDir(pair.run_dir("rgqa-k2", 1))
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:1] + lines[2:]))
    with pytest.raises(NoRecordError, match="no record of step"):
        record_of(run.path, **args)


def test_starts_that_changed_nothing_are_left_out_of_a_record(pair, tmp_path):
    pair.write_run("gqa", 1)
    card = json.loads((pair.run_dir("gqa", 1) / "run.json").read_text())
    start = {"git_commit": "a", "machine": {"cpu": "one"}, "layout": "1 process"}
    starts = [{**start, "from_step": step} for step in range(0, 30, 10)]
    starts += [{**start, "layout": "2 processes", "from_step": 30}, {**start, "git_commit": "b", "from_step": 35}]
    (pair.run_dir("gqa", 1) / "run.json").write_text(json.dumps({**card, "attempts": starts}))
    lines = run_differences({"gqa/seed-1": read_run(pair.run_dir("gqa", 1))})
    assert lines == ["git_commit changed within gqa/seed-1: a from step 0, b from step 35"]
    path = tmp_path / "r.json"
    write_record(pair.run_dir("gqa", 1), path, key="gqa/seed-1", variant="gqa", seed=1, budget=1.0)
    found = read_record(path)
    assert isinstance(found, CellRecord)
    assert [a["from_step"] for a in found.run.run["attempts"]] == [0, 30, 35]
    assert run_differences({"gqa/seed-1": found.run}) == lines


def test_numbers_that_are_not_finite_come_back(pair, tmp_path):
    pair.write_run("gqa", 1)
    run = RunDir(pair.run_dir("gqa", 1))
    text = run.metrics.read_text()
    value = json.loads(text.splitlines()[2])["loss"]
    run.metrics.write_text(text.replace(f'"loss": {value}', '"loss": Infinity', 1))
    path = tmp_path / "r.json"
    write_record(run.path, path, key="gqa/seed-1", variant="gqa", seed=1, budget=1.0)
    assert "Infinity" not in path.read_text() and "NaN" not in path.read_text()
    found = read_record(path)
    assert isinstance(found, CellRecord) and np.isinf(found.run.train.loss).sum() == 1
    assert np.isnan(found.run.accuracy).all()  # this run did not record it


def test_a_record_whose_parts_do_not_fit_is_damaged(pair, tmp_path):
    from headway.launcher.compare.cell_record import record_text

    pair.write_run("gqa", 1)
    content = record_of(pair.run_dir("gqa", 1), key="gqa/seed-1", variant="gqa", seed=1, budget=1.0)
    for broken in (
        {**content, "validation": {**content["validation"], "loss": [1.0]}},
        {**content, "batches": [1, 2]},
        {k: v for k, v in content.items() if k != "train"},
        {**content, "spec": [1]},
        {**content, "cell": {**content["cell"], "seed": "1"}},
    ):
        path = tmp_path / "broken.json"
        path.write_text(record_text(broken))
        found = read_record(path)
        assert isinstance(found, DamagedRecord) and "no whole record" in found.why
