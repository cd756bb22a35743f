"""A working folder with a small study, whose training is played by a script."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from headway.launcher.hosts.forked import VARIABLE
from headway.launcher.study import run as study_module
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import plan_study

BASE = """
model: {width: 32, layers: 2, ffn_width: 96}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data:
  seq_len: 32
  source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}
optimizer: {lr: 3.0e-3}
train: {tokens: 2560, global_batch: 8, micro_batch: 8, validation_tokens: 256, validate_every_tokens: 1024}
launch: {threads: 1}
"""

STUDY = """
study: small
base: base.yaml
match: {multiple: 4, tolerance: 2%}
seeds: [1, 2]
variants:
  gqa:
  routed: {attention.type: rgqa, attention.top_k: 1}
"""

# Does to a run folder what `headway train` does; how is read from behaviour.json: cell -> ok, fail, half, hang, start,
# deaf (hangs and ignores SIGTERM), late (fails before the last step), or `after PATH` (waits for a file of the study).
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path

run_dir = Path(next(a for a in sys.argv if a.startswith("run_dir=")).split("=", 1)[1])
key = f"{run_dir.parent.name}/{run_dir.name}"
behaviour = json.loads(Path("behaviour.json").read_text()).get(key, "ok")
cells = json.loads((run_dir.parents[2] / "study.json").read_text())["cells"]
spec = next(c["spec"] for c in cells if c["run_dir"] == f"cells/{key}")
total, keep = spec["train"]["tokens"] // 256, spec["checkpoint"].get("keep_at_tokens", [])
given = next((a.removeprefix("init.run=") for a in sys.argv if a.startswith("init.run=")), None)
parent, _, begin = (given or "@0").rpartition("@")
run_dir.mkdir(parents=True, exist_ok=True)
with open("trained.txt", "a") as f:
    f.write(key + "\\n")
if behaviour == "fail":
    print("starting\\nerror: the disk is on fire", file=sys.stderr)
    sys.exit(74)
if spec["init"].get("run") != given:
    print("error: study.json says another init.run", file=sys.stderr)
    sys.exit(70)
if "cells" in Path(parent).parts and not (Path(parent) / "checkpoints" / f"step-{int(begin):010d}").is_dir():
    print(f"error: init.run: no checkpoint of step {begin}", file=sys.stderr)
    sys.exit(66)
(run_dir / "spec.json").write_text(json.dumps(spec))
card = {"tokens_per_step": 256, "data_fingerprint": None, "working_dir": str(Path.cwd().resolve())}
(run_dir / "run.json").write_text(json.dumps(card))
metrics = (run_dir / "metrics.jsonl").open("a")

def write(record):
    metrics.write(json.dumps(record) + "\\n")
    metrics.flush()

if behaviour == "start":
    time.sleep(60)

def stop(*_):
    print("saved a checkpoint", flush=True)
    sys.exit(75)

signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "deaf" else stop)
awaited = run_dir.parents[2] / behaviour.removeprefix("after ") if behaviour.startswith("after ") else run_dir
end = time.monotonic() + 30
while not awaited.exists():
    if time.monotonic() > end:
        sys.exit("error: nothing came")
    time.sleep(0.01)
steps = total // 2 if behaviour == "half" else total
for step in range(int(begin) + 1, steps + 1):
    common = {"step": step, "tokens": step * 256, "train_s": step * 0.1, "loss": 4 - 0.1 * step}
    write({"kind": "train", **common, "step_s": 0.1, "data_s": 0.0, "batch_hash": f"{spec['seed'] * 100 + step:016x}"})
    print(f"step {step}/{total} loss", flush=True)
    if any((step - 1) * 256 < mark <= step * 256 for mark in keep):
        (run_dir / "checkpoints" / f"step-{step:010d}").mkdir(parents=True, exist_ok=True)
    if behaviour == "late" and step == total - 1:
        sys.exit(74)
    if step % 5 == 0 or step == total:
        write({"kind": "validation", **common, "loss": common["loss"] - 0.1})
    if step == 3 and behaviour in ("hang", "deaf"):
        held = (run_dir / "run.lock").open("w")
        print(os.getpid(), end="", file=held, flush=True)
        time.sleep(60)
if behaviour == "half":
    sys.exit(0)
summary = {"complete": True, "steps": total, "tokens": total * 256, "train_s": 1.0}
summary["final_validation_loss"] = common["loss"] - 0.1
(run_dir / "summary.json").write_text(json.dumps({**summary, "resumes": 0}))
"""


