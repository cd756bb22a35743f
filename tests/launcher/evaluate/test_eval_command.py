"""`headway eval` through the command line: trained and untrained runs, weights, a study, and every error of a user."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_texts import ANIMALS, SOUNDS, eval_questions, eval_texts, random_questions

from headway.launcher.api import load_run
from headway.launcher.base.errors import SpecError
from headway.launcher.evaluate.choices import read_questions

SPEC = """
name: animals
model: {width: 32, layers: 2, ffn_width: 48, init_std: 0.1}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data: {seq_len: 48, document_mask: true, source: {type: mds, path: dataset}}
optimizer: {lr: 1.0e-2}
schedule: {warmup_tokens: 512}
train: {tokens: 61440, global_batch: 16, micro_batch: 16, validation_tokens: 768, validate_every_tokens: 30720}
checkpoint: {every_tokens: 30720}
launch: {processes: 1, threads: 1, restarts: 0, device: cpu}
"""
STUDY = """
study: animals
base: animals.yaml
seeds: [1, 2]
variants: {gqa: {attention.type: gqa}, rgqa-k1: {attention.type: rgqa, attention.top_k: 1}}
baseline: gqa
records: kept
"""
CORPUS = """
name: animals
corpus: {type: jsonl, paths: [train.jsonl]}
tokenizer: {type: train_bpe, vocab_size: 320}
validation_fraction: 0.1
out: dataset
"""


@pytest.fixture(scope="module")
def workspace(headway_once: Any) -> Any:
    """A trained run, one of a single step at a learning rate of nearly zero, exported weights, texts and questions."""
    folder = headway_once.folder
    (folder / "animals.yaml").write_text(SPEC)
    (folder / "study.yaml").write_text(STUDY)
    (folder / "corpus.yaml").write_text(CORPUS)
    write_lines(folder / "train.jsonl", [{"text": text} for text in eval_texts(2000, seed=1)])
    write_lines(folder / "heldout.jsonl", [{"text": text} for text in eval_texts(40, seed=2)])
    write_lines(folder / "questions.jsonl", eval_questions(200, seed=3))
    write_lines(folder / "random.jsonl", random_questions(400, seed=4))
    short = ["train.tokens=768", "optimizer.lr=1e-9", "run_dir=untrained", "schedule.warmup_tokens=0"]
    given = ["tokenizer={type: file, path: dataset/tokenizer.json}"]
    for command in (
        ["data", "build", "corpus.yaml"],
        ["data", "build", "corpus.yaml", "out=held", "corpus.paths=[heldout.jsonl]", "validation_fraction=0.5", *given],
        ["train", "animals.yaml", "run_dir=trained"],
        ["train", "animals.yaml", *short],
        ["export", "trained", "weights", "--to", "safetensors"],
        ["train", "tiny.yaml", "train.tokens=1280", "run_dir=synthetic", "data.seq_len=48"],
    ):
        done = headway_once.run(*command)
        assert done.returncode == 0, done.stderr
    return headway_once


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def measure(workspace: Any) -> Callable[..., dict[str, dict[str, Any]]]:
    def run(*words: str) -> dict[str, dict[str, Any]]:
        done = workspace.run("eval", *words, "--json")
        assert done.returncode == 0, done.stderr
        return {m["name"]: m for m in json.loads(done.stdout)["measures"]}

    return run


def test_an_untrained_model_is_at_chance_and_a_trained_one_above_it(measure: Any) -> None:
    # An untrained model gives one answer to all questions that end alike, so questions of chance have no facts.
    for run in ("untrained", "trained"):
        guessed = measure(run, "--tasks", "random.jsonl")["random/acc"]
        assert guessed["chance"] == 0.25 and guessed["n"] == 400
        assert abs(guessed["value"] - 0.25) < 3 * (0.25 * 0.75 / 400) ** 0.5
    before = measure("untrained", "--tasks", "questions.jsonl")["questions/acc"]
    after = measure("trained", "--tasks", "questions.jsonl")["questions/acc"]
    assert before["chance"] == after["chance"] == pytest.approx(1 / len(SOUNDS)) and before["n"] == 200
    assert after["low"] > max(2 * after["chance"], before["high"]) and after["low"] <= after["value"] <= after["high"]


def test_the_loss_of_a_text_is_that_of_its_documents_one_by_one(workspace: Any, measure: Any) -> None:
    model = load_run(workspace.folder / "trained").model()
    total = tokens = size = 0.0
    for line in (workspace.folder / "heldout.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = [model.codec.eos_id, *model.encode(text)]
        assert len(ids) <= 49  # one window
        log_p = torch.log_softmax(model.logits(ids[:-1]), -1).gather(1, torch.tensor(ids[1:])[:, None])
        total, tokens, size = total - float(log_p.sum()), tokens + len(ids) - 1, size + len(text.encode())
    found = measure("trained", "--text", "held=heldout.jsonl")
    assert found["held/loss"]["value"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["held/bits_per_byte"]["value"] == pytest.approx(total / size / 0.6931471805599453, rel=1e-5)
    assert found["held/loss"]["n"] == 40
    kept = json.loads((workspace.folder / "trained/evaluation.json").read_text())
    assert found["held/loss"] in kept["measures"] and kept["model"]["step"] == 80
    assert measure("weights", "--text", "held=heldout.jsonl")["held/loss"]["value"] == found["held/loss"]["value"]
    earlier = measure("trained", "--text", "held=heldout.jsonl", "--step", "40")["held/loss"]["value"]
    assert earlier != found["held/loss"]["value"]


def test_without_a_question_the_validation_of_the_run_is_measured(workspace: Any, measure: Any) -> None:
    found = measure("trained")
    same = measure("trained", "--text", "validation=dataset")
    assert found == same and set(found) == {"validation/loss", "validation/bits_per_byte"}
    few = measure("trained", "--limit", "5")
    assert few["validation/loss"]["n"] == 5 and few["validation/loss"]["digest"] != found["validation/loss"]["digest"]


def test_lengths_are_asked_of_the_same_documents(workspace: Any, measure: Any) -> None:
    long = [" ".join(eval_texts(12, seed=n)) for n in range(6)]
    write_lines(workspace.folder / "long.jsonl", [{"text": text} for text in [*long, "the cat"]])
    found = measure("trained", "--text", "long.jsonl", "--lengths", "16,96")
    assert set(found) == {"long/loss@16", "long/loss@96"} and {m["n"] for m in found.values()} == {6}
    done = workspace.run("eval", "trained", "--text", "heldout.jsonl", "--lengths", "500")
    assert done.returncode == 65 and "no document of 500 tokens" in done.stderr


def test_recall_of_a_synthetic_run(workspace: Any, measure: Any) -> None:
    found = measure("synthetic", "--recall", "16,32")
    assert set(found) == {"mqar/recall@16", "mqar/recall@32"} and found["mqar/recall@16"]["n"] == 64
    assert found["mqar/recall@16"]["chance"] == 1 / 16
    done = workspace.run("eval", "synthetic", "--recall", "400")
    assert done.returncode == 64 and "vocabulary of 32" in done.stderr


def test_a_study_is_measured_and_its_report_compares_the_measures(workspace: Any) -> None:
    out = workspace.folder / "studies/animals"

    def section(name: str) -> str:
        return (out / "report.md").read_text().partition(f"## {name}\n")[2].partition("\n## ")[0]

    short = ["train.tokens=3072", "train.validate_every_tokens=3072", "data.validation={held: held}"]
    done = workspace.run("study", "run", "study.yaml", *short)
    assert done.returncode == 0, done.stderr
    done = workspace.run("eval", "studies/animals", "--text", "held=heldout.jsonl", "--tasks", "questions.jsonl")
    assert done.returncode == 0, done.stderr
    evaluation, sets = section("Evaluation"), section("Loss by validation set")
    for name in (r"held/bits\_per\_byte", "questions/acc", "held/loss"):
        assert f"| {name}" in evaluation
    assert "rgqa-k1" in evaluation and "baseline" in evaluation and "chance 0.167" in evaluation
    losses = [
        [r["sets"]["held"]["loss"] for r in load_run(path).metrics("validation")][-1]
        for path in sorted(out.glob("cells/gqa/*"))
    ]
    per_byte = json.loads((out / "cells/gqa/seed-1/run.json").read_text())["validation_sets"]["held"]["bytes_per_token"]
    loss = sum(losses) / 2
    found = load_run(out / "cells/gqa/seed-1").metrics("validation")[-1]["sets"]["held"]
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / per_byte / 0.6931471805599453, rel=1e-12)
    assert f"| held | gqa | 2 | {loss:.4f} | baseline |   | {loss / per_byte / 0.6931471805599453:.4f} |" in sets
    (row,) = re.findall(r"\| held +\| (\d+) +\| ± ([\d.]+)", sets)
    assert int(row[0]) == found["documents"] > 1
    assert float(row[1]) == pytest.approx(found["loss_high"] - found["loss"], abs=6e-5)
    # records alone give the same
    (out / "cells").rename(workspace.folder / "away")
    assert workspace.run("study", "report", "studies/animals").returncode == 0
    assert (section("Evaluation"), section("Loss by validation set")) == (evaluation, sets)
    (workspace.folder / "away").rename(out / "cells")
    # one cell is asked something else: it is left out by name
    cell = out / "cells/rgqa-k1/seed-2"
    assert workspace.run("eval", str(cell), "--text", "held=heldout.jsonl", "--limit", "3").returncode == 0
    assert workspace.run("study", "report", "studies/animals").returncode == 0
    assert "held/loss: rgqa-k1/seed-2: was asked other questions" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["nowhere"], 66, "nowhere"),
        (["trained", "--text", "no.jsonl"], 66, "no such file or folder"),
        (["trained", "--text", "a=heldout.jsonl", "--text", "a=questions.jsonl"], 64, "two are called a"),
        (["trained", "--tasks", "no.jsonl"], 66, "no such file"),
        (["trained", "--tasks", "bad.jsonl"], 64, "bad.jsonl:2: gold is 7"),
        (["trained", "--text", "empty.txt"], 65, "no document with text"),
        (["trained", "--text", "other"], 65, "another tokenizer"),
        (["synthetic"], 64, "nothing to measure"),
        (["synthetic", "--text", "heldout.jsonl"], 64, "knows token ids, not text"),
        (["synthetic", "--tasks", "questions.jsonl"], 64, "knows token ids, not text"),
        (["trained", "--recall", "32"], 64, "not trained on a synthetic task"),
        (["weights", "--step", "3", "--text", "heldout.jsonl"], 66, "leave --step out"),
        (["trained", "--step", "3"], 66, "has no checkpoint of step 3"),
        (["trained", "--tasks", "questions.jsonl", "--shots", "2"], 64, "leave it out"),
    ],
)
def test_errors_say_what_to_do(workspace: Any, words: list[str], status: int, said: str) -> None:
    folder = workspace.folder
    good = {"query": "a", "choices": ["b", "c"], "gold": 0}
    write_lines(folder / "bad.jsonl", [good, {**good, "gold": 7}])
    (folder / "empty.txt").write_text(" \n")
    if not (folder / "other").exists():
        done = workspace.run("data", "build", "corpus.yaml", "out=other", "tokenizer.vocab_size=300")
        assert done.returncode == 0, done.stderr
    done = workspace.run("eval", *words)
    assert done.returncode == status, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_questions_have_one_right_choice_each() -> None:
    numbers = random.Random(0)
    for question in eval_questions(20, seed=numbers.random()):
        assert len(set(question["choices"])) == len(SOUNDS) and len(ANIMALS) == len(SOUNDS)


def test_questions_of_a_file_saved_on_windows_and_the_line_of_a_mistake(tmp_path: Path) -> None:
    line = b'{"query": "2 + 2 =", "choices": [" 4", " 5"], "gold": 0}\r\n'
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line)
    assert [question.choices for question in read_questions(tmp_path / "q.jsonl")] == [(" 4", " 5")] * 2
    (tmp_path / "q.jsonl").write_bytes(b"\n" + line + b'\n{"query": "a"}\n')
    with pytest.raises(SpecError, match=r"q\.jsonl:4: needs the keys"):
        read_questions(tmp_path / "q.jsonl")
