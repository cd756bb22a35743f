"""Long texts are encoded in pieces with the ids of the whole, or whole if the tokenizer cannot be cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from headway.data import tokenizer as module
from headway.data.tokenizer import CorpusTokenizer

WORDS = ["plain", "straße", "日本語", "e\u0301", "don't", "was", "x=1;", "\n", "  ", "Playing", ".", "12"]


def text_of(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def trained(model: Any, pre_tokenizer: Any, trainer: Any, normalizer: Any = None) -> Any:
    tokenizer: Any = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([text_of(0, 300)], trainer)
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def bpe(pre_tokenizer: Any, normalizer: Any = None) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    return trained(models.BPE(), pre_tokenizer, trainer, normalizer)


def byte_level() -> Any:
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())


def word_piece() -> Any:
    trainer: Any = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    return trained(model, pre_tokenizers.BertPreTokenizer(), trainer, normalizers.BertNormalizer())


def metaspace() -> Any:
    trainer: Any = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"])
    return trained(models.Unigram(), pre_tokenizers.Metaspace(), trainer)


def prefix_space() -> Any:
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))


def none() -> Any:
    return bpe(None)


def whole_metaspace() -> Any:
    return bpe(pre_tokenizers.Metaspace(split=False))


def by_position() -> Any:
    return bpe(pre_tokenizers.Split(Regex(".{1,5}"), "isolated"))


def hidden_space() -> Any:
    first = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return bpe(pre_tokenizers.Sequence([first, pre_tokenizers.Whitespace()]))


def in_sequence() -> Any:
    first = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), first]), normalizers.Sequence([normalizers.NFC()]))


def stripped() -> Any:
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Strip())


def added() -> Any:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("plain was", normalized=False)])
    return tokenizer


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 200)


@pytest.mark.parametrize(
    ("make", "cut"),
    [
        (byte_level, True),
        (word_piece, True),
        (metaspace, True),
        (prefix_space, True),
        (in_sequence, True),
        (none, False),
        (hidden_space, False),
        (whole_metaspace, False),
        (by_position, False),
        (stripped, False),
        (added, False),
    ],
)
def test_ids_of_a_long_text_are_those_of_the_whole(
    make: Callable[[], Any], cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make()
    texts = ["short", text_of(1, 3000), "", text_of(2, 3000)]
    expected = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    ours = CorpusTokenizer(tokenizer, eos_token="</s>")
    longest = 0
    plain = ours._encoded_whole

    def watched(texts: list[str]) -> list[list[int]]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return plain(texts)

    monkeypatch.setattr(ours, "_encoded_whole", watched)
    assert [list(ids) for ids in ours.encode(texts)] == expected
    assert longest <= 1000 if cut else longest == max(map(len, texts))


def test_a_text_without_a_place_to_cut_is_encoded_whole() -> None:
    text = "日本語" * 500
    tokenizer = byte_level()
    expected = tokenizer.encode(text).ids
    assert [list(ids) for ids in CorpusTokenizer(tokenizer, eos_token="</s>").encode([text])] == [expected]


def with_decoder(make: Callable[[], Any], decoder: Any) -> Any:
    tokenizer = make()
    tokenizer.decoder = decoder
    return tokenizer


@pytest.mark.parametrize(
    ("make", "decoder", "exact"),
    [
        (byte_level, decoders.ByteLevel(), True),
        (in_sequence, decoders.ByteLevel(), True),
        (prefix_space, decoders.ByteLevel(), False),
        (metaspace, decoders.Metaspace(), False),
        (word_piece, decoders.WordPiece(), False),
        (byte_level, None, False),
    ],
)
def test_the_loss_of_a_long_text_is_that_of_decoding_it_at_once(
    make: Callable[[], Any], decoder: Any, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_DECODED", 50)
    tokenizer = with_decoder(make, decoder)
    texts = [text_of(seed, words).replace("e\u0301", "é") for seed, words in ((1, 3000), (2, 5), (3, 2000))]
    ours = CorpusTokenizer(tokenizer, eos_token="</s>")
    encoded = ours.encode(texts)
    whole = tokenizer.decode_batch([list(ids) for ids in encoded], skip_special_tokens=False)
    expected = [(n, back) for n, (text, back) in enumerate(zip(texts, whole, strict=True)) if text != back]
    batches: list[int] = []

    class Watched:
        def decode(self, ids: list[int], **options: Any) -> str:
            return tokenizer.decode(ids, **options)

        def decode_batch(self, lists: list[list[int]], **options: Any) -> list[str]:
            batches.extend(map(len, lists))
            return tokenizer.decode_batch(lists, **options)

    monkeypatch.setattr(ours, "_tokenizer", Watched())
    assert ours.lost(texts, encoded) == expected and (not expected) is exact
    assert max(batches) <= 50 if exact else max(batches) > 1000  # a loss is looked up in the whole text
