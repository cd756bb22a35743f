"""`headway export --to hf` of every mechanism: `AutoModelForCausalLM` computes and generates what the run does."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llamas import logits, some_tokens, transformers
from safetensors.torch import load_file, save_file
from untrained_runs import decoder_of, untrained_run

from headway.launcher.base.errors import HeadwayError
from headway.launcher.cli.main import main
from headway.launcher.exchange.export import export
from headway.launcher.exchange.import_hf import import_hf
from headway.model.attention.registry import MECHANISMS
from headway.model.huggingface import form
from headway.model.huggingface.folder import WeightsError, load_exported

RGQA: dict[str, Any] = {"type": "rgqa", "heads": 6, "kv_heads": 2, "head_dim": 6, "top_k": 2}
OF_TYPE: dict[str, dict[str, Any]] = {
    "block_sparse": {"heads": 4, "kv_heads": 2, "head_dim": 6, "block": 4, "blocks": 2},
    "dynamic_gqa": {"heads": 7, "kv_heads": 3, "head_dim": 6, "freeze_after_tokens": 0},
    "gated_delta": {"heads": 2, "value_heads": 4, "head_dim": 6, "value_dim": 5, "conv": 3, "chunk": 5},
    "gqa": {"heads": 4, "kv_heads": 2, "head_dim": 6, "windows": [None, 5], "gate": "headwise"},
    "gqe": {"heads": 6, "kv_heads": 2, "head_dim": 6, "top_k": 2},
    "hybrid": {"heads": 6, "kv_heads": 2, "head_dim": 6, "top_k": 2, "value_experts": 3, "value_top_k": 2},
    "mha": {"heads": 3, "head_dim": 6, "qk_norm": True},
    "mla": {"heads": 4, "head_dim": 6, "latent": 7, "query_latent": 5, "rope_dim": 4},
    "moa": {"heads": 5, "head_dim": 6, "top_k": 2},
    "moh": {"heads": 6, "kv_heads": 2, "head_dim": 6, "shared_heads": 2, "top_k": 2},
    "namoh": {"heads": 5, "head_dim": 6, "top_k": 2, "shared_heads": 1, "window": 5},
    "mqa": {"heads": 4, "head_dim": 6, "gate": "elementwise"},
    "rgqa": RGQA | {"balance": {"f_p": 0.1, "loss_free_rate": 1e-3}},
    "sqa": {"heads": 12, "kv_heads": 2, "kept": 3, "head_dim": 6, "qk_norm": True},
    "switchhead": {"kv_heads": 2, "head_dim": 6, "experts": 3, "top_k": 2},
    "wgqa": {"heads": 6, "kv_heads": 2, "head_dim": 6, "start": "random", "qk_norm": True},
}
"""One form of each mechanism that no Llama has."""
FORMS: dict[str, dict[str, Any]] = {
    **{name: {"attention": {"type": name, **keys}} for name, keys in OF_TYPE.items()},
    "value residuals": {"attention": {"type": "mha", "heads": 3, "head_dim": 6, "value_residual": "learned"}},
    "shared keys and values": {"attention": {"type": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 6, "share_kv": 2}},
    "rgqa, token hash": {"attention": RGQA | {"router": {"type": "token_hash"}}},
    "rgqa, in a stage of k": {"attention": RGQA | {"k_schedule": [{"until_tokens": 1000, "top_k": 3}]}},
    "learned positions, biases": {
        "attention": {"type": "mha", "heads": 3, "head_dim": 6, "rope_fraction": 0.0, "biases": True},
        "model": {"positions": "learned", "max_positions": 48, "norm": "layernorm", "mlp": "gelu", "mlp_biases": True},
    },
    "relative positions": {
        "attention": {"type": "mha", "heads": 3, "head_dim": 6, "rope_fraction": 0.0},
        "model": {"positions": "relative_xl", "tied_embeddings": False, "head_bias": True},
    },
}
PROMPT, NEW = [5, 20, 7, 25, 3, 18, 9, 30, 7], 12


@pytest.fixture(scope="module")
def library() -> Any:
    found = transformers()
    importlib.import_module("headway.hf")
    return found


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory, library: Any) -> Path:
    """The run `run` of routed attention with dropout, and its export `hf`."""
    folder = tmp_path_factory.mktemp("routed")
    untrained_run(folder / "run", attention=FORMS["rgqa"]["attention"], model={"dropout": 0.5})
    assert export(folder / "run", folder / "hf", to="hf") == 0
    return folder


@pytest.fixture(scope="module")
def model(routed: Path, library: Any) -> Any:
    return library.AutoModelForCausalLM.from_pretrained(routed / "hf").eval()


def greedy(capsys: pytest.CaptureFixture[str], folder: Path) -> list[int]:
    """New tokens of `headway generate`."""
    words = ["generate", str(folder), " ".join(map(str, PROMPT)), "--tokens", str(NEW), "--temperature", "0"]
    capsys.readouterr()
    assert main(words) == 0
    return [int(word) for word in capsys.readouterr().out.split()][len(PROMPT) :]


def test_every_mechanism_has_a_form_here() -> None:
    assert MECHANISMS.keys() == OF_TYPE.keys()


@pytest.mark.parametrize("name", FORMS)
def test_auto_model_computes_and_generates_what_the_run_does(
    name: str, tmp_path: Path, library: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits are equal bit for bit: both run the same code with the same weights."""
    run, out = untrained_run(tmp_path / "run", **FORMS[name]), tmp_path / "hf"
    assert main(["export", str(run), str(out), "--to", "hf"]) == 0
    said = capsys.readouterr().out
    assert "HeadwayForCausalLM" in said and "bit for bit" in said and "on random tokens" in said
    ours, tokens = decoder_of(run), some_tokens(40)
    theirs = library.AutoModelForCausalLM.from_pretrained(out)
    assert type(theirs).__name__ == "HeadwayForCausalLM" and theirs.dtype == torch.float32
    expected = logits(ours, tokens)
    assert torch.equal(logits(theirs, tokens), expected) and expected.std() > 0.1
    new = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False)[0, len(PROMPT) :].tolist()
    assert new == greedy(capsys, run) == greedy(capsys, out) and len(new) == NEW
    theirs.save_pretrained(tmp_path / "again", max_shard_size="8KB")
    again = library.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert torch.equal(logits(again, tokens), expected)
    assert main(["import", str(tmp_path / "again"), "--to", str(tmp_path / "ours")]) == 0
    assert torch.equal(logits(load_exported(tmp_path / "ours"), tokens), expected)


