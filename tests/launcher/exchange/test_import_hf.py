"""`headway import`: a Llama of any shape keeps its logits, and other models are refused."""

import json
import os
import shutil

import pytest
import torch
from llamas import logits, some_tokens, transformers
from safetensors.torch import load_file, save_file

from headway.data import tokenizer
from headway.data.corpus.config import TrainTokenizer
from headway.launcher.base.errors import HeadwayError
from headway.launcher.cli.main import main
from headway.launcher.exchange import import_hf as import_module
from headway.launcher.exchange.import_hf import import_hf
from headway.launcher.run.codec import Codec
from headway.model.attention.gqa import GqaConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.model.huggingface import folder as hf
from headway.model.huggingface.folder import load_exported
from headway.model.huggingface.llama import llama_config, llama_name, older_form


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A Llama with random weights and a tokenizer of 300 tokens."""
    folder = tmp_path_factory.mktemp("llama")
    texts = [f"document {i} says that the sum of {i} and {i} is {2 * i}. " * 5 for i in range(30)]
    cfg = TrainTokenizer(type="train_bpe", vocab_size=300)
    assert tokenizer.train(cfg, texts, out=folder / "tokenizer.json", progress=False).vocab_size == 300
    model = ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.1, tied_embeddings=False)
    attention = GqaConfig(heads=4, kv_heads=2, head_dim=8)
    decoder = Decoder(model, attention, vocab_size=300, seed=1)
    tensors = {llama_name(name): tensor for name, tensor in decoder.state_dict().items()}
    hf.write_tensors(folder, tensors, max_shard_bytes=1 << 30)
    hf.write_json(folder / "config.json", llama_config(model, attention, vocab_size=300, seq_len=32, eos_token_id=0))
    return folder


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A copy of the Llama for a test to modify."""
    return shutil.copytree(llama_folder, tmp_path / "hf")


SHAPES = {
    "mha": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa": {"num_key_value_heads": 1, "rope_theta": 500.0, "rms_norm_eps": 1e-6},
    "gqa": {"num_key_value_heads": 2, "head_dim": 6},
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_imported_llama_has_the_logits_of_transformers(tmp_path, kind, dtype):
    library = transformers()
    shape = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config = library.LlamaConfig(**shape, num_attention_heads=4, initializer_range=0.1, **SHAPES[kind])
    theirs = library.LlamaForCausalLM(config).eval().to(dtype)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert import_hf(tmp_path / "hf", tmp_path / "ours") == 0
    ours, tokens = load_exported(tmp_path / "ours"), some_tokens(90)
    assert ours.attention.type == kind
    theirs = library.LlamaForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype=torch.float32)
    assert (logits(ours, tokens) - logits(theirs, tokens)).abs().max() < 1e-5 < logits(ours, tokens).std()


@pytest.mark.parametrize("table", ["rope_parameters", "rope_scaling"])
def test_a_base_in_the_form_of_newer_releases_is_read_and_compared(tmp_path, table, capsys, monkeypatch):
    """The pinned transformers does not know `rope_parameters`: it would take the base 10,000 without a word."""
    library = transformers()
    shape = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config = library.LlamaConfig(**shape, num_attention_heads=4, initializer_range=0.1, rope_theta=500.0)
    theirs = library.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    newer = {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 1.0}
    edited(rope_theta="absent", **{"rope_scaling": None, table: newer})(tmp_path / "hf")
    assert import_hf(tmp_path / "hf", tmp_path / "ours") == 0
    assert "largest difference from the logits of transformers" in capsys.readouterr().out
    ours, tokens = load_exported(tmp_path / "ours"), some_tokens(90)
    assert ours.attention.layer(0, 2).rope_base == 500.0
    assert (logits(ours, tokens) - logits(theirs, tokens)).abs().max() < 1e-5 < logits(ours, tokens).std()
    monkeypatch.setattr(import_module, "older_form", lambda config: older_form(config) | {"rope_theta": 600.0})
    with pytest.raises(HeadwayError, match="logits of random tokens differ"):
        import_hf(tmp_path / "hf", tmp_path / "other")


