"""`headway bench decode`: every variant, batch and length; bytes are those of the cost model; ratios pair rounds."""

import json
import statistics

import pytest

from headway.launcher.cli.main import main
from headway.launcher.spec.spec import Spec
from headway.model.cost import account

BASE = """
model: {width: 32, layers: 2, ffn_width: 48}
attention: {type: gqa, heads: 8, kv_heads: 2, head_dim: 8}
data: {seq_len: 64, source: {type: synthetic, task: mqar, vocab_size: 64, pairs: 8, queries: 8}}
optimizer: {lr: 3.0e-3}
train: {tokens: 4096, global_batch: 8, micro_batch: 8, validation_tokens: 512}
launch: {threads: 1, device: cpu}
"""
STUDY = """
study: tiny
base: base.yaml
seeds: [1]
variants:
  gqa: {attention.type: gqa}
  mha: {attention.type: mha}
  rgqa: {attention.type: rgqa, attention.top_k: 1}
"""


LEARNED = ["model.positions=learned", "model.max_positions=64"]


@pytest.fixture
def study(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def test_every_variant_batch_and_length_is_measured_against_its_round(study, tmp_path, capsys):
    out = tmp_path / "out" / "d.json"
    words = ["--batches", "1,3", "--lengths", "5,20", "--new", "4", "--rounds", "3", "--out", str(out)]
    assert main(["bench", "decode", str(study), *words]) == 0
    result = json.loads(out.read_text())
    rows = {(r["variant"], r["batch"], r["length"]): r for r in result["rows"]}
    assert len(rows) == 3 * 2 * 2
    for (variant, batch, length), row in rows.items():
        spec = Spec.model_validate_json(json.dumps(result["specs"][variant]))
        cost = account(spec.model, spec.attention, vocab_size=64, seq_len=length)
        assert row["kv_bytes_held"] == batch * length * cost.kv_bytes_per_token * 2  # fp32; costs are for 2 bytes
        base = rows["gqa", batch, length]
        assert row["kv_ratio"] == row["kv_bytes_held"] / base["kv_bytes_held"]
        for phase in ("prefill", "token"):
            ours, theirs = row[phase]["raw_seconds"], base[phase]["raw_seconds"]
            pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
            assert len(pairs) == 3 and row[phase]["ratio"]["median"] == statistics.median(pairs)
    assert rows["mha", 1, 5]["kv_ratio"] == 4 and rows["rgqa", 1, 5]["kv_ratio"] == 1
    table = out.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert result["command"] in table and "## Batch of 3, prompt of 20 tokens" in table
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batches", "2,2"], "--batches: [2, 2] names one twice"),
        (["--lengths", "30", "--new", "40"], "learned positions for 64 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(study, words, said, capsys):
    assert main(["bench", "decode", str(study), *LEARNED, *words]) == 64
    assert said in capsys.readouterr().err
