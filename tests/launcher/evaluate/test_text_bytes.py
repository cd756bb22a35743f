"""Bits per byte of texts whose tokenizer changes them: a space before each text, and text that is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from untrained_runs import untrained_run

from headway.data.build import build
from headway.data.corpus.config import CorpusConfig
from headway.data.mds import MdsSplit
from headway.launcher.evaluate import evaluate
from headway.launcher.evaluate.choices import Question, evaluate_choices
from headway.launcher.evaluate.measure import Measure
from headway.launcher.evaluate.texts import TextSource, evaluate_text
from headway.launcher.exchange.opened import Opened, open_model
from headway.launcher.run.codec import Codec

TEXTS = [f"Number {n}: {n * n} is its square, größer als {n}." for n in range(60)]
ATTENTION = {"type": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 6}


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def trained_tokenizer(folder: Path, *steps: Any) -> dict[str, Any]:
    """A byte-level BPE with these pre-tokenizers, as a section of a corpus spec."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps])
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tok.json"))
    return {"type": "file", "path": str(folder / "tok.json")}


def made(folder: Path, tokenizer: dict[str, Any]) -> tuple[Opened, Path, Path]:
    """An untrained run on `TEXTS`, its dataset, and a file with the texts of its validation in the same order."""
    corpus = {"type": "jsonl", "paths": [str(write(folder / "all.jsonl", TEXTS))]}
    settings = {"name": "texts", "corpus": corpus, "tokenizer": tokenizer, "validation_fraction": 0.3}
    build(CorpusConfig.model_validate(settings), out=folder / "data", progress=False)
    source = {"type": "mds", "path": str(folder / "data")}
    untrained_run(folder / "run", attention=ATTENTION, data={"source": source, "seq_len": 64})
    split = MdsSplit(folder / "data", "validation")
    held = [TEXTS[int(split.id(n).rpartition(":")[2]) - 1] for n in range(len(split))]
    return open_model(folder / "run"), folder / "data", write(folder / "held.jsonl", held)


def measured(model: Opened, path: Path) -> dict[str, Measure]:
    found = evaluate_text(model, TextSource(name="t", path=path), limit=None, done=lambda tokens: None)
    return {measure.name: measure for measure in found}


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_a_dataset_has_the_bits_per_byte_of_its_texts(add_prefix_space: bool, tmp_path: Path) -> None:
    """A space that the tokenizer puts before each text is no byte of it."""
    step = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    model, dataset, held = made(tmp_path, trained_tokenizer(tmp_path, step))
    assert model.codec.decode([*model.codec.encode("a")]) == (" a" if add_prefix_space else "a")
    assert measured(model, dataset) == measured(model, held)


def test_a_space_of_the_text_itself_is_a_byte_unless_it_has_the_ids_of_the_text_without(tmp_path: Path) -> None:
    for add_prefix_space in (False, True):
        step = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        file = Path(trained_tokenizer(tmp_path, step)["path"])
        codec = Codec.of_weights(file, 300, eos_id=0, bos_id=None)
        assert codec.text_bytes(codec.encode("größer")) == 8
        assert codec.text_bytes(codec.encode(" größer")) == (8 if add_prefix_space else 9)
        assert codec.text_bytes(codec.encode("  größer")) == 10


def test_text_that_the_tokenizer_loses_has_no_bits_per_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = (pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False))
    model, dataset, held = made(tmp_path, trained_tokenizer(tmp_path, *steps) | {"lossy": "allow"})
    assert model.codec.decode([*model.codec.encode("a b")]) == "ab"
    for path in (dataset, held):
        capsys.readouterr()
        assert set(measured(model, path)) == {"t/loss"}
        assert "note: t: the tokenizer loses text; bits per byte" in capsys.readouterr().err
    kept = write(tmp_path / "kept.jsonl", ["one", "größer"])
    assert set(measured(model, kept)) == {"t/loss", "t/bits_per_byte"}
    asked = {(" b", " c"): {"q/acc", "q/acc_norm"}, ("b", "c"): {"q/acc", "q/acc_norm", "q/gold_bits_per_byte"}}
    for choices, names in asked.items():
        found = evaluate_choices(model, "q", [Question("a", choices, (0,))], done=lambda tokens: None)
        assert {measure.name for measure in found} == names


def test_bits_per_byte_do_not_outlive_the_measure_they_were_taken_with(tmp_path: Path) -> None:
    def keep(*names: str) -> list[str]:
        measures = [{"name": name} for name in names]
        evaluate._keep(tmp_path / "evaluation.json", {"format": evaluate.FORMAT, "model": {}, "measures": measures})
        return [row["name"] for row in json.loads((tmp_path / "evaluation.json").read_text())["measures"]]

    before = ["a/bits_per_byte", "a/loss", "a/loss@32", "b/bits_per_byte", "b/loss", "q/acc", "q/gold_bits_per_byte"]
    assert keep(*before) == before
    assert keep("a/loss") == [name for name in before if name != "a/bits_per_byte"]
    assert keep("q/acc") == ["a/loss", "a/loss@32", "b/bits_per_byte", "b/loss", "q/acc"]