def test_a_llama_stays_a_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = untrained_run(tmp_path / "run", attention={"type": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 6})
    assert main(["export", str(run), str(tmp_path / "hf"), "--to", "hf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "LlamaForCausalLM"
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"


def test_export_writes_shards_and_the_files_that_transformers_reads(
    routed: Path, tmp_path: Path, library: Any, model: Any
) -> None:
    words = ["export", str(routed / "run"), str(tmp_path / "hf"), "--to", "hf", "--max-shard-bytes", "8000"]
    assert main(words) == 0
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "README.md", "model.safetensors.index.json"} < names
    sharded = library.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(sharded, some_tokens(40)), logits(model, some_tokens(40)))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "headway" and config["architectures"] == ["HeadwayForCausalLM"]
    assert config["attention"]["type"] == "rgqa" and config["max_position_embeddings"] == 48


# ------------------------------------------------------------------ calls of the model


def test_the_loss_is_the_mean_cross_entropy_of_the_next_tokens(model: Any) -> None:
    tokens = some_tokens(40)
    labels = tokens.clone()
    labels[0, 7:20] = -100
    out = model(tokens, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(out.logits, logits(model, tokens)) and out.past_key_values is None
    loss, found = model(tokens, labels=labels, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(found, out.logits)


def test_training_adds_balancing_and_draws_new_dropout(routed: Path, library: Any) -> None:
    model = library.AutoModelForCausalLM.from_pretrained(routed / "hf").train()
    tokens = some_tokens(40)
    torch.manual_seed(1)
    first, second = (model(tokens, labels=tokens).loss for _ in range(2))
    torch.manual_seed(1)
    again = model(tokens, labels=tokens)
    cross_entropy = F.cross_entropy(again.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.equal(first, again.loss) and not torch.equal(first, second)
    assert again.loss > cross_entropy + 1e-4  # f_p of the routers
    first.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_cache_continues_its_tokens(model: Any) -> None:
    """Within rounding: products of one token are computed in another order than those of many."""
    tokens = some_tokens(40)
    out = model(tokens[:, :20], use_cache=True)
    assert out.past_key_values.get_seq_length() == 20
    more = model(tokens[:, 20:], past_key_values=out.past_key_values)
    assert more.past_key_values.get_seq_length() == 32
    found = torch.cat([out.logits, more.logits], 1)
    torch.testing.assert_close(found, logits(model, tokens), rtol=0, atol=1e-4)


def test_logits_to_keep_are_the_last_ones(model: Any) -> None:
    tokens = some_tokens(40)
    expected = logits(model, tokens)
    for kept, there in ((1, expected[:, -1:]), (3, expected[:, -3:]), (torch.tensor([2, 5]), expected[:, [2, 5]])):
        assert torch.equal(model(tokens, logits_to_keep=kept).logits, there)
    assert model(tokens, use_cache=True, logits_to_keep=1).logits.shape == (3, 1, 40)


def test_a_batch_generates_what_its_sequences_do_alone(model: Any) -> None:
    prompts = some_tokens(40, 9)
    together = model.generate(prompts, max_new_tokens=NEW, do_sample=False)
    alone = [model.generate(prompts[i : i + 1], max_new_tokens=NEW, do_sample=False)[0] for i in range(3)]
    assert torch.equal(together, torch.stack(alone))
    uncached = model.generate(prompts, max_new_tokens=NEW, do_sample=False, use_cache=False)
    assert torch.equal(together, uncached)
    searched = model.generate(prompts, max_new_tokens=4, num_beams=2, do_sample=False, use_cache=False)
    assert searched.shape == (3, 13)
    with pytest.raises(NotImplementedError, match=r"num_beams: .*use num_beams=1, or use_cache=False"):
        model.generate(prompts, max_new_tokens=4, num_beams=2, do_sample=False)


def test_padding_on_the_right_changes_nothing_and_other_padding_is_refused(model: Any) -> None:
    tokens = some_tokens(40)
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    padded[1, 20:], mask[1, 20:] = 0, 0
    found = model(padded, attention_mask=mask).logits
    assert torch.equal(found[[0, 2]], logits(model, tokens)[[0, 2]])
    # The batch has other tokens after the padding, so products are computed with other neighbours.
    torch.testing.assert_close(found[1, :20], logits(model, tokens)[1, :20], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="padding is not supported in generation, nor with a cache"):
        model(padded, attention_mask=mask, use_cache=True)
    with pytest.raises(ValueError, match="padding before or between tokens"):
        model(padded, attention_mask=mask.flip(1))
    for wrong in (mask, mask.flip(1)):
        for cached in (True, False):
            with pytest.raises(ValueError, match="generate from prompts of equal length"):
                model.generate(padded, attention_mask=wrong, max_new_tokens=1, do_sample=False, use_cache=cached)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"input_ids": None}, "input_ids: missing"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"input_ids: .*not of shape \[B, S\]"),
        ({"output_attentions": True}, "output_attentions, output_hidden_states: .*return neither"),
        ({"output_hidden_states": True}, "output_attentions, output_hidden_states: .*return neither"),
        ({"labels": some_tokens(40), "use_cache": True}, "labels: no loss is computed with a cache"),
        ({"past_key_values": ()}, "past_key_values: tuple cannot hold"),
        ({"attention_mask": torch.zeros(3, 1, 32, 32)}, r"attention_mask: of shape \[3, 1, 32, 32\]; use \[B, S\]"),
    ],
)
def test_what_is_not_supported_is_refused(model: Any, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model(**{"input_ids": some_tokens(40), **arguments})


def test_bf16_is_near(routed: Path, library: Any, model: Any) -> None:
    """bf16 has 8 bits: a relative error of 2^-8 per operation. Another expert may be chosen where scores are close."""
    half = library.AutoModelForCausalLM.from_pretrained(routed / "hf", dtype=torch.bfloat16)
    tokens = some_tokens(40)
    expected = logits(model, tokens)
    error = (logits(half, tokens).float() - expected).abs().median() / expected.std()
    assert half.dtype == torch.bfloat16 and error < 0.05


# ------------------------------------------------------------------ folders that do not fit


def test_a_folder_that_does_not_fit_is_refused(routed: Path, tmp_path: Path, library: Any) -> None:
    def broken(match: str, *, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
        bad = shutil.copytree(routed / "hf", tmp_path / "bad")
        found = load_file(bad / "model.safetensors")
        found = {name: tensor for name, tensor in (found | (tensors or {})).items() if tensor.numel()}
        save_file(found, bad / "model.safetensors", metadata={"format": "pt"})
        written = json.loads((bad / "config.json").read_text()) | config
        (bad / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v != "absent"}))
        for read in (library.AutoModelForCausalLM.from_pretrained, lambda folder: import_hf(folder, tmp_path / "x")):
            with pytest.raises((WeightsError, RuntimeError), match=match):
                read(bad)
        assert not (tmp_path / "x").exists()
        shutil.rmtree(bad)

    norm = "decoder.norm.gain"
    broken("decoder.norm.gain|too few", tensors={norm: torch.empty(0)})
    broken("decoder.extra", tensors={"decoder.extra": torch.ones(2)})
    broken("decoder.norm.gain|size mismatch|ignore_mismatched_sizes", tensors={norm: torch.ones(25)})
    broken("attention.type other is no mechanism", attention={"type": "other"})
    broken("attention.*top_k", attention={**RGQA, "top_k": "many"})
    broken(r"model(\.width)?: Field required", model="absent")


