"""The study of learned merges (yaml/studies/wgqa-summaries*.yaml), small: from pairs to ROUGE in the report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml
from run_folders import records
from untrained_runs import decoder_of

from headway.data.config import PairsSource
from headway.launcher.compare.analyse import analyse
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.launcher.run.stored_spec import stored_spec
from headway.model.attention.wgqa import WeightedGroupedQueryAttention

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("wgqa-summaries", "wgqa-summaries-base")
TRAINED = ("gqa", "wgqa", "colwgqa")
SEEDS = (1, 2)
ALPHA = 0.1
ROUGES = ("rouge1", "rouge2", "rougeL")
CORPUS = ["corpus={type: pairs, paths: [pairs.jsonl], prompt: code, target: says}", "tokenizer.vocab_size=300"]
SHORT = [
    "data.seq_len=64",
    "schedule.warmup_tokens=256",
    "train={global_batch: 16, micro_batch: 16, validation_tokens: 1024}",
    "launch={threads: 1, device: cpu}",
]
TEACHERS = {  # heads as in the shipped specs, of which the studies keep a half or a quarter
    "summarise-teacher": ["model={width: 32, ffn_width: 48, layers: 2, init_std: 0.1}", "attention.head_dim=4"],
    "summarise-base-teacher": ["model={width: 36, ffn_width: 48, layers: 1}", "attention.head_dim=2"],
}
TOKENS = {"summarise-teacher": 40_960, "summarise-base-teacher": 10_240}


def pairs(count: int) -> list[dict[str, str]]:
    rng = Random(0)
    words = ["load", "save", "close", "open", "count", "merge"]
    chosen = [(rng.choice(words), rng.choice(words)) for _ in range(count)]
    return [{"code": f"def f{n}(): {a}({b})", "says": f"Call {a} of {b}."} for n, (a, b) in enumerate(chosen)]


@pytest.fixture(scope="module")
def place(headway_once: Any) -> Any:
    """`headway` in a folder with pairs, the two teachers, and the shipped specs and studies."""
    folder = headway_once.folder
    shutil.copytree(ROOT / "yaml", folder / "yaml")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(400)))
    commands = [["data", "build", "yaml/data/functions.yaml", *CORPUS]]
    for name, model in TEACHERS.items():
        every = [f"train.tokens={TOKENS[name]}", f"train.validate_every_tokens={TOKENS[name]}"]
        every.append(f"checkpoint.every_tokens={TOKENS[name]}")
        commands.append(["train", f"yaml/base/{name}.yaml", *model, *SHORT, *every])
    for words in commands:
        done = headway_once.run(*words)
        assert done.returncode == 0, done.stderr
    return headway_once


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_studies_fit_a_trained_teacher(place: Any, name: str) -> None:
    """All variants are planned as shipped: the conversions are possible, and cells have their share of the tokens."""
    done = place.run("study", "run", f"yaml/studies/{name}.yaml", *SHORT, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    written = yaml.safe_load((ROOT / "yaml/studies" / f"{name}.yaml").read_text())
    origins = {variant: keys["from"] for variant, keys in written["variants"].items()}
    assert [each["name"] for each in planned["variants"]] == list(origins) and planned["asks"] == written["asks"]
    for each in planned["variants"]:
        origin, keys = origins[each["name"]], each["keys"]
        assert (
            keys["train.tokens"] == max(ALPHA * TOKENS[Path(origin["run"]).name], 1024) and keys["train.validate_first"]
        )
        assert keys["init.weights"] == origin["run"]
        assert (keys["attention.type"], keys.get("attention.kv_heads")) == (
            origin["convert"]["to"],
            origin["convert"].get("kv_heads"),
        )
        assert each["uptraining"]["teacher_type"] == "mha" and each["uptraining"]["alpha"] == ALPHA
    assert len({each["cost"]["num_params"] for each in planned["variants"]}) > 4


@pytest.fixture(scope="module")
def study(place: Any) -> Path:
    """The folder of the shipped study with three of its variants, trained and evaluated."""
    file = place.folder / "yaml/studies/wgqa-summaries.yaml"
    shipped = yaml.safe_load(file.read_text())
    shipped["variants"] = {name: shipped["variants"][name] for name in TRAINED}
    shipped["asks"] = [text for text in shipped["asks"] if text.split()[0] in TRAINED]
    assert shipped["seeds"] == [*SEEDS] and shipped["baseline"] == "gqa" and len(shipped["asks"]) == 2
    file.with_name("small.yaml").write_text(yaml.safe_dump(shipped, sort_keys=False))
    words = ["yaml/studies/small.yaml", *SHORT, "checkpoint.every_tokens=1e6", "--jobs", "1", "--no-timing"]
    done = place.run("study", "run", *words)
    assert done.returncode == 0, done.stderr + done.stdout
    done = place.run("eval", "studies/wgqa-summaries", "--summaries", "datasets/functions", "--new-tokens", "12")
    assert done.returncode == 0, done.stderr
    return place.folder / "studies/wgqa-summaries"


def cell(study: Path, variant: str, seed: int) -> Path:
    return study / "cells" / variant / f"seed-{seed}"


def measures(study: Path, variant: str, seed: int) -> dict[str, dict[str, Any]]:
    rows = read_mapping(cell(study, variant, seed) / "evaluation.json")["measures"]
    return {row["name"].removeprefix("functions/"): row for row in rows}


def test_every_merge_starts_as_mean_pooling_of_the_teacher(study: Path) -> None:
    starts = {}
    for variant in TRAINED:
        for seed in SEEDS:
            run = cell(study, variant, seed)
            first, last = (records(run, "validation")[i] for i in (0, -1))
            loss = read_mapping(run / "converted/conversion.json")["loss"]
            assert (first["step"], last["step"]) == (0, 4) and last["loss"] < first["loss"]
            assert first["loss"] == pytest.approx(loss["after"], abs=1e-5)
            assert loss["before"] < loss["after"]
            starts[variant, seed] = first["loss"]
    assert [*starts.values()] == pytest.approx([starts["gqa", 1]] * len(starts), abs=1e-5)


def test_cells_train_on_targets_in_the_order_of_their_seed(place: Any, study: Path) -> None:
    runs = [place.folder / "runs/summarise-teacher", *(cell(study, variant, 1) for variant in TRAINED)]
    sources = [stored_spec(RunDir(run)).data.source for run in runs]
    assert [s.loss for s in sources if isinstance(s, PairsSource)] == ["all", *["targets"] * len(TRAINED)]
    orders = {(v, s): [r["batch_hash"] for r in records(cell(study, v, s))] for v in TRAINED for s in SEEDS}
    assert orders["gqa", 1] != orders["gqa", 2]
    assert all(orders[variant, seed] == orders["gqa", seed] for variant in TRAINED for seed in SEEDS)
    assert analyse(study).pairing.status == "PAIRED"


def test_the_weights_of_the_merges_are_trained(study: Path) -> None:
    for variant, numbers in (("wgqa", 8), ("colwgqa", 8 * 4)):
        for layer in decoder_of(cell(study, variant, 1)).attention_layers():
            assert isinstance(layer, WeightedGroupedQueryAttention)
            for weights in (layer.k_weights, layer.v_weights):
                assert weights.shape == (numbers,) and len(weights.unique()) > numbers // 2
                assert torch.allclose(weights, torch.full_like(weights, 0.5), atol=0.1) and not (weights == 0.5).all()


def test_the_report_has_rouge_of_every_variant_and_its_paired_difference(study: Path) -> None:
    found = {(v, s): measures(study, v, s) for v in TRAINED for s in SEEDS}
    for rows in found.values():
        assert set(rows) == {*ROUGES, "ended", "loss"}
        for name, row in rows.items():  # of one model: intervals over pairs, all asked the same
            assert row["low"] <= row["value"] <= row["high"] and row["n"] > 20
            assert row["digest"] == found["gqa", 1][name]["digest"]
        assert 0 < rows["rouge1"]["value"] < 1 and rows["rouge1"]["low"] < rows["rouge1"]["high"]
    section = (study / "report.md").read_text().partition("\n## Evaluation\n")[2].partition("\n## ")[0]
    assert "Cells that are not in these numbers" not in section
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    names = ("ended", "loss", *ROUGES)
    assert [row[1] for row in lines[2:]] == [*TRAINED] * len(names)
    for number, row in enumerate(lines[2:]):
        name, variant = names[number // len(TRAINED)], row[1]
        assert row[0].startswith(f"functions/{name}" if variant == "gqa" else "")
        values = [found[variant, seed][name]["value"] for seed in SEEDS]
        apart = [value - found["gqa", seed][name]["value"] for value, seed in zip(values, SEEDS, strict=True)]
        assert row[2] == "2" and float(row[3]) == pytest.approx(sum(values) / 2, abs=6e-5)
        if variant == "gqa":
            assert row[4:] == ["baseline", ""]
            continue
        numbers = [float(number) for number in re.findall(r"[+-]\d+\.\d+", row[4])]
        assert numbers[0] == pytest.approx(sum(apart) / 2, abs=6e-5)
        if len(numbers) == 3:
            _, low, high = numbers
            assert low <= numbers[0] <= high
            below, above = ("better", "worse") if name == "loss" else ("worse", "better")
            if min(abs(low), abs(high)) > 6e-5:  # else the printed digits do not tell
                assert row[5] == (above if low > 0 else below if high < 0 else "undecided")
        else:
            assert row[5] == "undecided"
    shown = [len(re.findall(r"[+-]\d+\.\d+", row[4])) == 3 for row in lines[2:] if row[1] != "gqa"]
    assert sum(shown) >= 8  # intervals of the loss and of ROUGE


def test_the_report_answers_what_was_asked(study: Path) -> None:
    page = (study / "report.md").read_text()
    losses = {v: [records(cell(study, v, s), "validation")[-1]["loss"] for s in SEEDS] for v in TRAINED}
    for variant in TRAINED[1:]:
        answer = re.search(rf"\| {variant} is better than gqa \| (\w+) \| ([+-][\d.]+) .*\|", page)
        assert answer is not None and answer[1] in ("yes", "no", "undecided")
        mean = sum(a - b for a, b in zip(losses[variant], losses["gqa"], strict=True)) / 2
        assert float(answer[2]) == pytest.approx(mean, abs=6e-5)
        assert f"| {variant} | mha to wgqa, 4 KV heads, by mean | {ALPHA} | 4,096 |" in page
    assert "Teacher runs/summarise-teacher: loss " in page
