"""`headway train` of an encoder-decoder: layouts, resuming, given weights, and the verbs that refuse it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import transformers
from run_folders import records, trajectory

from headway.data.config import DataConfig
from headway.data.loader import Loader
from headway.launcher.exchange.import_hf import import_hf
from headway.model.huggingface.folder import load_model
from headway.model.seq2seq.model import EncoderDecoder

DATA = "{seq_len: 15, encoder_tokens: 8, source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}}"
TYPE = ("model.type=encoder_decoder", f"data={DATA}")
ATTENTION = "attention={type: wgqa, heads: 4, kv_heads: 2, head_dim: 8}"
MODEL = (*TYPE, ATTENTION, "model.positions=relative_t5")
COMMON = (*MODEL, "train.tokens=2400", "checkpoint.every_tokens=600")


@pytest.fixture(scope="module")
def whole(headway_once) -> Path:
    """A run of 20 steps in one process."""
    done = headway_once.train(*COMMON, "run_dir=whole")
    assert done.returncode == 0, done.stderr
    return headway_once.folder / "whole"


def test_a_killed_run_continues_bit_for_bit(headway, whole):
    process = headway.start(*COMMON, "run_dir=killed")
    run = headway.folder / "killed"
    headway.wait_for(lambda: len(records(run, "checkpoint")) >= 1, process)
    os.kill(int((run / "logs" / "rank-0.pid").read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    done = headway.train(*COMMON, "run_dir=killed")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["resumes"] == 1
    assert trajectory(run) == trajectory(whole)


@pytest.mark.parametrize(
    "overrides",
    [("parallel.zero=2",), pytest.param(("parallel.tensor=2",), marks=pytest.mark.slow)],  # tests/parity has both
    ids=["dp2", "tp2"],
)
def test_two_ranks_have_the_losses_of_one(headway, whole, overrides):
    done = headway.train(*COMMON, "launch.processes=2", *overrides, "run_dir=two")
    assert done.returncode == 0, done.stderr
    for kind in ("train", "validation"):
        ours, theirs = (records(run, kind) for run in (headway.folder / "two", whole))
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a.get("batch_hash") == b.get("batch_hash")


def test_what_is_recorded(whole):
    """Targets are those of the decoder; figures of decoders' heads and branches are absent."""
    steps = records(whole, "train")
    assert len(steps) == 20 and all(step["targets"] == 8 * 4 for step in steps)  # 4 answers in each sequence
    assert records(whole, "heads") == records(whole, "start") == []
    card = json.loads((whole / "run.json").read_text())
    assert card["cost"]["params_by_part"]["cross attention"] > 0


def test_training_starts_from_imported_weights(headway, tmp_path):
    library = transformers()
    shape: dict[str, Any] = {"vocab_size": 32, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    theirs = library.T5ForConditionalGeneration(library.T5Config(**shape, dropout_rate=0.0, initializer_factor=0.5))
    theirs.save_pretrained(tmp_path / "hf")
    assert import_hf(tmp_path / "hf", headway.folder / "ours") == 0
    spec = headway.folder / "tuned.yaml"
    rest = {"data": DATA, "train": "{tokens: 240, global_batch: 8, micro_batch: 4}"}
    lines = ["base: ours/model.yaml", "optimizer: {lr: 1e-4}", *(f"{key}: {value}" for key, value in rest.items())]
    spec.write_text("\n".join([*lines, "launch: {processes: 1, threads: 1}", "run_dir: tuned", ""]))
    done = headway.run("train", str(spec))
    assert done.returncode == 0, done.stderr
    source = {"type": "synthetic", "task": "mqar", "vocab_size": 32, "pairs": 4, "queries": 4}
    data = DataConfig.model_validate({"seq_len": 15, "encoder_tokens": 8, "source": source})
    with Loader(data, split="train", global_batch=8, micro_batch=8, dp_rank=0, dp_size=1) as loader:
        (batch,) = loader.batch(0).micro
    model = load_model(headway.folder / "ours")
    assert isinstance(model, EncoderDecoder) and batch.source is not None
    with torch.no_grad():
        out = model(batch.source, batch.tokens, batch.labels, batch.source_segments, batch.segments)
    first = records(headway.folder / "tuned", "train")[0]
    assert first["loss"] == pytest.approx(out.loss_sum.item() / out.targets.item(), rel=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ("export", "RUN", "out", "--to", "hf"),
        ("eval", "RUN", "--recall", "8"),
        ("plan", "SPEC", *COMMON, "--gpus", "8"),
        ("bench", "documents", "SPEC", *COMMON),
    ],
    ids=lambda words: " ".join(words[:2] if words[0] == "bench" else words[:1]),
)
def test_verbs_for_decoders_refuse_it(headway, whole, words):
    named = {"RUN": str(whole), "SPEC": str(headway.spec)}
    done = headway.run(*(named.get(word, word) for word in words))
    assert done.returncode == 64, done.stdout + done.stderr
    assert "model.type: " in done.stderr and "works on decoders only" in done.stderr


def test_an_export_is_the_checkpoint_and_training_starts_from_it(headway, whole):
    done = headway.run("export", str(whole), "out", "--to", "safetensors")
    assert done.returncode == 0, done.stderr
    assert "equal the run's bit for bit" in done.stdout
    assert "load_model" in (headway.folder / "out" / "README.md").read_text()
    for name, weights in (("export", "out"), ("run", str(whole))):
        begin = (f"init.weights={weights}", "train.tokens=120", "schedule.warmup_tokens=0", f"run_dir={name}")
        done = headway.train(*MODEL, *begin)
        assert done.returncode == 0, done.stderr
    ours, theirs = (records(headway.folder / name, "validation")[-1]["loss"] for name in ("export", "run"))
    assert ours == theirs < records(whole, "validation")[0]["loss"]


def test_the_plan_has_the_cost(headway, whole):
    done = headway.run("plan", str(headway.spec), *COMMON, "--json")
    assert done.returncode == 0, done.stderr
    found, cost = json.loads(done.stdout), json.loads((whole / "run.json").read_text())["cost"]
    assert {key: found[key] for key in cost} == cost and "decoders only" in found["not_planned"]
    text = headway.run("plan", str(headway.spec), *COMMON).stdout
    assert "cross attention" in text and "planned for decoders only" in text
