"""For tests of `train.micro_batch: auto`, and of what reads folders of runs."""

import json
from pathlib import Path

import pytest

from headway.launcher.run.lines import encode

AUTO = """
name: tiny
model: {width: 32, layers: 2, ffn_width: 48, vocab_size: 32}
attention: {type: rgqa, heads: 4, kv_heads: 2, head_dim: 8, top_k: 1}
data: {seq_len: 32, source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}}
optimizer: {lr: 3.0e-3}
train:
  tokens: 10240
  global_batch: 8
  micro_batch: auto
  validation_tokens: 512
launch: {processes: 1, threads: 1, restarts: 0, device: cpu}
"""


@pytest.fixture
def auto_spec(tmp_path: Path) -> Path:
    """The file of a spec whose micro-batch is to be found."""
    path = tmp_path / "tiny.yaml"
    path.write_text(AUTO)
    return path


@pytest.fixture
def make_run():
    """Makes a run's folder as a training of 10 steps leaves it after `step` of them, with one checkpoint of 1000 bytes.

    Validations are at the steps of `validations` (step -> loss).
    """

    def make(path: Path, *, step: int = 10, validations: dict[int, float] | None = None, complete: bool = True) -> Path:
        (path / "checkpoints/step-0000000005").mkdir(parents=True)
        (path / "checkpoints/step-0000000005/tensors.safetensors").write_bytes(bytes(1000))
        for name in ("logs", "tensorboard"):
            (path / name).mkdir()
            (path / name / f"{name}.0").touch()
        (path / "run.lock").touch()
        (path / "worker.lock").touch()
        (path / "run_id.json").write_text('"mine"')
        spec = {"model": {}, "attention": {}, "data": {"seq_len": 8}, "train": {"tokens": 320, "global_batch": 4}}
        (path / "spec.json").write_text(json.dumps(spec))
        lines = []
        for number in range(1, step + 1):
            lines.append({"kind": "train", "step": number, "tokens": 32 * number, "loss": 9.0})
            if validations and number in validations:
                lines.append({"kind": "validation", "step": number, "loss": validations[number]})
        (path / "metrics.jsonl").write_text("".join(encode(line) + "\n" for line in lines))
        if complete:
            summary = {"complete": True, "final_validation_loss": (validations or {}).get(step)}
            (path / "summary.json").write_text(json.dumps(summary))
        return path

    return make


@pytest.fixture
def make_study(make_run):
    """Makes a study's folder: its cells `a/seed-1` (done), `b/seed-1` (of step 4), and `c/seed-1`, not begun."""

    def make(path: Path) -> Path:
        make_run(path / "cells/a/seed-1", validations={10: 2.5})
        make_run(path / "cells/b/seed-1", step=4, complete=False)
        cells = [{"variant": name, "seed": 1, "run_dir": f"cells/{name}/seed-1"} for name in "abc"]
        record = {"format": 1, "study": "s", "path": "s.yaml", "command": "headway study run s.yaml", "cells": cells}
        (path / "study.json").write_text(json.dumps(record))
        (path / "study.lock").touch()
        (path / "report.html").write_text("report")
        (path / "logs").mkdir()
        return path

    return make
