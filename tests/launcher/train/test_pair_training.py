"""Fine-tuning on pairs through the command line: equal batches and losses on every layout, and their evaluation."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from run_folders import records

ANIMALS = {"cat": "meows", "dog": "barks", "cow": "moos", "duck": "quacks", "owl": "hoots", "bee": "buzzes"}
SPEC = """
name: pairs
model: {width: 32, layers: 2, ffn_width: 48, init_std: 0.1}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data: {seq_len: 64, source: {type: pairs, path: pairs}}
optimizer: {lr: 1.0e-2}
schedule: {warmup_tokens: 512}
train: {tokens: 81920, global_batch: 16, micro_batch: 16, validation_tokens: 1024, validate_every_tokens: 40960}
checkpoint: {every_tokens: 40960}
launch: {processes: 1, threads: 1, restarts: 0, device: cpu}
"""
CORPUS = """
name: pairs
corpus: {type: pairs, paths: [pairs.jsonl], prompt: scene, target: sound, separator: " >"}
tokenizer: {type: train_bpe, vocab_size: 320}
validation_fraction: 0.1
out: pairs
"""
SHORT = ["train.tokens=5120", "train.validate_every_tokens=5120", "schedule.warmup_tokens=512"]
LAYOUTS = {
    "one": ["train.micro_batch=4"],
    "two": ["launch.processes=2", "train.micro_batch=2"],
}


def scenes(count: int, seed: int) -> list[dict[str, str]]:
    rng, rows = Random(seed), []
    for number in range(count):
        animal = rng.choice(list(ANIMALS))
        words = [f"Scene {number}. The {animal} is in the yard."] + ["It is warm."] * rng.choice([0, 0, 1, 2, 25])
        rows.append({"scene": " ".join(words), "sound": f"The {animal} {ANIMALS[animal]}."})
    return rows


@pytest.fixture(scope="module")
def workspace(headway_once: Any) -> Any:
    folder = headway_once.folder
    (folder / "pairs.yaml").write_text(SPEC)
    (folder / "corpus.yaml").write_text(CORPUS)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scenes(600, seed=1)))
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scenes(40, seed=2)))
    (folder / "texts.yaml").write_text(
        "name: texts\ncorpus: {type: jsonl, paths: [pairs.jsonl], field: scene}\nout: texts\n"
        "tokenizer: {type: file, path: pairs/tokenizer.json}\n"
    )
    for command in (
        ["data", "build", "corpus.yaml"],
        ["data", "build", "texts.yaml"],
        *(["train", "pairs.yaml", *SHORT, *layout, f"run_dir={name}"] for name, layout in LAYOUTS.items()),
        ["train", "pairs.yaml", "init.weights=one", "run_dir=trained"],
    ):
        done = headway_once.run(*command)
        assert done.returncode == 0, done.stderr
    return headway_once


def evaluated(workspace: Any, *words: str) -> dict[str, dict[str, Any]]:
    done = workspace.run("eval", *words, "--json")
    assert done.returncode == 0, done.stderr
    return {m["name"]: m for m in json.loads(done.stdout)["measures"]}


def test_every_layout_reads_the_same_batches_and_gives_the_same_losses(workspace: Any) -> None:
    found = {name: records(workspace.folder / name) for name in LAYOUTS}
    for ours, first in zip(found["two"], found["one"], strict=True):
        assert (ours["batch_hash"], ours["targets"]) == (first["batch_hash"], first["targets"])
        assert ours["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert len({r["batch_hash"] for r in found["one"]}) == 5 and len({r["targets"] for r in found["one"]}) > 1
    ends = {name: records(workspace.folder / name, "validation")[-1] for name in LAYOUTS}
    assert ends["two"]["loss"] == pytest.approx(ends["one"]["loss"], rel=1e-5)
    assert ends["two"]["targets"] == ends["one"]["targets"]


def test_the_card_counts_the_pairs(workspace: Any) -> None:
    card = json.loads((workspace.folder / "one/run.json").read_text())
    manifest = json.loads((workspace.folder / "pairs/MANIFEST.json").read_text())
    train = card["pairs"]["train"]
    assert train["pairs"] + train["left_out"] == manifest["train"]["documents"] and train["cut"] > 9
    assert card["train_tokens_of_data"] == 64 * train["sequences"] and card["unigram_entropy_nats"] is None
    counts = manifest["pairs"]
    per_token = counts["validation_target_bytes"] / counts["validation_target_tokens"]
    assert card["validation_bytes_per_token"] == pytest.approx(per_token, rel=1e-12)


def test_a_tuned_model_writes_the_targets_and_its_start_does_not(workspace: Any) -> None:
    start = evaluated(workspace, "one", "--summaries", "pairs", "--new-tokens", "16")
    end = evaluated(workspace, "trained", "--summaries", "pairs", "--new-tokens", "16")
    assert set(end) == {f"pairs/{name}" for name in ("rouge1", "rouge2", "rougeL", "ended", "loss")}
    for name in ("rouge1", "rouge2", "rougeL"):
        row = end[f"pairs/{name}"]
        assert row["low"] <= row["value"] <= row["high"] and row["value"] > start[f"pairs/{name}"]["value"]
        assert row["n"] > 30 and row["digest"] == start[f"pairs/{name}"]["digest"] != end["pairs/loss"]["digest"]
    assert end["pairs/rouge2"]["value"] > 0.9 and end["pairs/ended"]["value"] == 1.0
    assert end["pairs/loss"]["value"] == evaluated(workspace, "trained")["validation/loss"]["value"]


def test_files_and_beams_and_exported_weights_are_measured_alike(workspace: Any) -> None:
    words = ["--summaries", "held=held.jsonl", "--fields", "scene,sound", "--new-tokens", "16"]
    greedy = evaluated(workspace, "trained", *words)
    assert greedy["held/rougeL"]["value"] > 0.9 and greedy["held/rougeL"]["n"] == 40
    beams = evaluated(workspace, "trained", *words, "--beams", "3", "--limit", "7")
    assert beams["held/rougeL"]["n"] == 7 and beams["held/rougeL"]["digest"] != greedy["held/rougeL"]["digest"]
    done = workspace.run("export", "trained", "weights", "--to", "safetensors")
    assert done.returncode == 0, done.stderr
    assert evaluated(workspace, "weights", "--summaries", "pairs", "--new-tokens", "16") == evaluated(
        workspace, "trained", "--summaries", "pairs", "--new-tokens", "16"
    )


def test_a_study_compares_its_variants_by_rouge(workspace: Any) -> None:
    study = "study: sounds\nbase: pairs.yaml\nseeds: [1, 2]\nbaseline: gqa\nvariants:\n"
    study += "  gqa: {attention.type: gqa}\n  mqa: {attention.type: mqa}\n"
    (workspace.folder / "study.yaml").write_text(study)
    short = ["train.tokens=1024", "train.validate_every_tokens=1024", "schedule.warmup_tokens=0"]
    done = workspace.run("study", "run", "study.yaml", *short)
    assert done.returncode == 0, done.stderr
    done = workspace.run("eval", "studies/sounds", "--summaries", "pairs", "--new-tokens", "8", "--limit", "20")
    assert done.returncode == 0, done.stderr
    section = (workspace.folder / "studies/sounds/report.md").read_text().partition("## Evaluation\n")[2]
    for name in ("rouge1", "rouge2", "rougeL", "loss"):
        assert f"| pairs/{name}" in section
    assert "(F1)" in section and "| mqa | 2 |" in section


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["train", "pairs.yaml", "data.source.type=mds"], 65, "set data.source.type: pairs"),
        (["train", "pairs.yaml", "data.source.path=texts"], 65, "has texts; use type: mds"),
        (["train", "pairs.yaml", "data.document_mask=false"], 64, "document_mask: false lets pairs attend"),
        (["train", "pairs.yaml", "data.seq_len=3"], 65, "data.seq_len: 3 is too short for every pair"),
        (["data", "build", "corpus.yaml", "corpus.target=noise", "out=bad"], 65, "no field 'noise'; set corpus.target"),
        (["eval", "trained", "--summaries", "texts"], 65, "is a dataset of texts, without targets; use --text texts"),
        (["eval", "trained", "--summaries", "none"], 66, "no such file or folder; name a dataset of pairs"),
        (["eval", "trained", "--summaries", "held.jsonl"], 65, "no field 'prompt'; set --fields to one of its fields"),
        (["eval", "trained", "--summaries", "pairs", "--new-tokens", "64"], 64, "leaves no room for a prompt"),
        (["eval", "trained", "--summaries", "pairs", "--text", "pairs"], 64, "two are called pairs"),
        (["eval", "trained", "--summaries", "pairs", "--fields", "a"], 64, "give two fields"),
    ],
)
def test_errors_say_what_to_do(workspace: Any, words: list[str], status: int, said: str) -> None:
    extra = ["run_dir=bad"] if words[0] == "train" else []
    done = workspace.run(*words, *extra)
    assert done.returncode == status, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
