"""A tuned ladder of three sizes and two variants from a corpus to its report, with real runs, by the command line."""

from __future__ import annotations

import asyncio
import csv
import json
from pathlib import Path

CORPUS = """
name: source
corpus: {{type: text, paths: ["{folder}/*.py"]}}
tokenizer: {{type: train_bpe, vocab_size: 300}}
validation_fraction: 0.2
bad_documents: skip
"""

BASE = """
model: {width: 32, layers: 1, ffn_width: 64}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data: {seq_len: 64, source: {type: mds, path: datasets/source}}
optimizer: {lr: 1e-2}
train: {tokens: 4096, global_batch: 8, micro_batch: 8, validation_tokens: 1024, validate_every_tokens: 4096}
launch: {threads: 1}
"""

LADDER = """
study: ladder
base: base.yaml
out: studies/ladder
records: records
match: {multiple: 4, tolerance: 3%}
seeds: [1, 2]
tokens_per_param: 0.3
scale: {model.init_std: -0.2}
sizes:
  s: {}
  m: {keys: {model.width: 48}}
  l: {keys: {model.width: 64, model.layers: 2}, seeds: [1]}
extrapolate: 1e6
tune:
  optimizer.lr: {grid: [3e-3, 1e-2, 3e-2], factor: 3, extend: 1, seeds: [101], sizes: [s], carry: width, check: false}
variants:
  gqa: {attention.type: gqa}
  routed: {attention.type: rgqa, attention.top_k: 1}
"""


def test_a_tuned_ladder_runs_from_a_corpus_to_its_report(headway):
    folder = headway.folder
    # a part of the built-in corpus: the source of one package of the standard library
    (folder / "source.yaml").write_text(CORPUS.format(folder=Path(asyncio.__file__).parent))
    (folder / "base.yaml").write_text(BASE)
    (folder / "ladder.yaml").write_text(LADDER)
    built = headway.run("data", "build", "source.yaml")
    assert built.returncode == 0, built.stderr
    done = headway.run("study", "run", "ladder.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    out = folder / "studies" / "ladder"
    search = json.loads((out / "sizes" / "s" / "tuning.json").read_text())["keys"]["optimizer.lr"]
    assert {len(v["trials"]) for v in search["variants"].values()} == {len(search["grid"])}
    losses = {v: {t["value"]: t["loss"] for t in found["trials"]} for v, found in search["variants"].items()}
    assert all(loss < 5.7 for curve in losses.values() for loss in curve.values()), "ln 300 = 5.70: trials learned"
    for size, seeds in (("s", 2), ("m", 2), ("l", 1)):
        study = json.loads((out / "sizes" / size / "study.json").read_text())
        assert len(study["cells"]) == 2 * seeds
        rows = list(csv.DictReader((out / "sizes" / size / "report.csv").open()))
        assert len(rows) == 2 * seeds and all(row["state"] == "done" for row in rows)
    report = (out / "report.md").read_text()
    for words in ("Does the advantage over gqa fall off with size?", "routed", "## Tuning", "per doubling"):
        assert words in report, words
    # nothing is trained again, and what is kept in records gives the report without any run folder
    again = headway.run("study", "run", "ladder.yaml")
    assert again.returncode == 0 and "step " not in again.stdout
    out.rename(folder / "moved")
    kept = headway.run("study", "report", "ladder.yaml")
    assert kept.returncode == 0, kept.stdout + kept.stderr
    for name in ("report.csv", "fit.csv"):
        assert (out / name).read_text() == (folder / "moved" / name).read_text()
    assert "parabola through the best three" in (out / "report.md").read_text()
    kept = headway.run("study", "run", "ladder.yaml")
    assert kept.returncode == 0 and "step " not in kept.stdout, kept.stdout + kept.stderr
