"""`headway bench peers`: every engine trains the same model, in turns; a library that is missing is named."""

import json
import statistics
import sys

import pytest
import torch

from headway.data.loader import Loader
from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.bench.peers.child import WARM_UP, PeerLoop, Timed, in_turns
from headway.launcher.bench.peers.models import HEADWAY, PEERS, llama_of, make_peer, parameters, why_missing
from headway.launcher.bench.peers.run import AS_GIVEN, NEEDS, SAME, bench_peers, row_of, table
from headway.launcher.run.resolve import resolve
from headway.launcher.spec.load import load_spec
from headway.model.decoder import Decoder

SPEC = """
name: peers
model: {width: 40, layers: 3, ffn_width: 56, init_std: 0.1, norm_eps: 1.0e-3}
attention: {type: gqa, heads: 6, kv_heads: 3, head_dim: 10, rope_base: 500}
data: {seq_len: 33, source: {type: synthetic, task: mqar, vocab_size: 37, pairs: 4, queries: 4}}
optimizer: {lr: 3.0e-3, weight_decay: 0.3, clip_norm: 0.5}
schedule: {warmup_tokens: 264}
train: {tokens: 13200, global_batch: 4, micro_batch: 2, validation_tokens: 264}
"""

TOLERANCE = 5e-5
"""As for exports: transformers computes the angles of RoPE in fp32, Headway in fp64."""


@pytest.fixture
def spec_file(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def spec_of(path, *overrides):
    return resolve(load_spec(path, [*overrides, *SAME]).spec)[0]


def batch_of(spec, step=0):
    sizes = {"global_batch": spec.train.global_batch, "micro_batch": spec.train.micro_batch}
    loader = Loader(spec.data, split="train", dp_rank=0, dp_size=1, **sizes)
    try:
        return loader.batch(step)
    finally:
        loader.close()


def decoder_of(spec):
    return Decoder(spec.model, spec.attention, vocab_size=spec.model.vocab_size, seed=spec.seed)


@pytest.fixture(params=PEERS)
def peer(request):
    why = why_missing(request.param)
    if request.param == "litgpt" and (why or "").startswith("not installed"):
        pytest.skip("litgpt is in the extra `peers`, which the development environment does not have")
    assert why is None
    return request.param


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_peer_is_the_same_model(peer, tied, spec_file):
    """Logits, loss and the norm of every gradient, with ignored labels and targets in other micro-batches."""
    spec = spec_of(spec_file, f"model.tied_embeddings={tied}")
    ours = decoder_of(spec)
    theirs = make_peer(peer, spec, ours.state_dict())
    assert parameters(theirs.module) == parameters(ours)
    batch = batch_of(spec)
    micro = batch.micro[0]
    assert (micro.labels == -100).any() and (micro.labels != -100).any()
    with torch.no_grad():
        expected = ours.logits(micro.tokens)
        difference = (theirs.logits(micro.tokens) - expected).abs().max()
    assert difference <= TOLERANCE * max(1.0, expected.abs().max())
    loss = ours(micro.tokens, micro.labels).loss_sum / batch.targets
    other = theirs.loss(micro.tokens, micro.labels, batch.targets)
    assert other.item() == pytest.approx(loss.item(), rel=TOLERANCE)
    loss.backward()
    other.backward()
    norms = [
        torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
        for model in (ours, theirs.module)
    ]
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=10 * TOLERANCE)
    assert sum(p.grad is not None for p in theirs.module.parameters()) == len(list(theirs.module.parameters()))


def test_bf16_of_a_peer_rounds_its_passes_only(spec_file):
    losses, weights = {}, {}
    for precision in ("fp32", "bf16"):
        spec = spec_of(spec_file, f"parallel.precision={precision}")
        loop = PeerLoop("bare", spec)
        losses[precision] = loop.step(batch_of(spec)).loss
        weights[precision] = next(loop._peer.module.parameters())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)  # bf16 has 8 significant bits
    assert weights["bf16"].dtype == torch.float32


def test_engines_take_turns_and_the_warm_up_is_not_counted():
    seen = []

    def engine(name):
        def step(batch):
            seen.append((batch, name))
            return Timed(float(batch), 10.0 * batch)

        return step

    seconds, losses, _ = in_turns({n: engine(n) for n in "abc"}, lambda turn: turn, rounds=2)
    assert seen == [(turn, name) for turn, order in enumerate(["abc", "bca", "cab", "abc"]) for name in order]
    assert set(map(tuple, seconds.values())) == {(float(WARM_UP), WARM_UP + 1.0)}
    assert losses["b"] == [0.0, 10.0, 20.0, 30.0]


@pytest.fixture(scope="module")
def measured(headway_once):
    headway_once.spec.write_text(SPEC)
    words = ["--sizes", AS_GIVEN, "--peers", "bare", "--precision", "fp32", "--rounds", "4", "--out", "out/peers.json"]
    done = headway_once.run("bench", "peers", str(headway_once.spec), *words)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((headway_once.folder / "out/peers.json").read_text())


