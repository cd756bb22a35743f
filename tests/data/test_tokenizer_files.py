"""Tokenizers: training is reproducible and uses training documents only; any tokenizer.json can be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_corpora import corpus_config, make_texts, write_jsonl

from headway.data.build import build
from headway.data.config import DataError
from headway.data.corpus.config import TrainTokenizer
from headway.data.manifest import read_manifest
from headway.data.mds import MdsSplit
from headway.data.tokenizer import EOS_TOKEN, load, train, vocab_size_of


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    cfg = TrainTokenizer(type="train_bpe", vocab_size=320)
    for name in ("a", "b"):
        train(cfg, make_texts(30), out=tmp_path / name, progress=False)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_text_survives_and_a_text_cannot_end_its_own_document(tmp_path: Path) -> None:
    made = train(TrainTokenizer(type="train_bpe", vocab_size=300), ["some text"], out=tmp_path / "t", progress=False)
    assert made.eos_id == 0
    for tokenizer in (made, load(tmp_path / "t")):
        texts = [f"before {EOS_TOKEN} after", "\x00\r\n\t 漢字 🙂 ", EOS_TOKEN]
        encoded = tokenizer.encode(texts)
        assert [tokenizer.decode(ids) for ids in encoded] == texts
        assert all(0 not in ids for ids in encoded)


def test_a_small_corpus_gives_a_smaller_vocabulary_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["aa aa", "bb bb", "cc"])
    cfg = corpus_config(path, tokenizer={"type": "train_bpe", "vocab_size": 5000})
    manifest = build(cfg, out=tmp_path / "out", progress=False)
    assert 257 <= manifest.vocab_size < 300
    assert vocab_size_of(tmp_path / "out" / "tokenizer.json") == manifest.vocab_size
    assert "fewer than vocab_size 5,000" in capsys.readouterr().err


def test_merges_are_learned_from_training_documents_only(tmp_path: Path) -> None:
    # A word that occurs only in validation documents must not have become a token.
    texts = [f"{text} " + "zqxjk " * 200 for text in make_texts(40)]
    build(corpus_config(write_jsonl(tmp_path / "a.jsonl", texts)), out=tmp_path / "out", progress=False)
    held_out = MdsSplit(tmp_path / "out", "validation")
    numbers = {int(held_out.id(n).split(":")[1]) - 1 for n in range(len(held_out))}
    assert numbers
    texts = [text if n in numbers else text.replace("zqxjk", "of") for n, text in enumerate(texts)]
    # Dividing is by hash, so changed texts may change sides: only the validation ones were left as they were.
    cfg = corpus_config(write_jsonl(tmp_path / "b.jsonl", texts))
    build(cfg, out=tmp_path / "only", progress=False)
    training = MdsSplit(tmp_path / "only", "train")
    assert not numbers & {int(training.id(n).split(":")[1]) - 1 for n in range(len(training))}
    vocab = json.loads((tmp_path / "only" / "tokenizer.json").read_text())["model"]["vocab"]
    assert not any("zq" in token for token in vocab)


def test_a_given_tokenizer_is_stored_byte_for_byte(dataset: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    given.write_text(json.dumps(json.loads((dataset / "tokenizer.json").read_text()), indent=3))
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20, seed=5))
    cfg = corpus_config(path, tokenizer={"type": "file", "path": str(given)})
    build(cfg, out=tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == given.read_bytes()
    assert read_manifest(tmp_path / "out").vocab_size == read_manifest(dataset).vocab_size


@pytest.mark.parametrize(
    ("content", "eos", "says"),
    [
        (None, EOS_TOKEN, "tokenizer.path: {given} cannot be read"),
        ("{}", EOS_TOKEN, "{given}: not a tokenizer.json"),
        ("good", "</s>", "'</s>' is not in the vocabulary"),
        ("good", "a", "'a' is ordinary text for this tokenizer"),  # it would end documents that contain it
    ],
)
def test_a_bad_tokenizer_file_is_one_message(
    content: str | None, eos: str, says: str, dataset: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given.json"
    if content is not None:
        given.write_text((dataset / "tokenizer.json").read_text() if content == "good" else content)
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(5))
    cfg = corpus_config(path, tokenizer={"type": "file", "path": str(given), "eos_token": eos})
    with pytest.raises(DataError) as caught:
        build(cfg, out=tmp_path / "out", progress=False)
    assert says.replace("{given}", str(given)) in str(caught.value)
    assert not (tmp_path / "out").exists()
