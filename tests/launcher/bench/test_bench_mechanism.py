"""`headway bench mechanism`: every variant, phase and length, each ratio paired with the baseline of its round."""

import json
import statistics

import pytest
import torch

from headway.launcher.base.errors import SpecError
from headway.launcher.bench import mechanism as bench
from headway.launcher.cli.main import main
from headway.model.attention.rgqa import RgqaConfig
from headway.model.config import ModelConfig
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
  rgqa: {attention.type: rgqa, attention.top_k: 1}
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


@pytest.fixture
def measured(study, tmp_path):
    out = tmp_path / "out" / "m.json"
    args = ["bench", "mechanism", str(study), "--lengths", "32,16", "--rounds", "3", "--tokens", "64"]
    assert main([*args, "--out", str(out)]) == 0
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    return json.loads(out.read_text()), out.with_suffix(".md").read_text()


def test_every_variant_phase_and_length_is_measured_against_its_round(measured):
    result, _ = measured
    rows = {(r["variant"], r["seq_len"], r["phase"]): r for r in result["rows"]}
    assert len(rows) == 2 * 2 * 3
    for (variant, length, phase), row in rows.items():
        base = rows["gqa", length, phase]["raw_seconds"]
        assert row["sequences"] == 64 // length and len(row["raw_seconds"]) == 3
        pairs = [a / b for a, b in zip(row["raw_seconds"], base, strict=True)]
        assert row["ratio"]["median"] == statistics.median(pairs)
        assert variant != "gqa" or set(pairs) == {1.0}
        assert row["distance"] == pytest.approx(row["ratio"]["median"] / row["useful_flop_ratio"])


def test_the_bound_is_the_ratio_of_useful_flops_of_the_whole_model(measured):
    result, _ = measured
    row = next(r for r in result["rows"] if (r["variant"], r["seq_len"], r["phase"]) == ("rgqa", 16, "forward"))
    model = ModelConfig(width=32, layers=2, ffn_width=48)
    gqa, rgqa = (
        account(model, c, vocab_size=64, seq_len=16).flops_per_token
        for c in (
            RgqaConfig(heads=8, kv_heads=2, head_dim=8, top_k=4),
            RgqaConfig(heads=8, kv_heads=2, head_dim=8, top_k=1),
        )
    )
    router = 2 * 2 * 32 * 8  # routers of two layers, which gqa does not have
    assert row["useful_flop_ratio"] == pytest.approx(rgqa.useful / (gqa.useful - router), rel=1e-12)
    prefill = next(r for r in result["rows"] if (r["variant"], r["seq_len"], r["phase"]) == ("rgqa", 16, "prefill"))
    head = 2 * 64 * 32 * 15 / 16  # logits of the last token only
    assert prefill["useful_flop_ratio"] == pytest.approx((rgqa.useful - head) / (gqa.useful - router - head), rel=1e-12)


def test_the_table_names_command_and_commit_and_marks_variants_far_from_their_bound(measured):
    result, table = measured
    assert result["command"] in table and result["git_commit"] in table
    assert "## 32 tokens, 2 sequences" in table and "## 16 tokens, 4 sequences" in table
    for row in result["rows"]:
        row["distance"] = 1.5
    assert " far |" not in bench.markdown(result)
    result["rows"][-1]["distance"] = 1.51
    assert bench.markdown(result).count(" far |") == 1


def test_prefill_fills_the_cache_and_computes_logits_of_the_last_token_only(monkeypatch):
    from headway.model.decoder import Decoder

    seen = []
    logits = Decoder.logits

    def spy(self, tokens, **kwargs):
        out = logits(self, tokens, **kwargs)
        seen.append((out.shape, kwargs["cache"].tokens, self.training, torch.is_grad_enabled()))
        return out

    monkeypatch.setattr(Decoder, "logits", spy)
    model = Decoder(
        ModelConfig(width=16, layers=1, ffn_width=16),
        RgqaConfig(heads=2, kv_heads=1, head_dim=8, top_k=1),
        vocab_size=11,
        seed=1,
    )
    bench._passes(model, torch.zeros(2, 6, dtype=torch.int64))["prefill"]()
    assert seen == [((2, 1, 11), 5, False, False)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": 1}, "--rounds: 1 round\\(s\\) have no spread; use at least 2"),
        ({"lengths": [16, 16]}, "--lengths: .* use different lengths"),
        ({"lengths": [1]}, "at least 2 tokens"),
    ],
)
def test_invalid_settings_are_refused(study, options, words):
    with pytest.raises(SpecError, match=words):
        bench.bench_mechanism(study, [], **{"lengths": [16], "rounds": 2, "tokens": 32, "out": None, **options})


def test_a_length_that_is_not_a_number_is_a_usage_error(study, capsys):
    assert main(["bench", "mechanism", str(study), "--lengths", "16,x"]) == 64
    assert "--lengths" in capsys.readouterr().err
