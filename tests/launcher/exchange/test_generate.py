"""`headway generate`: the cache does not change the result, samples repeat, and errors name what is missing."""

import json

import pytest
import torch

from headway.data.config import DataError
from headway.data.loader import validation_batches
from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.cli.main import main
from headway.launcher.exchange.generate import Sampling, continuation, generate
from headway.launcher.exchange.opened import load_model
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.spec import Spec
from headway.parallel import checkpoint
from headway.parallel.config import CheckpointError

GREEDY = Sampling(tokens=8, temperature=0.0, top_p=1.0, seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One short run of the tiny spec."""
    import subprocess
    import sys

    spec = """
name: tiny
model: {width: 32, layers: 2, ffn_width: 48, init_std: 0.05}
attention: {type: rgqa, heads: 8, kv_heads: 2, head_dim: 8, top_k: 1, balance: {f_p: 0, loss_free_rate: 1e-3},
            k_schedule: [{until_tokens: 512, top_k: 2}]}
data:
  seq_len: 32
  source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}
optimizer: {lr: 3.0e-3}
train: {tokens: 1024, global_batch: 8, micro_batch: 8, validation_tokens: 512, validate_every_tokens: 512}
checkpoint: {every_tokens: 512, keep: 2}
launch: {processes: 1, threads: 1}
"""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "tiny.yaml").write_text(spec)
    command = [sys.executable, "-P", "-m", "headway.launcher", "train", "tiny.yaml", "run_dir=run"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def model_of(run):
    return load_model(RunDir(run), Spec.model_validate_json((run / "spec.json").read_text()))


def test_the_newest_checkpoint_is_loaded_with_its_schedule_state(trained):
    model, step = model_of(trained)
    assert step == 4 and not model.training
    assert [layer.top_k for layer in model.attention_layers()] == [1, 1]
    biases = [b for n, b in model.named_buffers() if n.endswith("router.bias")]
    assert len(biases) == 2 and all(b.abs().max() > 0 for b in biases)


def test_a_validation_at_a_stage_boundary_uses_the_new_stage(trained):
    """The model that is validated after 512 tokens equals the one loaded from that checkpoint."""
    spec = Spec.model_validate_json((trained / "spec.json").read_text())
    recorded = {r["step"]: r for r in RunDir(trained).read_metrics() if r["kind"] == "validation"}
    path = next(p for p in checkpoint.steps_on_disk(trained / "checkpoints") if p.name.endswith("2"))
    model, _ = model_of(trained)
    found = checkpoint.Checkpoint(path=path, step=2, manifest=checkpoint.read_manifest(path))
    checkpoint.load_weights(found, model)
    train = spec.train
    batches = validation_batches(
        spec.data, tokens=train.validation_tokens, micro_batch=train.micro_batch, dp_rank=0, dp_size=1
    )
    losses = {}
    for tokens in (511, 512):
        model.before_step(tokens)
        with torch.no_grad():
            outs = [model(b.tokens, b.labels, b.segments) for b in batches]
        losses[tokens] = float(sum(o.loss_sum for o in outs) / sum(o.targets for o in outs))
    assert recorded[2]["loss"] == pytest.approx(losses[512], rel=1e-6)
    assert abs(losses[511] - losses[512]) > 1e-5 * losses[512]


def test_greedy_tokens_equal_those_of_full_passes_without_a_cache(trained):
    model, _ = model_of(trained)
    ids = [5, 20, 7, 25, 3, 18, 9, 30, 7]
    stats = {}
    got = list(continuation(model, ids, GREEDY, eos_id=None, stats=stats))
    expected = list(ids)
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
    assert got == expected[len(ids) :]
    assert stats["new_tokens"] == 8 and stats["cached_tokens"] == len(ids) + 7
    assert stats["cache_bytes"] == stats["cached_tokens"] * 2 * (2 * 2 * 8) * 4  # layers x (K, V) x groups x D x fp32


def test_samples_repeat_with_their_seed_and_stop_at_the_end_of_a_document(trained):
    model, _ = model_of(trained)
    hot = Sampling(tokens=12, temperature=5.0, top_p=1.0, seed=3)
    first, again = (list(continuation(model, [1, 2], hot, eos_id=None, stats={})) for _ in range(2))
    other = list(
        continuation(model, [1, 2], Sampling(tokens=12, temperature=5.0, top_p=1.0, seed=4), eos_id=None, stats={})
    )
    assert first == again != other
    end = first[5]
    assert list(continuation(model, [1, 2], hot, eos_id=end, stats={})) == first[: first.index(end)]


def test_a_small_top_p_leaves_only_the_most_likely_token(trained):
    model, _ = model_of(trained)
    narrow = Sampling(tokens=8, temperature=5.0, top_p=1e-6, seed=3)
    assert list(continuation(model, [1, 2], narrow, eos_id=None, stats={})) == list(
        continuation(model, [1, 2], GREEDY, eos_id=None, stats={})
    )


def test_the_command_prints_the_prompt_and_its_continuation(trained, capsys):
    assert main(["generate", str(trained), "5 20 7 25", "--tokens", "3", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("5 20 7 25 ") and len(out.split()) == 7
    assert "rgqa, checkpoint of step 4, 4 prompt tokens" in err and "KV cache" in err


def test_more_tokens_than_a_training_sequence_are_noted(trained, capsys):
    assert main(["generate", str(trained), "1 2 3", "--tokens", "40"]) == 0
    assert "more than the 32 tokens per sequence of the training" in capsys.readouterr().err


def test_errors_say_what_to_do(trained, tmp_path):
    with pytest.raises(NoInputError, match=r"no spec.json: train a model"):
        generate(tmp_path, "1", GREEDY)
    with pytest.raises(NoInputError, match=r"is a file; name the run's folder"):
        generate(trained / "spec.json", "1", GREEDY)
    with pytest.raises(SpecError, match="numbers from 0 to 31"):
        generate(trained, "hello", GREEDY)
    with pytest.raises(SpecError, match="numbers from 0 to 31"):
        generate(trained, "32", GREEDY)
    for bad in (
        {"tokens": 0},
        {"temperature": -1.0},
        {"temperature": 1e-40},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ):
        with pytest.raises(SpecError, match="--"):
            generate(trained, "1", Sampling(**{**vars(GREEDY), **bad}))
    (tmp_path / "spec.json").write_text((trained / "spec.json").read_text())
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        generate(tmp_path, "1", GREEDY)


def test_a_damaged_checkpoint_is_skipped_and_not_changed(trained, tmp_path, capsys):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    older, folder = sorted((run / "checkpoints").iterdir())
    for step in (folder, older):
        file = next(step.glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
        if step == folder:
            assert generate(run, "1", GREEDY) == 0
            assert "checkpoint of step 2" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is valid"):
        generate(run, "1", GREEDY)
    assert "contents changed" in capsys.readouterr().err
    assert folder.is_dir()


def test_text_is_refused_if_the_dataset_has_changed(trained, tmp_path):
    """Token ids of another tokenizer would give meaningless text."""
    from headway.launcher.cli.corpus import build_corpus

    corpus = tmp_path / "corpus.yaml"
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} says that the sum of {i} and {i} is {2 * i}. " * 20)
    corpus.write_text(
        f"name: set\ncorpus: {{type: text, paths: ['{tmp_path}/text']}}\nout: {tmp_path}/set\n"
        "tokenizer: {type: train_bpe, vocab_size: 300}\nvalidation_fraction: 0.2\n"
    )
    assert build_corpus(corpus, []) == 0
    run = tmp_path / "run"
    run.mkdir()
    spec = json.loads((trained / "spec.json").read_text())
    spec["data"]["source"] = {"type": "mds", "path": str(tmp_path / "set")}
    (run / "spec.json").write_text(json.dumps(spec))
    (run / "run.json").write_text(json.dumps({"data_fingerprint": "0" * 64}))
    with pytest.raises(DataError, match="not the dataset this run was trained on"):
        generate(run, "hello", GREEDY)
