"""Tokenizers: byte-level BPE trained on a corpus, or an existing tokenizer.json. No code is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from headway.data.config import DataError, TokenizerFile, TrainTokenizer
from headway.data.places import looked_for
from headway.data.progress import Bar, Shown, progress_of

EOS_TOKEN = "<|endoftext|>"
_MAX_FILE_BYTES = 256 << 20


class CorpusTokenizer:
    """Converts text to token ids. Special tokens in a text are encoded as ordinary text, so they cannot end it."""

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
                f"tokenizer.eos_token: {eos_token!r} is ordinary text for this tokenizer, so it would end documents "
                f"that contain it; set eos_token to a special token (available: {special})"
            )
        self._tokenizer = tokenizer
        self.eos_id: int = eos_id
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens. Runs on all cores."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def train(cfg: TrainTokenizer, texts: Iterable[str], *, out: Path, progress: Shown = False) -> CorpusTokenizer:
    """Train byte-level BPE on `texts` and write it to `out`. Equal texts in equal order give an equal file.

    The vocabulary contains every byte, so every text can be encoded; `<|endoftext|>` has id 0. With a small corpus, the
    vocabulary may be smaller than `vocab_size`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with progress_of(progress)("train tokenizer", unit="characters") as bar:
        tokenizer.train_from_iterator(_counted(texts, bar), trainer)
    tokenizer.save(str(out), pretty=False)
    return CorpusTokenizer(tokenizer, eos_token=EOS_TOKEN)


def _counted(texts: Iterable[str], bar: Bar) -> Iterator[str]:
    for text in texts:
        yield text
        bar.update(len(text))


def read_file(cfg: TokenizerFile) -> bytes:
    """Contents of the tokenizer.json of `cfg`. Raises DataError if it cannot be read."""
    path = Path(cfg.path).expanduser()
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer.path: {path} cannot be read ({error.strerror}{looked_for(path)}); "
            "give a tokenizer.json, or use type: train_bpe"
        ) from error


def take_file(cfg: TokenizerFile, *, out: Path) -> CorpusTokenizer:
    """Copy the tokenizer.json of `cfg` to `out` and load it."""
    path = Path(cfg.path).expanduser()
    data = read_file(cfg)
    load(path, eos_token=cfg.eos_token)  # so that error messages name the user's file
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
    except BaseException as error:  # the library raises Exception; panics of its Rust code are BaseExceptions
        raise DataError(
            f"{path}: not a tokenizer.json of Hugging Face tokenizers ({error}); give a valid one"
        ) from None
    return CorpusTokenizer(tokenizer, eos_token=eos_token)


def sha256_of(path: Path) -> str:
    """sha256 of a tokenizer file, which identifies the tokenizer."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def vocab_size_of(path: Path) -> int:
    """Highest token id plus one, read from the JSON without building a tokenizer.

    Raises DataError if the file is not a tokenizer.json with a vocabulary.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"larger than {_MAX_FILE_BYTES >> 20} MiB")
        content = json.loads(path.read_bytes())
        vocab = content["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids += [token["id"] for token in content.get("added_tokens") or []]
        if not all(type(number) is int and 0 <= number < 1 << 32 for number in ids):
            raise ValueError("a token id that is not an integer below 2**32")
        return max(ids) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: not a tokenizer.json with a vocabulary ({type(error).__name__}: {error}); give a valid one"
        ) from None
