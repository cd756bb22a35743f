"""The tokenizer of a Hugging Face export gives the ids of training, or there is no export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llamas import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from headway.data import tokenizer as tokenizers_of_data
from headway.data.config import DataError
from headway.launcher.base.errors import HeadwayError
from headway.launcher.exchange import export as export_module
from headway.launcher.exchange import hf_tokenizer
from headway.launcher.exchange.export import export
from headway.launcher.exchange.hf_tokenizer import TEXTS, compare_texts, load_reader, write_tokenizer
from headway.launcher.run.codec import Codec

WORDS = "document 7 says that the sum of 3 and 4 is 7, as everyone knows. "
CORPUS = """
name: set
corpus: {type: text, paths: [text]}
out: set
tokenizer: {type: file, path: tok.json, eos_token: "</s>", lossy: allow}
validation_fraction: 0.2
"""
TEXT = """
name: text
model: {width: 32, layers: 2, ffn_width: 48, init_std: 0.1}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data: {seq_len: 32, source: {type: mds, path: set}}
optimizer: {lr: 3.0e-3}
train: {tokens: 768, global_batch: 8, micro_batch: 4, validation_tokens: 512}
launch: {processes: 1, threads: 1}
"""


def byte_level(*, space: bool = False) -> Any:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    return tokenizer


def template() -> Any:
    both = [("<s>", 0), ("</s>", 1)]
    return processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=both)


def with_template() -> Any:
    tokenizer = byte_level()
    tokenizer.post_processor = template()
    return tokenizer


def with_roberta() -> Any:
    tokenizer = byte_level(space=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=True)
    return tokenizer


def with_sequence_of_processors() -> Any:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template()])
    return tokenizer


def with_truncation_and_padding() -> Any:
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8, pad_id=2, pad_token="<pad>")
    return tokenizer


def with_sequence_of_pre_tokenizers() -> Any:
    tokenizer = byte_level(space=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    return tokenizer


def with_normalizers() -> Any:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("7", "seven")]
    )
    return tokenizer


def with_added_tokens() -> Any:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("says that", single_word=True), AddedToken(" sum ", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|user|>", lstrip=True, rstrip=True), "[7]"])
    return tokenizer


def metaspace() -> Any:
    """As SentencePiece: a space before every text, and pieces for the end and for unknown text."""
    pieces = [("<unk>", -9.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0), *((c, -4.0) for c in sorted(set(WORDS)))]
    tokenizer: Any = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def word_level() -> Any:
    vocab = {word: n for n, word in enumerate(dict.fromkeys(["[UNK]", "</s>", *WORDS.split()]))}
    tokenizer: Any = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


KINDS: list[Callable[[], Any]] = [
    byte_level,
    lambda: byte_level(space=True),
    with_template,
    with_roberta,
    with_sequence_of_processors,
    with_truncation_and_padding,
    with_sequence_of_pre_tokenizers,
    with_normalizers,
    with_added_tokens,
    metaspace,
    word_level,
]


def codec_of(tokenizer: Any, folder: Path) -> Codec:
    file = folder / "given.json"
    tokenizer.save(str(file))
    loaded = tokenizers_of_data.load(file, eos_token="</s>")
    return Codec(loaded, loaded.vocab_size, file=file, eos_id=loaded.eos_id, eos_token="</s>")


@pytest.mark.parametrize("make", KINDS)
def test_transformers_gives_the_ids_of_training(make: Callable[[], Any], tmp_path: Path) -> None:
    codec = codec_of(make(), tmp_path)
    write_tokenizer(tmp_path, codec, seq_len=32)
    reader = transformers().AutoTokenizer.from_pretrained(tmp_path)
    assert codec.tokenizer is not None
    for text in (WORDS, f" {WORDS}", "a</s>b<s> <|user|> c", "says that sum [7]", *TEXTS):
        assert reader(text)["input_ids"] == codec.tokenizer.encode([text])[0], text
    pair = [codec.tokenizer.encode([text])[0] for text in ("7", "3")]
    assert reader("7", "3")["input_ids"] == [*pair[0], *pair[1]]
    assert (reader.bos_token_id, reader.eos_token_id, reader.pad_token_id) == (None, codec.eos_id, None)
    assert set(reader("7")) == {"input_ids", "attention_mask"} and reader.model_max_length == 32
    assert compare_texts(reader, codec, [WORDS]) > 8


def test_a_tokenizer_that_adds_nothing_is_copied(tmp_path: Path) -> None:
    """So that its hash remains that of the dataset."""
    codec = codec_of(byte_level(), tmp_path)
    write_tokenizer(tmp_path, codec, seq_len=32)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "given.json").read_bytes()


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: byte_level(space=True), {"add_prefix_space": False}),
        (byte_level, {"add_prefix_space": True}),
        (byte_level, {"split_special_tokens": False}),
        (byte_level, {"bos_token": "<s>"}),
        (byte_level, {"eos_token": "<pad>"}),
        (byte_level, {"eos_token": "document"}),
        (byte_level, {"clean_up_tokenization_spaces": True}),
    ],
)
def test_every_wrong_setting_is_found(make: Callable[[], Any], change: dict[str, Any], tmp_path: Path) -> None:
    codec = codec_of(make(), tmp_path)
    write_tokenizer(tmp_path, codec, seq_len=32)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | change))
    with pytest.raises(DataError, match=r"nothing was written\. Use --to safetensors"):
        compare_texts(load_reader(tmp_path, transformers()), codec, [WORDS])


@pytest.mark.parametrize("make", [with_template, with_roberta, with_truncation_and_padding])
def test_the_file_of_training_as_it_is_would_be_found(make: Callable[[], Any], tmp_path: Path) -> None:
    codec = codec_of(make(), tmp_path)
    write_tokenizer(tmp_path, codec, seq_len=32)
    (tmp_path / "given.json").replace(tmp_path / "tokenizer.json")
    reader = load_reader(tmp_path, transformers())
    if make is with_truncation_and_padding:  # transformers sets both anew for each text
        assert reader.pad_token == "<pad>"
        return
    with pytest.raises(DataError, match=r"transformers gives the ids \[.* training had \["):
        compare_texts(reader, codec, [])


@pytest.fixture(scope="module")
def run(headway_once: Any) -> Path:
    """A run on text whose tokenizer adds `<s>`, `</s>` and a space."""
    folder = headway_once.folder
    (folder / "text").mkdir()
    for i in range(30):
        (folder / "text" / f"{i}.txt").write_text(f"document {i} says that the sum of {i} and {i} is {2 * i}. " * 20)
    with_roberta().save(str(folder / "tok.json"))
    (folder / "corpus.yaml").write_text(CORPUS)
    (folder / "text.yaml").write_text(TEXT)
    for words in (("data", "build", "corpus.yaml"), ("train", "text.yaml", "run_dir=run")):
        done = headway_once.run(*words)
        assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def in_place(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)


@pytest.mark.usefixtures("in_place")
def test_an_export_reads_and_continues_text_as_the_run_does(run: Path, tmp_path: Path, capsys: Any) -> None:
    from headway.launcher.cli.main import main

    assert main(["export", str(run), str(tmp_path / "hf"), "--to", "hf"]) == 0
    said = capsys.readouterr().out
    assert "equal ids for" in said and "on validation tokens" in said and "equal greedy continuation of" in said
    library = transformers()
    reader = library.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = library.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (None, 1, None)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (None, 1)
    inputs = reader("document 3 says", return_tensors="pt")
    theirs = reader.decode(model.generate(**inputs, max_new_tokens=8)[0])
    capsys.readouterr()
    assert main(["generate", str(run), "document 3 says", "--tokens", "8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == theirs.removesuffix("</s>")
    assert main(["generate", str(tmp_path / "hf"), "document 3 says", "--tokens", "8", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == theirs.removesuffix("</s>")


@pytest.mark.usefixtures("in_place")
def test_other_ids_leave_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_tokenizer, "_without_tokens", lambda processor: processor)
    with pytest.raises(DataError, match=r"transformers gives the ids \[0.*for the text ''"):
        export(run, tmp_path / "hf", to="hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repetition_penalty": 9.0}, r"greedy continuations differ from new token \d+ on: transformers takes"),
        ({"forced_bos_token_id": 5, "forced_eos_token_id": 5}, "greedy continuations differ"),
        ({"eos_token_id": list(range(300))}, "transformers ends a continuation after 1 of 16 tokens"),
        ({"num_beams": -1}, "transformers cannot continue a prompt"),
    ],
)
def test_another_continuation_leaves_nothing(
    change: dict[str, Any], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = export_module.hf.write_json

    def changed(path: Path, value: Any) -> None:
        write(path, value | change if path.name == "generation_config.json" else value)

    monkeypatch.setattr(export_module.hf, "write_json", changed)
    with pytest.raises(HeadwayError, match=message):
        export(run, tmp_path / "hf", to="hf")
    assert list(tmp_path.iterdir()) == []
