"""Mutated tokenizer.json files end in datasets whose documents decode to their text, or in one of our errors."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_corpora import corpus_config, write_jsonl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from headway.data.build import build
from headway.data.config import DataError, MdsSource
from headway.data.manifest import SPLITS, read_manifest
from headway.data.mds import MdsSplit
from headway.data.tokenizer import EOS_TOKEN, load
from headway.data.verify import verify

INPUTS = 60  # of each kind
WORDS = ["the", "of", "heat", "Word", "x", "e", "ÜNÏ", "漢字", "🙂", "</s>", "[UNK]", "7"]
TEXTS = [*WORDS, " A  line\n\twith\r\nspaces ", "the heat of the heat e\u0301, 7.", "x" * 40, "the " * 30]

# ------------------------------------------------------------------ valid files


def byte_level() -> Any:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["the heat"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS_TOKEN} $A", special_tokens=[(EOS_TOKEN, tokenizer.token_to_id(EOS_TOKEN))]
    )
    return tokenizer


def with_byte_fallback() -> Any:
    """As SentencePiece: spaces are ▁, and unknown characters are bytes."""
    letters = sorted(set("".join(TEXTS).replace(" ", "▁")) - set("漢🙂"))
    pieces = ["<unk>", EOS_TOKEN, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokenizer: Any = Tokenizer(
        models.BPE({p: n for n, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", EOS_TOKEN])
    return tokenizer


def unigram() -> Any:
    pieces = [("<unk>", -9.0), (EOS_TOKEN, 0.0), *((c, -3.0) for c in sorted(set("".join(TEXTS))))]
    tokenizer: Any = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([EOS_TOKEN, "<unk>"])
    return tokenizer


def word_level() -> Any:
    words = ["<unk>", EOS_TOKEN, *TEXTS]
    tokenizer: Any = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


def word_piece() -> Any:
    letters = sorted(set("".join(TEXTS)))
    pieces = ["<unk>", EOS_TOKEN, *letters, *(f"##{letter}" for letter in letters)]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    tokenizer: Any = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", max_input_chars_per_word=9999))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


KINDS = [byte_level, with_byte_fallback, unigram, word_level, word_piece]

# ------------------------------------------------------------------ mutations

PARTS: dict[str, list[Any]] = {
    "normalizer": [
        None,
        {"type": "Lowercase"},
        {"type": "NFKD"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Replace", "pattern": {"Regex": "("}, "content": " "},
        {"type": "Prepend", "prepend": ""},
        {"type": "Sequence", "normalizers": []},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "ByteLevel"},
    ],
    "pre_tokenizer": [
        None,
        {"type": "Whitespace"},
        {"type": "Digits", "individual_digits": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Metaspace", "replacement": "", "prepend_scheme": "never", "split": False},
        {"type": "Split", "pattern": {"Regex": r"\s"}, "behavior": "Removed", "invert": False},
        {"type": "Split", "pattern": {"Regex": r"(x+x+)+y|$^"}, "behavior": "Isolated", "invert": True},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
        {"type": "CharDelimiterSplit", "delimiter": "e"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
        {"type": "Sequence", "pretokenizers": [{"type": "BertPreTokenizer"}, {"type": "UnicodeScripts"}]},
        {"type": "FixedLength", "length": 0},
        {"type": "FixedLength", "length": 3},
    ],
    "decoder": [
        None,
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "BPEDecoder", "suffix": ""},
        {"type": "Strip", "content": "e", "start": 99999999, "stop": 3},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
        {"type": "Sequence", "decoders": [{"type": "WordPiece", "prefix": "", "cleanup": True}]},
    ],
    "post_processor": [
        None,
        {"type": "BertProcessing", "sep": ["none", 99999], "cls": ["none", 99998]},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
    ],
    "truncation": [
        None,
        {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 7},
    ],
    "padding": [
        None,
        {
            "strategy": {"Fixed": 40},
            "direction": "Right",
            "pad_to_multiple_of": 0,
            "pad_id": 99999,
            "pad_type_id": 0,
            "pad_token": "",
        },
    ],
    "added_tokens": [None, [], {}],
}
SCALARS: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    300,
    2**31,
    2**32,
    2**70,
    0.5,
    -1.5,
    1e300,
    "",
    " ",
    "e",
    "##",
    "漢",
]
SCALARS += [EOS_TOKEN, "[UNK]", "\ud800", "(", [], {}, [1], {"type": "Sequence"}]


def places(node: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """(container, key) of the nodes of a document; of long tables only some."""
    if depth > 6 or not isinstance(node, dict | list):
        return []
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    keys = keys if len(keys) <= 20 else keys[:3] + keys[len(keys) // 2 :: len(keys)] + keys[-3:]
    return [place for key in keys for place in [(node, key), *places(node[key], depth + 1)]]


def mutated(content: Any, rng: random.Random) -> bytes:
    content = copy.deepcopy(content)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        match rng.randrange(6):
            case 0 | 1:
                part = rng.choice(list(PARTS))
                content[part] = copy.deepcopy(rng.choice(PARTS[part]))
            case 2:
                container, key = rng.choice(places(content))
                container[key] = copy.deepcopy(rng.choice(SCALARS))
            case 3:
                container, key = rng.choice(places(content))
                del container[key]
            case 4 if isinstance(content.get("added_tokens"), list):
                token = {
                    "id": rng.choice([0, 1, 5, 290, 5000, 2**32]),
                    "content": rng.choice(["a", EOS_TOKEN, "q!", ""]),
                }
                flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
                content["added_tokens"].append(token | {flag: rng.random() < 0.5 for flag in flags})
            case 5 if isinstance(content.get("model"), dict):
                name = rng.choice(["dropout", "unk_token", "unk_id", "byte_fallback", "ignore_merges", "vocab", "type"])
                content["model"][name] = copy.deepcopy(
                    rng.choice([*SCALARS, "BPE", "WordLevel", "Unigram", "WordPiece"])
                )
            case _:
                pass
    data = bytearray(json.dumps(content).encode())
    if rng.random() < 0.1:
        place = rng.randrange(len(data))
        data[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(data)


# ------------------------------------------------------------------ what must hold


def check_dataset(root: Path) -> None:
    """What a run checks first accepts the dataset, and its documents, decoded by the library alone, are `TEXTS`.

    A tokenizer may put a space before a text.
    """
    info = verify(MdsSource(type="mds", path=str(root)))
    manifest, library = read_manifest(root), Tokenizer.from_file(str(root / "tokenizer.json"))
    assert load(root / "tokenizer.json").eos_id == manifest.eos_id
    found = []
    for split in SPLITS:
        shards = MdsSplit(root, split)
        for document in range(len(shards)):
            *ids, end = shards.tokens(document).tolist()
            assert end == manifest.eos_id and end not in ids and max(ids) < info.vocab_size
            back = library.decode(ids, skip_special_tokens=False)
            found.append(back if back in TEXTS else back.removeprefix(" "))
    assert sorted(found) == sorted(TEXTS)


def fuzz(make: Callable[[], Any], seed: int, inputs: int, folder: Path, capfd: Any) -> Counter[str]:
    rng, ends_in = random.Random(f"{make.__name__} {seed}"), Counter[str]()
    content = json.loads(make().to_str())
    corpus = write_jsonl(folder / "a.jsonl", TEXTS)
    given, out = folder / "tok.json", folder / "out"
    cfg = corpus_config(corpus, tokenizer={"type": "file", "path": str(given)})
    for number in range(inputs):
        given.write_bytes(mutated(content, rng))
        shutil.rmtree(out, ignore_errors=True)
        try:
            build(cfg, out=out, progress=False, say=lambda _: None)
        except DataError as error:
            assert str(given) in str(error) or "tokenizer." in str(error) or "a.jsonl:" in str(error), error
            assert not out.exists()
            ends_in["error"] += 1
            continue
        try:
            check_dataset(out)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, input {number}: {given.read_bytes()[:3000]!r}") from error
        ends_in["dataset"] += 1
    assert "panicked" not in capfd.readouterr().err
    return ends_in


@pytest.mark.parametrize("make", KINDS)
def test_a_tokenizer_file_gives_a_dataset_or_an_error(make: Callable[[], Any], tmp_path: Path, capfd: Any) -> None:
    ends_in = fuzz(make, 0, INPUTS, tmp_path, capfd)
    assert ends_in["error"] > INPUTS // 4 and ends_in["dataset"] > INPUTS // 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("make", KINDS)
def test_many_tokenizer_files_give_datasets_or_errors(
    make: Callable[[], Any], seed: int, tmp_path: Path, capfd: Any
) -> None:
    fuzz(make, seed, 500, tmp_path, capfd)