def test_logits_that_differ_leave_nothing(routed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = importlib.import_module("headway.model.huggingface.auto")
    forward = auto.HeadwayForCausalLM.forward

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * (1 + 1e-6)
        return out

    monkeypatch.setattr(auto.HeadwayForCausalLM, "forward", shifted)
    with pytest.raises(HeadwayError, match=r"logits of random tokens differ by .*nothing was written"):
        export(routed / "run", tmp_path / "hf", to="hf")
    assert list(tmp_path.iterdir()) == []
    load = form.load_form

    def changed(*args: Any) -> Any:
        decoder, exported = load(*args)
        decoder.norm.gain.mul_(1 + 1e-6)
        return decoder, exported

    monkeypatch.setattr(form, "load_form", changed)
    with pytest.raises(HeadwayError, match="logits of the written weights differ from the run's"):
        export(routed / "run", tmp_path / "hf", to="hf")
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "headway.model.huggingface.auto")
    monkeypatch.delitem(sys.modules, "headway.hf")
    with pytest.raises(ImportError, match=r"headway.hf needs transformers, .*pip install 'headway\[hf\]'"):
        importlib.import_module("headway.hf")


def test_without_transformers_the_weights_are_compared_by_our_reader(
    routed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = importlib.import_module("headway.launcher.exchange.hf_check")
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    assert export(routed / "run", tmp_path / "hf", to="hf") == 0
    said = capsys.readouterr().out
    assert "equal the run's bit for bit; ids and logits not compared: transformers is not installed" in said


def test_a_mechanism_of_another_package_is_exported_too(
    tmp_path: Path, library: Any, install: Any, mechanism_source: Any
) -> None:
    install("outside", mechanism_source("outside"))
    attention = {"type": "outside", "heads": 4, "kv_heads": 2, "head_dim": 6}
    run = untrained_run(tmp_path / "run", attention=attention)
    assert export(run, tmp_path / "hf", to="hf") == 0
    theirs = library.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(theirs, some_tokens(40)), logits(decoder_of(run), some_tokens(40)))
