"""Records of routers and heads in real runs: the same whatever the layout, and beside every validation."""

import json
from typing import Any

import pytest
import torch

from headway.data.config import DataConfig, SyntheticSource
from headway.launcher.train.heads import PROBE_SEQ_LEN, PROBE_TOKENS, HeadProbe, probe_batch
from headway.model.attention.gqa import GqaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.parallel.layout import Layout

DATA = DataConfig(seq_len=24, source=SyntheticSource(type="synthetic", task="mqar", vocab_size=64, pairs=4, queries=4))


@pytest.fixture(scope="module")
def runs(headway_once):
    """Name -> records: one process and one micro-batch a step; two under ZeRO-3 and two micro-batches each."""
    layouts = {
        "one": ("train.micro_batch=8",),
        "two": ("launch.processes=2", "parallel.zero=3", "train.micro_batch=2", "train.validation_tokens=480"),
    }
    found = {}
    for name, arguments in layouts.items():
        done = headway_once.train(
            f"run_dir={name}", "train.tokens=3072", "attention.heads=8", *arguments, "tracking.router_every_steps=5"
        )
        assert done.returncode == 0, done.stderr
        lines = (headway_once.folder / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
    return found


def test_router_figures_do_not_depend_on_ranks_and_micro_batches(runs):
    one, two = ([r for r in runs[name] if "router" in r] for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 5, 10, 12]
    tokens = {1: 256, 5: 1024, 10: 1280, 12: 512}
    for a, b in zip(one, two, strict=True):
        # Rounding differs between layouts and grows in training: now and then a near-tie falls the other way.
        tolerance = 1e-5 if a["step"] == 1 else 5e-3
        for layer in ("layer_00", "layer_01"):
            x, y = a["router"][layer]["router"], b["router"][layer]["router"]
            assert x.keys() == y.keys() and x["tokens"] == y["tokens"] == tokens[a["step"]]
            for key in x.keys() - {"dead", "tokens"}:
                for mine, other in zip(x[key], y[key], strict=True):
                    assert mine == pytest.approx(other, abs=tolerance), (a["step"], key)


def test_head_diversity_does_not_depend_on_ranks_and_micro_batches(runs):
    one, two = ([r for r in runs[name] if r["kind"] == "heads"] for name in ("one", "two"))
    assert one and [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two, strict=True):
        for layer, measures in a["layers"].items():
            for key, value in measures.items():
                assert b["layers"][layer][key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4))


def test_heads_are_measured_at_the_start_and_with_every_validation(runs):
    records = runs["one"]
    validated = [r["step"] for r in records if r["kind"] == "validation"]
    assert [r["step"] for r in records if r["kind"] == "heads"] == [0, *validated]
    first = next(r for r in records if r["kind"] == "heads")
    assert first["tokens"] == 0 and set(first["layers"]) == {"layer_00", "layer_01"}
    assert first["layers"]["layer_00"]["members"] == 4
    assert first["layers"]["layer_00"]["effective_rank"] > 3.9  # random weights


class Engine:
    """Evaluates by a plain forward pass, and counts."""

    def __init__(self, attention) -> None:
        model = ModelConfig(width=20, layers=2, ffn_width=28)
        self.module, self.passes = Decoder(model, attention, vocab_size=64, seed=1).eval(), 0
        self.attention_layers = dict(enumerate(self.module.attention_layers()))

    def evaluate(self, batches) -> None:
        for batch in batches:
            self.passes += 1
            self.module(batch.tokens, batch.labels, batch.segments)


@pytest.mark.parametrize(("heads", "layers", "passes"), [(4, ["layer_00", "layer_01"], 2), (2, [], 1)])
def test_a_mechanism_without_a_pool_has_no_head_records_and_costs_one_pass(heads, layers, passes):
    engine: Any = Engine(GqaConfig(heads=heads, kv_heads=2, head_dim=6))
    probe = HeadProbe(engine, Layout(rank=0, local_rank=0, device=torch.device("cpu")), probe_batch(DATA))
    assert list(probe.measure()) == list(probe.measure()) == layers
    assert engine.passes == passes


@pytest.mark.parametrize("seq_len", [24, 256, 1000])
def test_the_probe_is_short_and_always_the_same(seq_len):
    data = DATA.model_copy(update={"seq_len": seq_len})
    first, again = probe_batch(data), probe_batch(data)
    assert first.tokens.equal(again.tokens)
    length = min(seq_len, PROBE_SEQ_LEN)
    assert first.tokens.shape == first.labels.shape == (PROBE_TOKENS // length, length)
    assert len({tuple(row) for row in first.tokens.tolist()}) == len(first.tokens)
