"""`headway import` of T5: logits of transformers, training from the weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import transformers
from safetensors.torch import load_file, save_file

from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.cli.main import main
from headway.launcher.exchange import import_t5
from headway.launcher.exchange.generate import Sampling, generate
from headway.launcher.exchange.import_hf import import_hf
from headway.launcher.exchange.opened import open_model
from headway.model.huggingface.folder import WeightsError, load_exported, load_model
from headway.model.seq2seq.model import EncoderDecoder

FORMS: dict[str, dict[str, Any]] = {
    "t5": {"feed_forward_proj": "relu"},
    "t5-v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0},
    "silu": {"feed_forward_proj": "gated-silu", "num_decoder_layers": 3},
}


def saved(folder: Path, **changes: Any) -> Any:
    """A T5 with random weights in `folder`."""
    library = transformers()
    shape = {"vocab_size": 64, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "n_positions": 32}
    model = library.T5ForConditionalGeneration(library.T5Config(**shape, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("t5") / "hf"
    saved(folder)
    return folder


@pytest.fixture
def folder(t5_folder, tmp_path) -> Path:
    """A copy of the T5 for a test to modify."""
    return shutil.copytree(t5_folder, tmp_path / "hf")


@pytest.mark.parametrize("name", FORMS)
def test_an_imported_t5_has_the_logits_of_transformers(tmp_path, name, capsys):
    theirs = saved(tmp_path / "hf", **FORMS[name])
    assert main(["import", str(tmp_path / "hf"), "--to", str(tmp_path / "ours")]) == 0
    assert "largest difference from the logits of transformers" in capsys.readouterr().out
    model = load_model(tmp_path / "ours")
    assert isinstance(model, EncoderDecoder) and (model.head is None) == (name != "t5-v1.1")
    source, target = torch.randint(64, (2, 11)), torch.randint(64, (2, 7))
    with torch.no_grad():
        expected = theirs(input_ids=source, decoder_input_ids=target).logits
        assert (model.logits(source, target) - expected).abs().max() < 1e-5 * expected.abs().max()
    written = (tmp_path / "ours" / "model.yaml").read_text()
    assert "type: encoder_decoder" in written and "data.encoder_tokens" in written
    assert f"dropout: {0.0 if name == 't5-v1.1' else 0.1}" in written
    assert "load_model" in (tmp_path / "ours" / "README.md").read_text()


def test_differing_logits_are_noticed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(import_t5, "t5_name", lambda name, model: renamed(name, model))
    with pytest.raises(HeadwayError, match="logits of random tokens differ"):
        import_hf(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def renamed(name: str, model: Any) -> str:
    """Keys and values exchanged in the cross attention of the last block."""
    swap = {"blocks.1.cross.w_k": "blocks.1.cross.w_v", "blocks.1.cross.w_v": "blocks.1.cross.w_k"}
    from headway.model.huggingface.t5 import t5_name

    return t5_name(swap.get(name, name), model)


def test_old_checkpoints_with_copies_and_an_unused_table_are_read(folder, tmp_path):
    held = load_file(folder / "model.safetensors")
    held["encoder.embed_tokens.weight"] = held["shared.weight"].clone()
    held["lm_head.weight"] = held["shared.weight"].clone()
    held["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 4)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    assert import_hf(folder, tmp_path / "ours") == 0
    held["encoder.embed_tokens.weight"][3, 3] += 1
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"encoder\.embed_tokens\.weight differs from shared\.weight"):
        import_hf(folder, tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj: 'gated-relu' is not supported"),
        ({"dense_act_fn": "silu"}, "dense_act_fn: 'silu' contradicts feed_forward_proj 'relu'"),
        ({"architectures": ["T5EncoderModel"]}, r"is not T5ForConditionalGeneration"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder: false"),
        ({"scale_scores": True}, "scale_scores: True is not supported"),
        ({"d_model": 0}, "d_model: 0 is not an integer above 0"),
        ({"relative_attention_num_buckets": 7}, "relative_buckets: "),
        ({"num_layers": 3}, "are too few for the 5 layers"),
        ({"num_layers": 1}, "tensors do not match"),
        ({"dropout_rate": 1.5}, "dropout_rate: 1.5 is not a number from 0 to 1"),
        ({"auto_map": {"AutoModel": "x.y"}}, "auto_map: the checkpoint contains code"),
    ],
)
def test_other_models_are_refused(folder, tmp_path, changes, message):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        import_hf(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_reads_decoders_refuses_it(folder, tmp_path):
    assert import_hf(folder, tmp_path / "ours") == 0
    with pytest.raises(WeightsError, match="holds an encoder_decoder"):
        open_model(folder)
    with pytest.raises(SpecError, match="works on decoders only"):
        _ = open_model(tmp_path / "ours").decoder
    greedy = Sampling(tokens=2, temperature=0.0, top_p=1.0, seed=1)
    with pytest.raises(SpecError, match="do not say which tokens start a target"):
        generate(tmp_path / "ours", "1 2 3", greedy)
    with pytest.raises(WeightsError, match="holds an encoder_decoder"):
        load_exported(tmp_path / "ours")
