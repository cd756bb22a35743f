"""`bounds` of a study: what FLOPs allow at a larger model, counted there and matched there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.cli.main import main
from headway.launcher.match.matching import spec_cost
from headway.launcher.spec.load import load_spec
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import study_bounds

SMALL = """
model: {width: 32, layers: 2, ffn_width: 64}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data: {seq_len: 32, source: {type: synthetic, task: copy, vocab_size: 32}}
optimizer: {lr: 1e-3}
train: {tokens: 512, global_batch: 2, micro_batch: 2}
"""
LARGE = """
name: large
model: {width: 128, layers: 3, ffn_width: 352, vocab_size: 640}
attention: {type: gqa, heads: 16, kv_heads: 2, head_dim: 8}
data: {seq_len: 64, source: {type: mds, path: datasets/none-is-needed}}
optimizer: {lr: 1e-3}
train: {tokens: 512, global_batch: 2, micro_batch: 2}
"""
STUDY = """
study: bounded
base: small.yaml
match: {quantity: params, free: model.ffn_width, multiple: 4, tolerance: 5%}
seeds: [1]
bounds:
  spec: large.yaml
  seq_len: [4096, 256]
  keys: {moh: {attention: {top_k: 3}}}
variants:
  gqa: {attention.type: gqa}
  rgqa: {attention.type: rgqa, attention.top_k: 1}
  moh: {attention.type: moh, attention.shared_heads: 1, attention.top_k: 1}
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in (("small", SMALL), ("large", LARGE), ("study", STUDY)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path / "study.yaml"


def changed(study: Path, old: str, new: str) -> Path:
    text = study.read_text()
    assert old in text
    study.write_text(text.replace(old, new))
    return study


def test_ratios_are_those_of_the_larger_model_with_its_own_matched_sizes(study):
    found = study_bounds(load_study(study))
    assert found is not None
    rows, base = found["variants"], load_spec(study.with_name("large.yaml")).spec
    assert found["name"] == "large" and found["seq_len"] == [256, 4096] and list(rows) == ["gqa", "rgqa", "moh"]
    attention = {"rgqa": ["attention.top_k=1"], "moh": ["attention.top_k=3", "attention.shared_heads=1"]}
    for name, keys in attention.items():
        ffn = rows[name]["free_value"]
        large = load_spec(
            study.with_name("large.yaml"), [f"attention.type={name}", *keys, f"model.ffn_width={ffn}"]
        ).spec
        assert ffn % 4 == 0 and ffn != base.model.ffn_width
        assert abs(rows[name]["num_params"] / rows["gqa"]["num_params"] - 1) < 0.005
        for n in (256, 4096):
            costs = [spec_cost(spec, 640, n).flops_per_token.useful for spec in (base, large)]
            assert rows[name]["speed_up"][str(n)] == costs[0] / costs[1]
    assert rows["gqa"]["speed_up"] == {"256": 1.0, "4096": 1.0}
    assert rows["rgqa"]["speed_up"]["4096"] > rows["rgqa"]["speed_up"]["256"] > 1


def test_the_goal_is_recorded_by_increasing_length(study):
    assert "goal" not in (study_bounds(load_study(study)) or {})
    changed(study, "  keys: {moh:", "  goal: [1.9, 1.1]\n  keys: {moh:")
    found = study_bounds(load_study(study))
    assert found is not None and list(found["goal"].items()) == [("256", 1.1), ("4096", 1.9)]


def test_without_matching_sizes_are_those_of_the_file(study):
    changed(study, "match: {quantity: params, free: model.ffn_width, multiple: 4, tolerance: 5%}\n", "")
    found = study_bounds(load_study(study))
    assert found is not None
    assert {row["free_value"] for row in found["variants"].values()} == {None}
    assert found["variants"]["rgqa"]["num_params"] > found["variants"]["gqa"]["num_params"]  # its router


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("spec: large.yaml", "spec: larger.yaml", "bounds.spec: no such file: larger.yaml"),
        ("keys: {moh:", "keys: {mho:", "bounds.keys: mho is not a variant. Did you mean moh?"),
        ("{attention: {top_k: 3}}", "{attention: {top_k: 99}}", "bounds.keys of moh: attention.top_k"),
        ("{attention: {top_k: 3}}", "{attention: {topk: 3}}", "bounds.keys of moh: attention.topk: unknown key"),
        ("tolerance: 5%", "tolerance: 0", "variant rgqa at large: match.free model.ffn_width"),
        ("[4096, 256]", "[256, 256]", "lengths are positive and different"),
        ("  keys: {moh:", "  goal: [1.3]\n  keys: {moh:", "goal: write 2 ratios, one for each of seq_len, and not 1"),
        ("  keys: {moh:", "  goal: [1.3, 0]\n  keys: {moh:", "goal: ratios are positive numbers"),
        ("quantity: params", "quantity: wall_clock", "match params or flops"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_trained(study, old, new, words):
    with pytest.raises(SpecError) as error:
        study_bounds(load_study(changed(study, old, new)))
    assert words in str(error.value)


def test_a_larger_model_without_a_vocabulary_is_refused(study):
    changed(study.with_name("large.yaml"), ", vocab_size: 640", "")
    with pytest.raises(SpecError, match=r"study.yaml:\d+:\d+: bounds.spec: large.yaml has no model.vocab_size; add it"):
        study_bounds(load_study(study))


@pytest.mark.parametrize(
    "sizes",
    ["", "sizes: {s: {}, m: {keys: {model.width: 48}}, l: {keys: {model.width: 64}}}\ntokens_per_param: 1\n"],
    ids=["plain", "ladder"],
)
def test_the_command_shows_the_table_and_records_it(study, sizes, capsys):
    study.write_text(study.read_text() + sizes)
    assert main(["study", "run", str(study), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("FLOPs at 4,096 tokens") == 1
    assert main(["study", "run", str(study), "--dry-run", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    ratio = record["bounds"]["variants"]["rgqa"]["speed_up"]["4096"]
    assert f"{ratio:.2f}x" in shown and record["match"]["free"] == "model.ffn_width"
