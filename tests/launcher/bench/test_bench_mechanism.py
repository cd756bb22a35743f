"""`headway bench mechanism`: every variant, phase and length, each ratio paired with the baseline of its round."""

import json
import statistics

import pytest
import torch

from headway.launcher.base.errors import SpecError
from headway.launcher.bench import mechanism as bench
from headway.launcher.cli.main import main
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import study_bounds
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


LARGER = """
model: {width: 48, layers: 3, ffn_width: 97, vocab_size: 80}
attention: {type: gqa, heads: 12, kv_heads: 2, head_dim: 8}
data: {seq_len: 64, source: {type: synthetic, task: mqar, vocab_size: 80, pairs: 8, queries: 8}}
optimizer: {lr: 3.0e-3}
train: {tokens: 4096, global_batch: 8, micro_batch: 8}
launch: {threads: 1, device: cpu}
"""
BOUNDS = """
match: {quantity: params, free: model.ffn_width, multiple: 1, tolerance: 1%}
bounds:
  spec: larger.yaml
  seq_len: [48, 24]
  goal: [1.2, 1.1]
  keys: {rgqa: {attention.top_k: 3}}
"""


def counted_of(path):
    bounds = study_bounds(load_study(path))
    assert bounds is not None
    return bounds["variants"]


@pytest.fixture
def bounded(study, tmp_path):
    (tmp_path / "larger.yaml").write_text(LARGER)
    study.write_text(STUDY.replace("seeds", f"{BOUNDS.strip()}\nseeds") + "  mqa: {attention.type: mqa}\n")
    return study


def test_the_larger_model_of_the_bounds_is_measured_at_its_lengths_and_equal_parameters(bounded, tmp_path):
    out = tmp_path / "larger.json"
    args = ["--at-bounds", "--variants", "rgqa", "--rounds", "2", "--tokens", "64", "--out", str(out)]
    assert main(["bench", "mechanism", str(bounded), *args, "parallel.recompute=block"]) == 0
    result, counted = json.loads(out.read_text()), counted_of(bounded)["rgqa"]
    assert list(result["specs"]) == ["gqa", "rgqa"] and result["goals"] == {"24": 1.1, "48": 1.2}
    assert "--at-bounds --variants rgqa" in result["command"]
    rgqa = result["specs"]["rgqa"]
    assert rgqa["attention"]["top_k"] == 3 and rgqa["model"]["width"] == 48
    assert rgqa["model"]["ffn_width"] == counted["free_value"] != 97
    rows = {row["seq_len"]: row for row in result["rows"] if (row["variant"], row["phase"]) == ("rgqa", "forward")}
    assert set(rows) == {24, 48}
    for length, row in rows.items():
        assert 1 / row["useful_flop_ratio"] == pytest.approx(counted["speed_up"][str(length)])
    assert "training speed (goal 1.2x)" in out.with_suffix(".md").read_text()


def test_solved_sizes_of_the_larger_model_suit_matrix_units_as_the_baselines_do(bounded, tmp_path):
    larger = tmp_path / "larger.yaml"
    larger.write_text(
        LARGER.replace("97", "608").replace("width: 48", "width: 128").replace("head_dim: 8", "head_dim: 32")
    )
    bounded.write_text(bounded.read_text().replace("tolerance: 1%", "tolerance: 3%"))
    widths = {name: spec.model.ffn_width for name, (spec, _) in bench.larger_variants(bounded, []).specs.items()}
    assert widths["mqa"] != widths["gqa"] == 608 and all(width % 32 == 0 for width in widths.values())
    counted = counted_of(bounded)
    assert any(row["free_value"] % 32 for row in counted.values())  # the counts keep the multiple of the study


@pytest.mark.parametrize(
    ("quartiles", "words"), [((0.7, 0.8), "reached"), ((0.8, 0.85), "undecided"), ((0.84, 0.9), "missed")]
)
def test_a_goal_is_reached_where_both_quartiles_are(quartiles, words):
    q1, q3 = quartiles
    row = {"ratio": {"q1": q1, "median": (q1 + q3) / 2, "q3": q3}}
    assert bench._speed(row, 1.2, baseline=False) == f"{2 / (q1 + q3):.2f}x {words}"


def test_models_have_the_recomputation_and_the_options_of_speed_of_their_spec(bounded, monkeypatch):
    from headway.model.decoder import Block
    from headway.parallel import operations

    asked = []
    found = bench.larger_variants(bounded, ["parallel.recompute=selective", "speed.loss=torch", "speed.attention=math"])
    made = operations.make_operations
    monkeypatch.setattr(operations, "make_operations", lambda **options: asked.append(options) or made(**options))
    model = bench.decoder_of(*found.specs["gqa"], found.device)
    assert [(options["loss"], options["attention"]) for options in asked] == [("torch", "math")]
    block = model.blocks[0]
    assert isinstance(block, Block) and block.selective is not None


def test_bounds_and_variants_that_do_not_exist_are_refused(study, bounded, tmp_path):
    plain = tmp_path / "plain.yaml"
    plain.write_text(STUDY)
    options = {"lengths": None, "rounds": 2, "tokens": 32, "out": None, "at_bounds": True}
    with pytest.raises(SpecError, match=r"--at-bounds: .* has no `bounds`"):
        bench.bench_mechanism(plain, [], **options)
    with pytest.raises(SpecError, match="--variants: rgqa-k1 is not a variant; choose among gqa, rgqa, mqa"):
        bench.bench_mechanism(bounded, [], **options, names=["rgqa-k1"])
