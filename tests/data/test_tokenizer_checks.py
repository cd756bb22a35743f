"""A tokenizer.json that crashes, loses text, draws its tokens or contradicts itself is one message at the build."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_corpora import corpus_config, make_texts, write_jsonl
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from headway.data.build import build
from headway.data.config import DataError
from headway.data.manifest import SPLITS, Manifest, read_manifest
from headway.data.mds import MdsSplit
from headway.data.tokenizer import EOS_TOKEN, load
from headway.data.verify import MdsSource, verify

TEXTS = make_texts(12)


def byte_level(**model: Any) -> Any:
    tokenizer: Any = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def words(*more: str, unk: str = "[UNK]", eos: str = EOS_TOKEN, known: list[str] = TEXTS, model: Any = None) -> Any:
    vocab = {word: n for n, word in enumerate(dict.fromkeys([*more, *" ".join(known).split(), eos]))}
    tokenizer: Any = Tokenizer((model or models.WordLevel)(vocab=vocab, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([eos])
    return tokenizer


def characters(*, unk_id: int | None, eos: str = "</s>", known: str = "") -> Any:
    """Unigram as in T5: the end token is a piece."""
    pieces = [(eos, 0.0), ("<unk>", -9.0), *((c, -3.0) for c in sorted(set("".join([*TEXTS, known]))))]
    tokenizer: Any = Tokenizer(models.Unigram(pieces, unk_id=unk_id, byte_fallback=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([eos, "<unk>"])
    return tokenizer


def with_dropout(value: float) -> Any:
    tokenizer = byte_level()
    tokenizer.model.dropout = value
    return tokenizer


def build_with(
    tokenizer: Any,
    tmp_path: Path,
    texts: list[str] = TEXTS,
    change: Callable[[Any], None] = lambda _: None,
    **settings: Any,
) -> Manifest:
    content = json.loads(tokenizer.to_str())
    change(content)
    given = tmp_path / "tok.json"
    given.write_text(json.dumps(content))
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    cfg = corpus_config(path, tokenizer={"type": "file", "path": str(given), **settings})
    return build(cfg, out=tmp_path / "out", progress=False)


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(DataError) as caught:
        build_with(*args, **kwargs)
    return str(caught.value)


def test_an_exact_tokenizer_is_accepted_without_a_word_about_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = build_with(byte_level(), tmp_path, [*TEXTS, f"\x00\r\n 漢字 🙂 {EOS_TOKEN} "])
    assert manifest.lossy is None and manifest.validation_bytes_per_token is not None
    assert "WARNING" not in capsys.readouterr().err


# ---------------------------------------------------------------- loss


def lower_case() -> Any:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def without_whitespace() -> Any:
    tokenizer = byte_level()
    split = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    return tokenizer


def prefix_space() -> Any:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def without_unknown() -> Any:
    """BPE that drops characters that it does not know."""
    tokenizer: Any = Tokenizer(models.BPE())
    trainer: Any = trainers.BpeTrainer(vocab_size=60, special_tokens=[EOS_TOKEN], show_progress=False)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def without_decoder() -> Any:
    tokenizer = byte_level()
    tokenizer.decoder = None
    return tokenizer


LOSSY = {
    "lower case": (lower_case, "Ab", "'Ab' comes back as 'ab'"),
    "whitespace": (without_whitespace, "a b\nc", "'a b\\nc' comes back as 'abc'"),
    "dropped characters": (without_unknown, "a漢a", "'a漢a' comes back as 'aa'"),
    "no decoder": (without_decoder, "é", "'é' comes back as 'Ã ©'"),
    "unknown words": (lambda: words("[UNK]"), "unheard", "'unheard' comes back as '[UNK]'"),
}


@pytest.mark.parametrize("kind", list(LOSSY))
def test_a_tokenizer_that_loses_text_is_refused_with_an_example_or_recorded(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, text, example = LOSSY[kind]
    texts = [text, "the"]
    says = refused(make(), tmp_path, texts)
    assert "loses text: the tokens of" in says and "tokenizer.lossy: allow accepts it and records it" in says
    assert not (tmp_path / "out").exists()
    manifest = build_with(make(), tmp_path, texts, lossy="allow")
    assert manifest.lossy is not None and 1 <= manifest.lossy.documents <= 2
    assert manifest.validation_bytes_per_token is None
    assert "WARNING: the tokenizer loses text" in capsys.readouterr().err
    assert example in says or "'the' comes back" in says  # the first in the order of hashes
    info = verify(MdsSource(type="mds", path=str(tmp_path / "out")))
    assert info.lossy_documents == manifest.lossy.documents and read_manifest(tmp_path / "out") == manifest


def prepended_space() -> Any:
    """As SentencePiece without the last step of its decoder."""
    tokenizer: Any = Tokenizer(
        models.BPE({c: n for n, c in enumerate([EOS_TOKEN, *sorted({*"".join(TEXTS), "▁"})])}, [])
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


@pytest.mark.parametrize("make", [prefix_space, prepended_space])
def test_a_space_before_the_text_is_no_loss_and_is_named(
    make: Callable[[], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = build_with(make(), tmp_path, TEXTS)
    assert manifest.lossy is None
    counts = manifest.validation
    assert manifest.validation_bytes_per_token == counts.text_bytes / counts.tokens
    assert f"puts a space before the text (add_prefix_space) of {len(TEXTS)} of {len(TEXTS)} documents" in (
        capsys.readouterr().err
    )
    library, backs = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")), []
    for split in SPLITS:
        shards = MdsSplit(tmp_path / "out", split)
        backs += [library.decode(shards.tokens(n).tolist()[:-1]) for n in range(len(shards))]
    assert sorted(backs) == sorted(f" {text}" for text in TEXTS)


def test_a_space_and_a_loss_are_a_loss(tmp_path: Path) -> None:
    tokenizer = prefix_space()
    tokenizer.normalizer = normalizers.Lowercase()
    assert "loses text: the tokens of 1 of the first" in refused(tokenizer, tmp_path, ["the", "The heat"])


def test_one_lossy_document_among_many_is_found(tmp_path: Path) -> None:
    texts = [text.lower() for text in make_texts(300)]
    texts[217] = "One capital letter"
    says = refused(lower_case(), tmp_path, texts)
    assert "the tokens of 1 of the first" in says
    assert "a.jsonl:218: 'One capital letter' comes back as 'one capital letter'" in says


# ---------------------------------------------------------------- crashes


def backtracking() -> Any:
    tokenizer = byte_level()
    split = pre_tokenizers.Split(Regex(r"(x+x+)+y"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: words(unk="[UNK]"), "add the unknown token to model.vocab"),
        (lambda: words(unk="[UNK]", model=models.WordPiece), "add the unknown token to model.vocab"),
        (lambda: characters(unk_id=None, eos=EOS_TOKEN), "model.unk_id"),
        (backtracking, "a regular expression of its tokenizer.json needs too many steps"),
    ],
)
def test_a_tokenizer_that_crashes_is_one_message_with_the_document_and_the_remedy(
    make: Callable[[], Any], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = [*TEXTS, "unheard 漢 " + "x" * 40]
    message = refused(make(), tmp_path, texts, lossy="allow")
    assert says in message and "a.jsonl:13" in message and message.startswith(str(tmp_path / "tok.json"))
    assert "panicked" not in capfd.readouterr().err


def test_a_crash_while_a_prompt_is_encoded_is_one_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # as `headway generate` does
    backtracking().save(str(tmp_path / "t.json"))
    tokenizer = load(tmp_path / "t.json")
    assert tokenizer.decode(tokenizer.encode(["the heat"])[0]) == "the heat"
    with pytest.raises(DataError, match=r"t\.json: cannot encode the text 'xxx.*too many steps"):
        tokenizer.encode(["the heat", "x" * 40])
    captured = capfd.readouterr()
    assert "panicked" not in captured.err + captured.out


# ---------------------------------------------------------------- contradictions


def test_dropout_is_refused_because_every_build_would_differ(tmp_path: Path) -> None:
    says = refused(with_dropout(0.1), tmp_path)
    assert "model.dropout is 0.1" in says and 'Set "dropout": null in a copy' in says
    assert build_with(with_dropout(0.0), tmp_path).lossy is None


def gap(content: Any) -> None:
    content["added_tokens"][-1]["id"] = 5000


def taken(content: Any) -> None:
    content["added_tokens"][-1]["id"] = 7


@pytest.mark.parametrize("change", [gap, taken])
def test_added_tokens_whose_ids_the_library_changes_are_refused(change: Callable[[Any], None], tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|pad|>"])
    assert build_with(tokenizer, tmp_path).vocab_size == 281
    says = refused(tokenizer, tmp_path, change=change)
    declared = 5000 if change is gap else 7
    holder = "" if change is gap else f", which {tokenizer.id_to_token(7)!r} has"
    assert f"'<|pad|>' has the id {declared}{holder}, but the tokenizers library gives it the id 280" in says
    assert "(280, 281, ...)" in says


@pytest.mark.parametrize("number", [1 << 24, 1 << 31])
def test_an_id_too_large_for_an_embedding_is_refused_without_memory_for_it(number: int, tmp_path: Path) -> None:
    def far(content: Any) -> None:
        content["model"]["vocab"]["heat"] = number

    says = refused(words("[UNK]"), tmp_path, change=far)
    assert f"'heat' has the id {number:,}; ids must be below 16,777,216" in says


def test_an_added_token_of_absurd_length_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["y" * 256])
    assert build_with(tokenizer, tmp_path).lossy is None
    tokenizer.add_tokens(["z" * 257])
    says = refused(tokenizer, tmp_path)
    assert "added_tokens has a token of 257 characters ('zzzzzzzzzzzzzzzzzzzz'...); the limit is 256" in says


def test_two_tokens_of_one_id_are_refused(tmp_path: Path) -> None:
    def same(content: Any) -> None:
        content["model"]["vocab"]["heat"] = content["model"]["vocab"]["from"]

    says = refused(words("[UNK]"), tmp_path, change=same)
    assert "'from' and 'heat' both have the id" in says


def test_an_end_token_that_is_a_piece_is_accepted_unless_a_text_gives_it(tmp_path: Path) -> None:
    manifest = build_with(characters(unk_id=1), tmp_path, eos_token="</s>")
    assert (manifest.eos_id, manifest.lossy) == (0, None)
    says = refused(characters(unk_id=1), tmp_path, [*TEXTS, "the </s> of"], eos_token="</s>")
    assert "a.jsonl:13: its text contains the end-of-document token '</s>' as ordinary text" in says


def test_an_unknown_token_that_is_the_end_token_is_accepted_unless_a_word_is_unknown(tmp_path: Path) -> None:
    tokenizer = words(unk=EOS_TOKEN)
    one_word = ["the", "of", "and"]
    assert build_with(tokenizer, tmp_path, one_word).train.documents > 0
    says = refused(tokenizer, tmp_path, [*one_word, "unheard"], lossy="allow")
    assert "a.jsonl:4: its text contains the end-of-document token" in says
    assert "which is also the token for unknown text" in says


def test_advice_about_the_end_token_never_names_the_refused_one(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|pad|>"])
    says = refused(tokenizer, tmp_path, eos_token="a")
    assert "'a' is ordinary text" in says and "others here: '<|endoftext|>', '<|pad|>'" in says
    assert "special tokens: '<|endoftext|>', '<|pad|>'" in refused(tokenizer, tmp_path, eos_token="</s>")


def test_a_pointer_of_git_lfs_is_no_tokenizer(tmp_path: Path) -> None:
    given = tmp_path / "tok.json"
    given.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 1\n")
    cfg = corpus_config(write_jsonl(tmp_path / "a.jsonl", TEXTS), tokenizer={"type": "file", "path": str(given)})
    with pytest.raises(DataError, match=r"tok\.json: a pointer of Git LFS.*git lfs pull"):
        build(cfg, out=tmp_path / "out", progress=False)