def test_all_engines_have_the_same_losses(measured):
    """The weights, batches, learning rates, AdamW and clipping are the same, so fp32 losses agree step by step."""
    _, result = measured
    (row,) = result["rows"]
    ours, theirs = row["engines"][HEADWAY], row["engines"]["bare"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5) and len(ours["losses"]) == WARM_UP + 4
    assert abs(ours["losses"][0] - ours["losses"][-1]) > 0.01  # it trains
    assert theirs["largest_relative_difference_of_losses"] < 1e-5
    assert row["equal_parameters"] and ours["parameters"] == theirs["parameters"] > 0


def test_ratios_are_those_of_rounds_and_memory_is_that_of_processes_alone(measured):
    text, result = measured
    (row,) = result["rows"]
    ours, theirs = row["engines"][HEADWAY], row["engines"]["bare"]
    ratios = [b / a for a, b in zip(ours["raw_step_s"], theirs["raw_step_s"], strict=True)]
    assert len(ratios) == 4 and theirs["over_headway"]["median"] == pytest.approx(statistics.median(ratios))
    assert row["tokens_per_step"] == 4 * 33
    speeds = [132 / seconds for seconds in theirs["raw_step_s"]]
    assert theirs["tokens_per_s"]["median"] == pytest.approx(statistics.median(speeds))
    for engine in (ours, theirs):
        alone = engine["alone"]
        assert 50e6 < alone["peak_bytes_before_steps"] <= alone["peak_bytes"] < 5e9 and alone["step_s"]["min"] > 0
    assert len(result["load_average_at_start"]) == 3 and result["machine"]["cpu"] and result["versions"]["torch"]
    assert f"{theirs['over_headway']['median']:.3f} (" in text and "losses of all engines agree within" in text


def test_other_numbers_of_parameters_are_said(spec_file):
    spec = spec_of(spec_file)
    together = {
        "step_s": {HEADWAY: [1.0, 2.0], "bare": [2.0, 2.0]},
        "losses": {HEADWAY: [4.0], "bare": [4.0]},
        "parameters": {HEADWAY: 1000, "bare": 1200},
    }
    used = dict.fromkeys(NEEDS, 1)
    alone = {name: {**used, "step_s": {name: [1.0, 1.0]}} for name in (HEADWAY, "bare")}
    row = row_of("spec", "fp32", spec, together, alone)
    assert not row["equal_parameters"] and row["engines"]["bare"]["over_headway"]["median"] == 1.5
    assert "the numbers of parameters differ: headway 1,000, bare 1,200" in table(row)


def test_a_missing_and_a_broken_library_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "litgpt", None)
    assert why_missing("litgpt") == "not installed: pip install litgpt"
    assert why_missing("bare") is None
    monkeypatch.delitem(sys.modules, "litgpt")
    (tmp_path / "litgpt").mkdir()
    (tmp_path / "litgpt/__init__.py").write_text("import a_library_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    assert "a_library_that_nobody_has is missing" in (why_missing("litgpt") or "")
    (tmp_path / "litgpt/__init__.py").write_text("raise RuntimeError('built for another torch')")
    assert "cannot be imported (RuntimeError: built for another torch)" in (why_missing("litgpt") or "")


def run(path, *overrides, **changed):
    options = {"sizes": [AS_GIVEN], "peers": ["bare"], "precision": "fp32", "rounds": 2, "out": None}
    return bench_peers(path, list(overrides), **{**options, **changed})


def test_a_missing_peer_is_left_out_but_one_is_needed(monkeypatch, spec_file, capsys):
    monkeypatch.setitem(sys.modules, "litgpt", None)
    with pytest.raises(SpecError, match="--peers: none of litgpt can be measured"):
        run(spec_file, peers=["litgpt"])
    assert "litgpt is left out: not installed: pip install litgpt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "changed", "message"),
    [
        (["attention.type=rgqa", "attention.top_k=1"], {}, "attention.type: a Llama has no counterpart of rgqa"),
        (["attention.type=wgqa"], {}, "attention.type: wgqa is not trained by the other libraries"),
        (["attention.windows=8"], {}, "attention.windows: .* window of 8 tokens"),
        ([], {"sizes": ["1B"]}, "--sizes: 1B is unknown"),
        ([], {"peers": ["bare", "bare"]}, "--peers: bare is unknown or named twice"),
    ],
)
def test_what_cannot_be_compared_is_refused(overrides, changed, message, spec_file):
    with pytest.raises(SpecError, match=message):
        run(spec_file, *overrides, **changed)


def test_the_reason_of_a_failed_measurement_is_shown(monkeypatch, spec_file):
    monkeypatch.setattr("headway.launcher.bench.peers.run.HEADWAY", "unknown")
    with pytest.raises(HeadwayError, match=r"(?s)the process that measures unknown, bare ended with 1:.*KeyError"):
        run(spec_file)


def test_the_sizes_are_what_their_names_say(spec_file):
    from headway.launcher.bench.peers.run import SIZES

    base = ["attention.heads=8", "attention.kv_heads=2", "data.source.vocab_size=4096"]
    counts = {}
    for size, words in SIZES.items():
        if size != AS_GIVEN:
            spec = spec_of(spec_file, *base, *words)
            config = llama_of(spec)
            width, layers, ffn = (config[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size"))
            attention = 2 * width * (8 + 2) * config["head_dim"]
            counts[size] = config["vocab_size"] * width + layers * (attention + 3 * width * ffn + 2 * width) + width
    assert {size: f"{count / 1e6:.2g}M" for size, count in counts.items()} == {s: s for s in counts}
