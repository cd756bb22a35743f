"""Runs and studies from Python: what docs/python.md shows works as it says, on runs that were really trained."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway.launcher import api
from headway.launcher.api import load_run
from headway.launcher.api import load_study as open_study
from headway.launcher.base.errors import NoInputError, SpecError, exit_code
from headway.launcher.run.run_dir import write_json
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.run.weights import find_checkpoint, load_decoder
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import plan_study, study_record

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
STUDY = """
study: small
base: tiny.yaml
seeds: [1, 2]
variants:
  gqa: {attention.type: gqa}
  routed: {attention.type: rgqa}
"""
SHORT = ("train.tokens=1024", "train.validate_every_tokens=512", "checkpoint.every_tokens=512")


@pytest.fixture(scope="module")
def folder(headway_once) -> Path:
    """A working folder with runs/tiny and the finished study studies/small."""
    root = headway_once.folder
    done = headway_once.train(*SHORT)
    assert done.returncode == 0, done.stderr
    (root / "small.yaml").write_text(STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        plan = plan_study(load_study(Path("small.yaml")), SHORT)
    record = study_record(plan)
    (root / "studies" / "small").mkdir(parents=True)
    write_json(root / "studies" / "small" / "study.json", record)
    for cell in record["cells"]:
        done = headway_once.train(*cell["overrides"])
        assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def run(folder) -> api.Run:
    return load_run(folder / "runs" / "tiny")


@pytest.fixture
def study(folder) -> api.Study:
    return open_study(folder / "studies" / "small")


def test_every_example_of_the_page_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names: dict = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, str(PAGE), "exec"), names)  # noqa: S102
    assert len(SNIPPETS) >= 7
    assert names["run"].spec["attention"]["type"] == "rgqa" and names["run"].summary["complete"] is True
    assert len(names["losses"]) == 4 and names["best"] in (2, 4)
    assert names["model"].step == 4 and names["older"].step == names["steps"][-1] < 4
    assert names["text"].startswith("5 7 9 ") and len(names["text"].split()) == 11
    assert names["study"].variants == ["gqa", "routed"] and names["unfinished"] == []
    assert "routed: " in capsys.readouterr().out


def test_the_examples_of_the_docstring_are_those_of_the_page():
    lines = [line.strip() for line in (api.__doc__ or "").splitlines() if line.startswith("    ")]
    assert [line.partition(" = ")[0] for line in lines] == ["run", "losses", "text", "study", "rows", "best"]
    calls = re.findall(r"\.(\w+)\(", "\n".join(lines))
    assert all(f".{call}(" in PAGE.read_text() for call in calls)


def test_metrics_are_the_records_with_a_repeated_step_once(run, tmp_path):
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in run.metrics()] == [r["loss"] for r in records if r["kind"] == "train"]
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "spec.json").write_text((run.path / "spec.json").read_text())
    lines = [{"kind": "train", "step": s, "loss": x} for s, x in ((1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5))]
    lines[1]["extra"] = 1
    (copy / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "tra')
    rows = load_run(copy).metrics()
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 3.0), (2, 2.5), (3, 1.0)]
    writer = csv.DictWriter(io.StringIO(), list(run.metrics()[0]))
    writer.writerows(run.metrics())
    assert load_run(copy).metrics("validation") == [] and load_run(copy).summary == {}
    with pytest.raises(SpecError, match="no records of kind 'trian'; use one of: train"):
        load_run(copy).metrics("trian")


def test_logits_are_those_of_the_checkpoint(run):
    model = run.model(step=2)
    spec = stored_spec(run._run)
    decoder = load_decoder(spec, find_checkpoint(run._run, 2))
    ids = [1, 5, 9, 2]
    expected = decoder.logits(torch.tensor([ids]))
    assert torch.equal(model.logits([ids]), expected) and torch.equal(model.logits(ids), expected[0])
    assert torch.equal(model(torch.tensor(ids)), expected[0])
    assert not torch.equal(run.model().logits(ids), expected[0])
    assert not model.decoder.training and model.decode(model.encode("1 5")) == "1 5"


def test_generation_is_that_of_the_command(run, headway_once):
    done = headway_once.run("generate", "runs/tiny", "5 7 9", "--tokens", "6", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert run.model().generate("5 7 9", tokens=6) == done.stdout.strip()


@pytest.mark.parametrize("ids", [[], [[1, 2], [3]], [0.5], ["a"], [-1], [32], [[[1]]], [True]])
def test_ids_that_are_none_are_refused_with_what_to_give(run, ids):
    with pytest.raises(SpecError, match=r"ids: .*; give "):
        run.model().logits(ids)


def test_the_comparison_has_the_numbers_of_the_analysis(study):
    result, rows = study.result(), study.comparison()
    assert [row["variant"] for row in rows] == ["gqa", "routed"] and [row["baseline"] for row in rows] == [True, False]
    (routed,) = result.others
    assert routed.difference is not None
    assert (rows[1]["difference"], rows[1]["difference_low"], rows[1]["difference_high"]) == (
        routed.difference.mean,
        routed.difference.low,
        routed.difference.high,
    )
    assert rows[0]["difference"] is None and rows[1]["seeds"] == 2 and rows[1]["pairing"] == "PAIRED"
    losses = {(cell["variant"], cell["seed"]): cell["loss"] for cell in study.cells()}
    paired = [losses["routed", seed] - losses["gqa", seed] for seed in (1, 2)]
    assert rows[1]["difference"] == pytest.approx(sum(paired) / 2, rel=1e-12)
    assert rows[0].keys() == rows[1].keys()


def test_runs_of_a_study_are_those_that_were_started(study, folder, tmp_path):
    assert set(study.runs) == {(variant, seed) for variant in ("gqa", "routed") for seed in (1, 2)}
    assert study.runs["routed", 2].spec["attention"]["type"] == "rgqa"
    (tmp_path / "study.json").write_text((study.path / "study.json").read_text())
    empty = open_study(tmp_path)
    assert empty.runs == {} and {cell["state"] for cell in empty.cells()} == {"missing"}
    assert [row["difference"] for row in empty.comparison()] == [None, None]


@pytest.mark.parametrize(
    ("opens", "place", "words"),
    [
        (load_run, "nowhere", ["no such folder", "absolute"]),
        (load_run, "tiny.yaml", ["is a file", "folder of a run"]),
        (load_run, "runs", ["no spec.json", "`headway train`"]),
        (load_run, "studies/small", ["folder of a study", "load_study", "cells/VARIANT/seed-N"]),
        (open_study, "nowhere", ["no such folder"]),
        (open_study, "small.yaml", ["is a file", "folder of a study"]),
        (open_study, "studies", ["no study.json", "`headway study run`"]),
        (open_study, "runs/tiny", ["folder of one run", "load_run"]),
    ],
)
def test_a_folder_of_another_kind_is_named_with_the_way_on(folder, opens, place, words):
    with pytest.raises(NoInputError) as caught:
        opens(folder / place)
    assert all(word in str(caught.value) for word in [place, *words])


def test_what_is_not_there_or_damaged_is_a_mistake_with_a_status(run, tmp_path):
    with pytest.raises(NoInputError, match="no checkpoint of step 3"):
        run.model(step=3)
    (tmp_path / "spec.json").write_text("{")
    broken = load_run(tmp_path)
    with pytest.raises(SpecError, match=r"spec\.json: is no whole JSON object"):
        _ = broken.spec
    with pytest.raises(SpecError):
        broken.model()
    (tmp_path / "spec.json").write_text((run.path / "spec.json").read_text())
    with pytest.raises(Exception, match="no checkpoint") as caught:
        load_run(tmp_path).model()
    assert exit_code(caught.value) == 74 and load_run(tmp_path).checkpoints() == []


def test_torch_is_not_imported_before_a_model_is_asked_for(folder):
    code = """
import sys
from headway.launcher.api import load_run, load_study as open_study
run, study = load_run("runs/tiny"), open_study("studies/small")
run.spec, run.card, run.summary, run.metrics(), run.checkpoints()
study.variants, study.cells(), study.comparison(), study.runs
print([name for name in ("torch", "deepspeed", "matplotlib") if name in sys.modules])
run.model()
print("torch" in sys.modules, "deepspeed" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "True False"]


def test_the_notebook_runs_from_top_to_bottom(folder, monkeypatch):
    pytest.importorskip("pandas")
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(folder)
    names = {}
    for cell in json.loads((PAGE.parent / "examples" / "runs.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # noqa: S102
    assert len(names["metrics"]) == len(names["run"].metrics()) and set(names["cells"].variant) == {"gqa", "routed"}
    assert names["logits"].shape == (3, 32) and names["text"].startswith("5 7 9 ")


def test_without_pandas_a_frame_says_what_to_do(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SpecError, match="pip install pandas"):
        run.frame()
