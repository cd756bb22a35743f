"""Decoding of token ids that arrive one by one: the same text as of all together, and bounded work per id."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from headway.data.tokenizer import StreamDecoder

WORDS = ["plain", "straße", "日本語", "😀", "naïve", "e\u0301", "don't", "was", "playing", "played", "x=1;", "\n", "  "]


def text_of(seed: int, words: int = 400) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)).strip()


def byte_level() -> Any:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text_of(0)], trainer)
    return tokenizer


def word_piece() -> Any:
    tokenizer: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer: Any = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([text_of(0)], trainer)
    return tokenizer


def metaspace() -> Any:
    tokenizer: Any = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer: Any = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"])
    tokenizer.train_from_iterator([text_of(0)], trainer)
    return tokenizer


def llama() -> Any:
    """Bytes for unknown characters, and a decoder that strips the space before the first token."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocab |= {c: 257 + i for i, c in enumerate("▁abcdefghijklmnopqrstuvwxyz")}
    tokenizer: Any = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


class Counted:
    """A decode function that remembers the most ids it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.most = tokenizer, 0

    def __call__(self, ids: list[int]) -> str:
        self.most = max(self.most, len(ids))
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("make", [byte_level, word_piece, metaspace, llama])
def test_ids_one_by_one_give_the_text_of_all_ids(make: Callable[[], Any]) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text_of(1)).ids
    decode = Counted(tokenizer)
    stream = StreamDecoder(decode)
    parts = [stream.put([token]) for token in ids]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) + stream.close() == tokenizer.decode(ids, skip_special_tokens=False)
    assert len(ids) > 500
    assert decode.most <= 150  # a cut within a character is put off


@pytest.mark.parametrize("make", [byte_level, metaspace, llama])
def test_a_prompt_may_end_within_a_character(make: Callable[[], Any]) -> None:
    tokenizer = make()
    ids = tokenizer.encode("ab 😀 日本").ids
    for cut in range(len(ids) + 1):
        decode = Counted(tokenizer)
        stream = StreamDecoder(decode)
        assert stream.put(ids[:cut]) + stream.put(ids[cut:]) + stream.close() == decode(ids)


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = byte_level()
    letters = pre_tokenizers.ByteLevel(False).pre_tokenize_str("日")[0][0]  # one for each byte
    ids = [tokenizer.token_to_id(letter) for letter in letters]
    stream = StreamDecoder(Counted(tokenizer))
    assert [stream.put([token]) for token in ids] == ["", "", "日"]


def test_bytes_that_never_become_a_character_are_shown_and_forgotten() -> None:
    """As an untrained model writes them: random tokens of a byte-level vocabulary."""
    tokenizer = byte_level()
    ids = random.Random(3).choices(range(tokenizer.get_vocab_size()), k=3000)
    decode = Counted(tokenizer)
    stream = StreamDecoder(decode)
    text = "".join([stream.put([token]) for token in ids]) + stream.close()
    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    assert decode.most <= 80  # a cut waits for the end of a character


def test_a_decoding_that_needs_all_ids_gets_all_ids() -> None:
    """Here the text of a token is its place, so no cut gives the same end."""
    stream = StreamDecoder(lambda ids: "".join(f"{i:07d}" for i in range(len(ids))))
    text = "".join(stream.put([0]) for _ in range(300)) + stream.close()
    assert text == "".join(f"{i:07d}" for i in range(300))
