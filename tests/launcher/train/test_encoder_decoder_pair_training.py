"""An encoder-decoder on pairs through the command line: training on layouts, resuming, losses and generated targets."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from run_folders import records

ANIMALS = {"cat": "meows", "dog": "barks", "cow": "moos", "duck": "quacks", "owl": "hoots", "bee": "buzzes"}
SPEC = """
name: pairs
model: {type: encoder_decoder, positions: relative_t5, width: 32, layers: 1, ffn_width: 48, init_std: 0.1}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data: {seq_len: 80, encoder_tokens: 48, source: {type: pairs, path: pairs}}
optimizer: {lr: 1.0e-2}
schedule: {warmup_tokens: 512}
train: {tokens: 102400, global_batch: 16, micro_batch: 16, validation_tokens: 8000, validate_every_tokens: 51200}
checkpoint: {every_tokens: 51200}
launch: {processes: 1, threads: 1, restarts: 0, device: cpu}
"""
CORPUS = """
name: pairs
corpus: {type: pairs, paths: [pairs.jsonl], prompt: scene, target: sound, separator: " >"}
tokenizer: {type: train_bpe, vocab_size: 320}
validation_fraction: 0.1
out: pairs
"""
SHORT = ["train.tokens=3840", "train.validate_every_tokens=3840", "schedule.warmup_tokens=512"]


def scenes(count: int) -> list[dict[str, str]]:
    rng, rows = Random(1), []
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
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scenes(600)))
    for command in (
        ["data", "build", "corpus.yaml"],
        ["train", "pairs.yaml", *SHORT, "train.micro_batch=4", "run_dir=one"],
        ["train", "pairs.yaml", *SHORT, "train.micro_batch=2", "launch.processes=2", "run_dir=two"],
        ["train", "pairs.yaml", "run_dir=trained"],
    ):
        done = headway_once.run(*command)
        assert done.returncode == 0, done.stderr
    return headway_once


def evaluated(workspace: Any, *words: str) -> dict[str, dict[str, Any]]:
    done = workspace.run("eval", *words, "--json")
    assert done.returncode == 0, done.stderr
    return {m["name"]: m for m in json.loads(done.stdout)["measures"]}


def test_two_ranks_read_the_batches_of_one_and_have_its_losses(workspace: Any) -> None:
    for kind in ("train", "validation"):
        ours, theirs = (records(workspace.folder / name, kind) for name in ("two", "one"))
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["targets"] == b["targets"]
            assert a.get("batch_hash") == b.get("batch_hash")
    card = json.loads((workspace.folder / "one/run.json").read_text())
    manifest = json.loads((workspace.folder / "pairs/MANIFEST.json").read_text())
    train = card["pairs"]["train"]
    assert train["pairs"] == manifest["train"]["documents"] and train["left_out"] == 0 < train["cut"]


def test_a_trained_model_writes_the_targets_and_its_start_does_not(workspace: Any) -> None:
    words = ["--summaries", "pairs", "--new-tokens", "16"]
    start, end = evaluated(workspace, "one", *words), evaluated(workspace, "trained", *words)
    assert end["pairs/rougeL"]["value"] > 0.9 > start["pairs/rougeL"]["value"]
    assert end["pairs/ended"]["value"] == 1.0 and end["pairs/rougeL"]["digest"] == start["pairs/rougeL"]["digest"]
    beams = evaluated(workspace, "trained", *words, "--beams", "3", "--limit", "7")
    assert beams["pairs/rougeL"]["n"] == 7 and beams["pairs/rougeL"]["value"] > 0.9


def test_the_loss_of_given_targets_is_that_of_the_last_validation(workspace: Any) -> None:
    recorded = records(workspace.folder / "trained", "validation")[-1]["loss"]
    assert evaluated(workspace, "trained")["validation/loss"]["value"] == pytest.approx(recorded, rel=1e-4)


def test_generate_writes_the_target(workspace: Any) -> None:
    done = workspace.run("generate", "trained", "Scene 7. The owl is in the yard. It is warm.", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The owl hoots.\n"


def test_a_loss_of_prompts_is_refused(workspace: Any) -> None:
    done = workspace.run("train", "pairs.yaml", "data.source.loss=all", "run_dir=bad")
    assert done.returncode == 64 and "source.loss: all predicts prompts too" in done.stderr, done.stderr