def edited(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        config = {k: v for k, v in (config | changes).items() if v != "absent"}
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def tensors(change):
    def edit(folder):
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def with_index(weight_map):
    def edit(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return edit


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def linked(folder):
    (folder / "model.safetensors").rename(folder / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder / "elsewhere")


NORM = "model.norm.weight"
REFUSED = {
    "another architecture": (edited(architectures=["MistralForCausalLM"], model_type="mistral"), "architectures: "),
    "code of its own": (edited(auto_map={"AutoModel": "x.Y"}), "auto_map: .*code, which is not executed"),
    "scaled positions": (edited(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling: .*llama3"),
    "newer scaled positions": (edited(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_parameters: .*yarn"),
    "two bases": (edited(rope_parameters={"rope_theta": 500.0}), "rope_theta: .*several values .10000, 500. in"),
    "two bases in the older table": (edited(rope_scaling={"type": "default", "rope_theta": 5.0}), "several values"),
    "newer rotation of a part": (
        edited(rope_parameters={"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}),
        "rope_parameters: .*partial_rotary_factor",
    ),
    "biases of attention": (edited(attention_bias=True), "attention_bias: .*no biases"),
    "biases of the mlp": (edited(mlp_bias=True), "mlp_bias: .*no biases"),
    "another activation": (edited(hidden_act="gelu"), "hidden_act: 'gelu'"),
    "a window": (edited(sliding_window=128), "sliding_window: 128 is not supported"),
    "part of the channels rotated": (edited(partial_rotary_factor=0.5), "partial_rotary_factor: "),
    "heads that do not divide": (edited(head_dim="absent", num_attention_heads=5), "head_dim: not given"),
    "groups that do not divide": (edited(num_key_value_heads=3), "num_key_value_heads: 4 query heads"),
    "another head size": (edited(head_dim=16), "too few|has shape \\[.*implies"),
    "a smaller head size": (edited(head_dim=4), "config.json implies"),
    "no size": (edited(vocab_size="absent"), "vocab_size: None"),
    "a size that fills memory": (edited(num_hidden_layers=10_000), "too few"),
    "a width that fills memory": (edited(hidden_size=1 << 30), "too few"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{" * 100_000), "not JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "No such file"),
    "a missing tensor": (tensors(lambda t: t.pop(NORM)), "missing .'model.norm.weight'.|too few"),
    "an unknown tensor": (tensors(lambda t: t.update({"model.extra": torch.ones(3)})), "unknown .'model.extra'."),
    "a misshapen tensor": (tensors(lambda t: t.update({NORM: torch.ones(33)})), r"has shape \[33\], .* implies \[32\]"),
    "whole numbers": (tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})), "is torch.int8"),
    "no numbers": (tensors(lambda t: t.update({NORM: torch.full((32,), float("nan"))})), "has NaN or Inf values"),
    "a tied head that differs": (edited(tie_word_embeddings=True), "lm_head.weight differs from the embedding"),
    "other frequencies": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
        "unknown .*inv_freq",
    ),
    "a truncated file": (lambda f: os.truncate(f / "model.safetensors", 5000), "not a complete safetensors file"),
    "a pickle": (pickled, "is a pickle, and loading a pickle can execute code"),
    "a link": (linked, "is a link, and links are not followed"),
    "an index that leads out": (with_index({NORM: "../model.safetensors"}), "is not a safetensors file name"),
    "an index of something else": (with_index({NORM: "model.safetensors"}), "does not match model.safetensors"),
    "another tokenizer": (lambda f: edited(vocab_size=299)(f), r"contains token 299|has shape \[300"),
    "a tokenizer that is none": (lambda f: (f / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_invalid_or_incomplete_llama_is_refused_and_nothing_is_left(folder, tmp_path, what):
    change, match = REFUSED[what]
    change(folder)
    with pytest.raises(Exception, match=match) as raised:
        import_hf(folder, tmp_path / "ours")
    assert getattr(raised.value, "exit_code", None) == 65, raised.value
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_redundant_tensors_and_keys_are_accepted(folder, tmp_path):
    """Frequencies and tied heads of older releases, training settings, and tables of newer releases are accepted."""
    frequencies = 10_000.0 ** (-torch.arange(4) / 4)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors(lambda t: t.update({name: frequencies.bfloat16(), "lm_head.weight": t["model.embed_tokens.weight"] + 0}))(
        folder
    )
    table = {"rope_type": "default", "rope_theta": 10_000.0}
    edited(
        tie_word_embeddings=True, rope_theta="absent", rope_parameters=table, attention_dropout=0.1, dtype="bfloat16"
    )(folder)
    assert import_hf(folder, tmp_path / "ours") == 0
    assert load_exported(tmp_path / "ours").head is None


def test_a_bos_token_of_the_tokenizer_is_added_before_prompts(folder, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert import_hf(folder, tmp_path / "ours") == 0
    config = hf.read_exported(tmp_path / "ours")
    assert config.bos_token_id == 0
    ids = Codec.of_exported(tmp_path / "ours", config).encode("document")
    assert ids[0] == 0 and len(ids) == 2


def test_generate_reads_a_llama_without_import(folder, capsys):
    words = ["generate", str(folder), "document 3 says", "--tokens", "5", "--temperature", "0"]
    assert main(words) == 0
    direct = capsys.readouterr().out
    assert main(["import", str(folder), "--to", str(folder.parent / "ours")]) == 0
    capsys.readouterr()
    assert main([words[0], str(folder.parent / "ours"), *words[2:]]) == 0
    assert capsys.readouterr().out == direct and len(direct) > len("document 3 says\n")
    (folder / "tokenizer.json").unlink()
    assert main(["generate", str(folder), "5 40 7", "--tokens", "5"]) == 0
    edited(hidden_act="gelu")(folder)
    assert main(["generate", str(folder), "5 40 7"]) == 65
    assert "hidden_act: 'gelu'" in capsys.readouterr().err


def test_a_llama_as_initial_weights_is_refused_with_the_way(folder):
    with pytest.raises(
        hf.WeightsError, match=r"is a Hugging Face model; convert it with `headway import .*hf --to DIR`"
    ):
        hf.read_exported(folder)


@pytest.mark.parametrize("unknown", [None, "[UNK]"])
def test_a_tokenizer_that_does_not_know_the_letter_a_can_be_imported(folder, tmp_path, unknown):
    from tokenizers import Tokenizer, models
    from tokenizers.processors import TemplateProcessing

    vocab = {word: n for n, word in enumerate(["<s>", "</s>", "one", "two", *([unknown] if unknown else [])])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9, direction="left")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert import_hf(folder, tmp_path / "ours") == 0
    assert hf.read_exported(tmp_path / "ours").bos_token_id == 0
