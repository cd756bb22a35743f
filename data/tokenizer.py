"""Tokenizers: byte-level BPE trained on a corpus, or a given tokenizer.json. Only data is read, never code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from headway.data.config import DataError, TokenizerFile, TrainTokenizer
from headway.data.places import looked_for

EOS_TOKEN = "<|endoftext|>"
_MAX_FILE_BYTES = 256 << 20


class CorpusTokenizer:
    """Text to token ids. Special tokens written out in a text are ordinary text: no document can end itself."""

    def __init__(self, tokenizer: Any, *, eos_token: str) -> None:
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise DataError(
                f"tokenizer.eos_token: {eos_token!r} is not in the vocabulary; "
                "set eos_token to the token that ends a document"
            )
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if eos_id in tokenizer.encode(eos_token, add_special_tokens=False).ids:
            added = tokenizer.get_added_tokens_decoder().values()
            special = ", ".join(repr(token.content) for token in list(added)[:20] if token.special) or "none"
            raise DataError(
                f"tokenizer.eos_token: {eos_token!r} is ordinary text of this tokenizer, so a document that holds it "
                f"would seem to end there; set eos_token to a special token (it has: {special})"
            )
        self._tokenizer = tokenizer
        self.eos_id: int = eos_id
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without any special token; the texts are shared out over the cores."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def train(cfg: TrainTokenizer, texts: Iterable[str], *, out: Path, progress: bool) -> CorpusTokenizer:
    """Learn byte-level BPE from `texts` and write it to `out`; the same texts in the same order give the same file.

    Every byte is in the vocabulary, so every text can be encoded; `<|endoftext|>` has id 0. A small corpus may offer
    fewer merges than asked for: the vocabulary is then smaller.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(out), pretty=False)
    return CorpusTokenizer(tokenizer, eos_token=EOS_TOKEN)


def read_file(cfg: TokenizerFile) -> bytes:
    """The given tokenizer.json. Raises DataError where it cannot be read."""
    path = Path(cfg.path).expanduser()
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer.path: {path} cannot be read ({error.strerror}{looked_for(path)}); "
            "give a tokenizer.json, or use type: train_bpe"
        ) from error


def take_file(cfg: TokenizerFile, *, out: Path) -> CorpusTokenizer:
    """Copy the given tokenizer.json to `out`, byte for byte, and load it."""
    path = Path(cfg.path).expanduser()
    data = read_file(cfg)
    load(path, eos_token=cfg.eos_token)  # a message about it names the file the user gave
    out.write_bytes(data)
    return load(out, eos_token=cfg.eos_token)


def load(path: Path, *, eos_token: str = EOS_TOKEN) -> CorpusTokenizer:
    """Load a tokenizer.json (Hugging Face tokenizers format)."""
    from tokenizers import Tokenizer

    if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
        raise DataError(f"{path}: missing, or larger than {_MAX_FILE_BYTES >> 20} MiB; give a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and panics of its Rust code are none
        raise DataError(f"{path}: not a tokenizer.json of Hugging Face tokenizers ({error})") from None
    return CorpusTokenizer(tokenizer, eos_token=eos_token)


def sha256_of(path: Path) -> str:
    """The hash that names a tokenizer: sha256 of its file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def vocab_size_of(path: Path) -> int:
    """Highest token id plus one, read from the JSON alone (no tokenizer is built).

    Raises DataError when the file is not a tokenizer.json with a vocabulary.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"larger than {_MAX_FILE_BYTES >> 20} MiB")
        content = json.loads(path.read_bytes())
        vocab = content["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids += [token["id"] for token in content.get("added_tokens") or []]
        if not all(type(number) is int and 0 <= number < 1 << 32 for number in ids):
            raise ValueError("an id that is no number of a token")
        return max(ids) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not a tokenizer.json with a vocabulary ({type(error).__name__}: {error})") from None
