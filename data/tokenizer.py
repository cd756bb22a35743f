"""Tokenizers: byte-level BPE trained on a corpus, or an existing tokenizer.json. No code is loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from headway.data.config import MAX_VOCABULARY, DataError
from headway.data.corpus.config import TokenizerFile, TrainTokenizer
from headway.data.corpus.containers import check_pointer
from headway.data.places import looked_for
from headway.data.progress import Bar, Shown, progress_of

EOS_TOKEN = "<|endoftext|>"
_MAX_FILE_BYTES = 256 << 20
_MAX_ADDED = 256  # characters of an added token; the library takes a time that grows with the square of its length
_PIECE = 128 << 10  # characters; encoding needs about 125 bytes of memory per byte of text
_PIECES = 8  # that are encoded together, on all cores
_DECODED = 64 << 10  # ids that are decoded together
_BESIDE = 256  # characters on both sides of a cut whose ids are compared
_TRIES = 16  # places that are compared before the rest is encoded whole
_CUT = re.compile(r"[A-Za-z] (?=[A-Za-z])")
"""Cuts are made before a single space between two ASCII letters (after the first character of a match)."""


class CorpusTokenizer:
    """Converts text to token ids. Special tokens in a text are encoded as ordinary text.

    name: What messages call the tokenizer, such as its file.
    exact: Whether every text decodes to itself by construction.

    Raises DataError if `eos_token` is not in the vocabulary, or is ordinary text and no special token.
    """

    def __init__(self, tokenizer: Any, *, eos_token: str, name: str = "tokenizer", exact: bool = False) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special and token.content != eos_token]
        choice = ", ".join(map(repr, special[:20])) or "none"
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise DataError(
                f"tokenizer.eos_token: {eos_token!r} is not in the vocabulary; set eos_token to the token that ends a "
                f"document (special tokens: {choice})"
            )
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._eos_token, self.name, self.exact = tokenizer, eos_token, name, exact
        self._cuts: bool | None = None  # whether long texts can be cut; not known yet
        self.eos_id: int = eos_id
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        # Some models (Unigram, WordLevel) have special tokens as pieces of text. Then `check_ends` must be called.
        is_special = any(token.special and token.content == eos_token for token in added)
        if not exact and not is_special and eos_id in self.encode([eos_token])[0]:
            raise DataError(
                f"tokenizer.eos_token: {eos_token!r} is ordinary text for this tokenizer, so it would end documents "
                f"that contain it; set eos_token to a special token (others here: {choice})"
            )

    def encode(self, texts: Sequence[str], names: Sequence[str] | None = None) -> list[Sequence[int]]:
        """Token ids of each text, without special tokens. Runs on all cores.

        Raises DataError if the tokenizer fails; the message has the text's name from `names`, or its beginning.
        """
        with contextlib.suppress(_Failed):
            return self._encoded(texts)
        for number, text in enumerate(texts):
            try:
                self._encoded([text])
            except _Failed as error:
                what = f"the text {text[:40]!r}" if names is None else names[number]
                raise DataError(f"{self.name}: cannot encode {what}: {error}") from None
        raise DataError(f"{self.name}: cannot encode these {len(texts)} texts together; use another tokenizer")

    def _encoded(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Long texts in pieces, whose ids together are those of the whole, if the tokenizer can be cut."""
        if self._cuts is None and any(len(text) > _PIECE for text in texts):
            self._cuts = _can_be_cut(self._tokenizer)
        if not self._cuts:
            return [*self._encoded_whole(texts)]
        whole = iter(self._encoded_whole([text for text in texts if len(text) <= _PIECE]))
        return [next(whole) if len(text) <= _PIECE else self._encoded_in_pieces(text) for text in texts]

    def _encoded_in_pieces(self, text: str) -> array[int]:
        ids = array("I")  # 4 bytes per id, a list has 36
        begin = 0
        while begin < len(text):
            pieces = []
            while begin < len(text) and len(pieces) < _PIECES:
                end = self._cut(text, begin + _PIECE)
                pieces.append(text[begin:end])
                begin = end
            for part in self._encoded_whole(pieces):
                ids.extend(part)
        return ids

    def _cut(self, text: str, begin: int) -> int:
        """The first place from `begin` on where both sides give the ids of the joined text, or the end."""
        for _ in range(_TRIES):
            place = _CUT.search(text, begin)
            if place is None:
                break
            at = place.start() + 1
            left, right = text[at - _BESIDE : at], text[at : at + _BESIDE]
            one, other, joined = self._encoded_whole([left, right, left + right])
            if one + other == joined:
                return at
            begin = at + _BESIDE
        return len(text)

    def _encoded_whole(self, texts: Sequence[str]) -> list[list[int]]:
        with _one_error(), contextlib.nullcontext() if self.exact else _without_panic_messages():
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        try:
            with _one_error():
                return self._tokenizer.decode(list(ids), skip_special_tokens=False)
        except _Failed as error:
            raise DataError(f"{self.name}: cannot decode token ids: {error}") from None

    def lost(self, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> list[tuple[int, str]]:
        """Number and decoded text of each text that its token ids do not give back. Runs on all cores."""
        if self.exact:
            return []
        try:
            with _one_error(), _without_panic_messages():
                numbers = [n for n, ids in enumerate(encoded) if not self._gives_back(texts[n], ids)]
                lists = [list(encoded[n]) for n in numbers]
                decoded = self._tokenizer.decode_batch(lists, skip_special_tokens=False)
        except _Failed as error:
            raise DataError(f"{self.name}: cannot decode token ids: {error}") from None
        return [(n, back) for n, back in zip(numbers, decoded, strict=True) if texts[n] != back]

    def _gives_back(self, text: str, ids: Sequence[int]) -> bool:
        """Whether a long text comes back when its ids are decoded in parts. False if that is not tried.

        Decoding a million ids at once takes 70 MB.
        """
        if len(ids) <= _DECODED:
            return False
        stream = StreamDecoder(lambda part: self._tokenizer.decode(part, skip_special_tokens=False))
        at = 0
        for begin in range(0, len(ids), _DECODED):
            part = stream.put(ids[begin : begin + _DECODED])
            if not text.startswith(part, at):
                return False
            at += len(part)
        return text[at:] == stream.close()

    def vocabulary(self) -> dict[str, int]:
        """Id of every token, added ones too."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def added_tokens(self) -> list[str]:
        """The text of every added token, special or not, by id."""
        return [token.content for _, token in sorted(self._tokenizer.get_added_tokens_decoder().items())]

    def id_of(self, token: str) -> int | None:
        """Id of a token, or None."""
        return self._tokenizer.token_to_id(token)

    @property
    def model_size(self) -> int:
        """Number of tokens without added ones."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def check_ends(self, ids: Sequence[int], origin: str) -> None:
        """Raise DataError if the ids of a text contain the end-of-document token."""
        if not self.exact and self.eos_id in ids:
            unknown = getattr(self._tokenizer.model, "unk_token", None) == self._eos_token
            raise DataError(
                f"{origin}: its text contains the end-of-document token {self._eos_token!r}"
                + (", which is also the token for unknown text" if unknown else " as ordinary text")
                + "; set tokenizer.eos_token to a special token that no text gives, remove it from the text, or use "
                "another tokenizer"
            )


_WORDS = {"ByteLevel", "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Metaspace"}
"""Pre-tokenizers that divide every text between a letter and a space that a letter follows."""
_BESIDES = _WORDS | {"Digits", "Punctuation", "UnicodeScripts"}
"""Those that look at single characters, or at a word: they may precede or follow."""
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Nmt"}
"""Normalizers that change neither an ASCII letter and a space nor anything across them."""


def _can_be_cut(tokenizer: Any) -> bool:
    """Whether the tokenizer divides every text between a letter and a space before a letter, whatever is around.

    Other steps (regular expressions of a file, stripping, added tokens of several words) are not known to do so: then
    a text is encoded whole.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    if any((token.lstrip or token.rstrip or " " in token.content) and not token.special for token in added):
        return False
    normalizers, steps = _steps(tokenizer.normalizer), _steps(tokenizer.pre_tokenizer)
    words = next((step for step in steps if step["type"] in _WORDS), None)
    return (
        all(step["type"] in _NORMALIZERS for step in normalizers)
        and all(step["type"] in _BESIDES for step in steps)
        # One that only replaces the space, as ByteLevel without its expression, hides it from those behind it.
        and words is not None
        and words.get("use_regex", True)
        and words.get("split", True)
    )


def _steps(part: Any) -> list[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, or of the members of a sequence."""
    return [] if part is None else _members(json.loads(part.__getstate__()))


def _members(content: dict[str, Any]) -> list[dict[str, Any]]:
    if content["type"] != "Sequence":
        return [content]
    inner = content["normalizers"] if "normalizers" in content else content["pretokenizers"]
    return [step for member in inner for step in _members(member)]


class StreamDecoder:
    """Decodes token ids that arrive one by one, in a time per token that does not grow with their number.

    `decode` is called on the last ids only. A cut is made there if the rest decodes to the end of the same text, its
    first half apart, which may depend on the ids before it. All text given out together is `decode` of all ids, if
    more ids only append to the text of the earlier ones or complete its last character.
    """

    _KEPT = 32
    _BYTES = 3  # at most, of a character that lacks some: each is decoded as U+FFFD, or several together

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last ones
        self._given = 0  # characters of the text of `_ids` that were given out
        self._incomplete = 0  # calls in a row after which the text ended with U+FFFD
        self._limit = 2 * self._KEPT

    def put(self, ids: Sequence[int]) -> str:
        """The text that these ids complete. A last character that may still change is held back."""
        self._ids += ids
        text = self._decode(self._ids)
        self._incomplete = self._incomplete + 1 if text.endswith("\ufffd") else 0
        # Byte fallback decodes a run of bytes as U+FFFD throughout until its last character is complete. If that does
        # not come within 3 ids, the run is no text, and only its end may change.
        hold = len(text) if self._incomplete <= self._BYTES else self._BYTES
        end = len(text)
        while end > max(self._given, len(text) - hold) and text[end - 1] == "\ufffd":
            end -= 1
        given = text[self._given : end]
        self._given = max(self._given, end)
        if len(self._ids) > self._limit and not 0 < self._incomplete <= self._BYTES:
            self._shorten(text)
        return given

    def close(self) -> str:
        """The text that was held back."""
        text = self._decode(self._ids)[self._given :]
        self._given += len(text)
        return text

    def _shorten(self, text: str) -> None:
        """Forget all but the last ids, unless the text of these differs from the end of `text`."""
        ids = self._ids[-self._KEPT :]
        rest = self._decode(ids)
        half = rest[len(rest) // 2 :]
        held = max(0, len(text) - self._given)
        if len(half) > self._BYTES and held < len(half) and text.endswith(half):
            self._ids, self._given, self._limit = ids, len(rest) - held, 2 * self._KEPT
        else:
            self._limit = 2 * len(self._ids)


class _Failed(Exception):
    """The tokenizers library failed; the message says what to do."""


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Turn errors of the library into `_Failed`. Panics of its Rust code are BaseExceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise _Failed(_advice(error)) from None


@contextlib.contextmanager
def _without_panic_messages() -> Iterator[None]:
    """Hold back what Rust prints to file descriptor 2, and drop it if a panic follows: the error has its message."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.truncate(0)
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)
            held.seek(0)
            if other := held.read():
                os.write(2, other)


def _advice(error: BaseException) -> str:
    """What went wrong in the library, and what to do."""
    text = str(error)
    low = text.lower()
    if "regex" in low or "onig" in low or "backtrack" in low:
        return (
            f"a regular expression of its tokenizer.json needs too many steps for this text ({text}); write the "
            "expression without nested repetition, use another tokenizer, or remove the text"
        )
    if "unk" in low:
        return (
            f"it has characters or words that the vocabulary does not have, and no unknown token ({text}); add the "
            "unknown token to model.vocab and name it in model.unk_token (Unigram: model.unk_id), use a byte-level "
            "tokenizer, or tokenizer.type: train_bpe"
        )
    return f"the tokenizers library failed ({type(error).__name__}: {text}); use another tokenizer.json"


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
    return CorpusTokenizer(tokenizer, eos_token=EOS_TOKEN, exact=True)


def _counted(texts: Iterable[str], bar: Bar) -> Iterator[str]:
    for text in texts:
        yield text
        bar.update(len(text))


def read_file(cfg: TokenizerFile) -> bytes:
    """Contents of the tokenizer.json of `cfg`. Raises DataError if it cannot be read."""
    path = Path(cfg.path).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer.path: {path} cannot be read ({error.strerror}{looked_for(path)}); "
            "give a tokenizer.json, or use type: train_bpe"
        ) from error
    check_pointer(path, data)
    return data


def take_file(cfg: TokenizerFile, *, out: Path) -> CorpusTokenizer:
    """Copy the tokenizer.json of `cfg` to `out` and load it.

    Raises DataError if it cannot be used for a dataset: its ids are random (dropout) or contradict the file.
    """
    path = Path(cfg.path).expanduser()
    data = read_file(cfg)
    loaded = load(path, eos_token=cfg.eos_token)
    _check_content(path, data, loaded)
    out.write_bytes(data)
    return loaded


def _check_content(path: Path, data: bytes, loaded: CorpusTokenizer) -> None:
    content = json.loads(data)
    if dropout := (content.get("model") or {}).get("dropout"):
        raise DataError(
            f"{path}: model.dropout is {dropout}: the tokens of a text would be drawn at random, and every build would "
            'give another dataset. Set "dropout": null in a copy of the file (its vocabulary and merges stay as they '
            "are) and name the copy in tokenizer.path"
        )
    for token in content.get("added_tokens") or []:
        declared, actual = token.get("id"), loaded.id_of(token.get("content", ""))
        if declared != actual:
            size = loaded.model_size
            holder = next((other for other, number in loaded.vocabulary().items() if number == declared), None)
            taken = "" if holder is None else f", which {holder!r} has"
            raise DataError(
                f"{path}: added_tokens says that {token.get('content')!r} has the id {declared}{taken}, but the "
                f"tokenizers library gives it the id {actual}: added tokens must have the ids that follow the {size:,} "
                f"of model.vocab ({size}, {size + 1}, ...) in the order of the file, without gaps, unless they are in "
                "model.vocab. Number them so, and check that a model that was trained with this file agrees"
            )
    if loaded.vocab_size > MAX_VOCABULARY:
        token, number = max(loaded.vocabulary().items(), key=lambda entry: entry[1])
        raise DataError(
            f"{path}: {token!r:.60} has the id {number:,}; ids must be below {MAX_VOCABULARY:,}, because the embedding "
            "has a row for each. Give the tokens consecutive ids"
        )
    holders: dict[int, str] = {}
    for token, number in sorted(loaded.vocabulary().items()):
        if (other := holders.setdefault(number, token)) != token:
            raise DataError(f"{path}: {other!r} and {token!r} both have the id {number}; give every token its own id")


def load(path: Path, *, eos_token: str = EOS_TOKEN) -> CorpusTokenizer:
    """Load a tokenizer.json (Hugging Face tokenizers format)."""
    return CorpusTokenizer(open_file(path), eos_token=eos_token, name=str(path))


def open_file(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json. Raises DataError if it is none, or would take minutes to open."""
    from tokenizers import Tokenizer

    if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
        raise DataError(f"{path}: missing, or larger than {_MAX_FILE_BYTES >> 20} MiB; give a tokenizer.json")
    try:
        data = path.read_bytes()
        _check_added_lengths(path, data)
        with _without_panic_messages():
            return Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit, DataError):
        raise
    except BaseException as error:  # the library raises Exception; panics of its Rust code are BaseExceptions
        raise DataError(
            f"{path}: not a tokenizer.json of Hugging Face tokenizers ({error}); give a valid one"
        ) from None


def _check_added_lengths(path: Path, data: bytes) -> None:
    content = json.loads(data)
    added = content.get("added_tokens") if isinstance(content, dict) else None
    for token in added if isinstance(added, list) else []:
        text = token.get("content") if isinstance(token, dict) else None
        if isinstance(text, str) and len(text) > _MAX_ADDED:
            raise DataError(
                f"{path}: added_tokens has a token of {len(text):,} characters ({text[:20]!r}...); the limit is "
                f"{_MAX_ADDED}. Remove it, or give another tokenizer.json"
            )


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