LADDER = """
study: small
base: base.yaml
match: {multiple: 4, tolerance: 2%}
seeds: [1, 2]
tokens_per_param: 0.2
scale: {train.validate_every_tokens: 1}
sizes:
  s: {keys: {model.width: 32}}
  m: {keys: {model.width: 48, model.layers: 3}}
  l: {keys: {model.width: 64, model.layers: 4}, seeds: [1], variants: [gqa]}
tune:
  optimizer.lr: {grid: [1e-3, 2e-3, 4e-3], seeds: [101], sizes: [s, m], carry: fit, budget: 0.5}
variants:
  gqa:
  routed: {attention.type: rgqa, attention.top_k: 1}
"""

# Losses of a played cell depend on its learning rate: the best one is 2.5e-3 for gqa, 1e-3 for routed, at width 32, and
# falls with 1/width.
TUNED = """
import math
lr = spec["optimizer"]["lr"]
best = (2.5e-3 if spec["attention"]["type"] == "gqa" else 1e-3) * 32 / spec["model"]["width"]
offset = 0.2 * math.log(lr / best) ** 2 + 0.001 * (spec["seed"] ** 2 * len(spec["attention"]["type"]) % 7)
batch, best = spec["train"]["global_batch"], 11 if spec["attention"]["type"] == "gqa" else 30
offset += 0.05 * (math.log(batch / best) ** 2 - math.log(8 / best) ** 2)
if lr > 0.03:
    print("error: step 5: 20 steps in a row had a loss that is no finite number (guard.max_skipped)", file=sys.stderr)
    sys.exit(70)
"""


def play(monkeypatch, *, cores: int = 1) -> None:
    """Let the script train the cells of studies, on a host of `cores` cores, without a fork server."""
    monkeypatch.setattr(
        study_module, "cell_command", lambda plan, cell: [sys.executable, "trainer.py", *cell.overrides]
    )
    monkeypatch.setenv(VARIABLE, "not-used")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))


class Folder:
    """A working folder with a study, a base spec and the playing trainer."""

    def __init__(self, path: Path) -> None:
        self.path, self.out = path, path / "studies" / "small"
        self.study = path / "small.yaml"
        self.study.write_text(STUDY)
        (path / "base.yaml").write_text(BASE)
        (path / "trainer.py").write_text(TRAINER)
        self.behave({})

    def become_ladder(self) -> None:
        """Replace the study by a tuned one of three sizes, whose losses depend on the learning rate."""
        self.study.write_text(LADDER)
        file = self.path / "trainer.py"
        trainer = file.read_text().replace('(run_dir / "spec.json")', TUNED + '(run_dir / "spec.json")', 1)
        file.write_text(trainer.replace('"loss": 4 - 0.1 * step', '"loss": 4 - 0.1 * step + offset'))

    def behave(self, behaviour: dict[str, str]) -> None:
        (self.path / "behaviour.json").write_text(json.dumps(behaviour))

    def trained(self) -> list[str]:
        """Cells that were started since the last call, in order."""
        file = self.path / "trained.txt"
        cells = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return cells

    def rewrite(self, old: str, new: str) -> None:
        text = self.study.read_text()
        assert old in text
        self.study.write_text(text.replace(old, new))

    def plan(self, *arguments: str):
        return plan_study(load_study(self.study), arguments)
