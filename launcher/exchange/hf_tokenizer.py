"""The tokenizer of a Hugging Face export: written so that transformers gives the ids of training, and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from headway.data.config import DataError
from headway.data.tokenizer import CorpusTokenizer
from headway.launcher.base.errors import HeadwayError, printable
from headway.launcher.run.codec import Codec
from headway.model.huggingface import folder as hf

TOKENIZER_CONFIG = "tokenizer_config.json"
TEXTS = (
    "",
    " ",
    "def f(x):",
    " one leading space",
    "  two  and   three    spaces ",
    "a line\n\n\tan indented line\r\na line of Windows\n",
    "Naïve façade, e\u0301, ﬁ, İ, ½, 東京, Ελλάδα, \u200d🙂\u00a0",
    "x=1; y = -22.50  # it's UPPER and lower . , ? !",
)
"""Texts whose ids are compared, besides those with the tokenizer's own special tokens and texts of the dataset."""

MAX_TOKEN_TEXTS = 50


def write_tokenizer(folder: Path, codec: Codec, *, seq_len: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, from which transformers reads the tokenizer of training.

    Training saw no token before or after a text, no truncation and no padding, and special tokens in a text as text.
    So the sections of tokenizer.json that add or remove tokens are dropped. Without such sections, the file is copied.
    """
    assert codec.file is not None
    content = json.loads(codec.file.read_bytes())
    plain = content | {
        "truncation": None,
        "padding": None,
        "post_processor": _without_tokens(content.get("post_processor")),
    }
    if all(plain[key] == content.get(key) for key in plain):
        shutil.copyfile(codec.file, folder / hf.TOKENIZER)
    else:
        (folder / hf.TOKENIZER).write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "model_input_names": ["input_ids", "attention_mask"],  # a Llama takes no token_type_ids
        "bos_token": None,
        "eos_token": codec.eos_token,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # special tokens in a text are text
    }
    # transformers replaces this setting of the pre-tokenizer by its own, which is false if the file does not say it.
    space = (content.get("pre_tokenizer") or {}).get("add_prefix_space")
    hf.write_json(folder / TOKENIZER_CONFIG, config if space is None else config | {"add_prefix_space": space})


def _without_tokens(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """The parts of a post-processor that add no tokens."""
    match (processor or {}).get("type"):
        case "ByteLevel":  # changes offsets only
            return processor
        case "Sequence":
            assert processor is not None
            kept = [part for part in processor["processors"] if _without_tokens(part) is not None]
            return processor | {"processors": kept} if kept else None
    return None


def load_reader(folder: Path, library: Any) -> Any:
    """The tokenizer of `folder` as users get it: `AutoTokenizer.from_pretrained(folder)`."""
    try:
        return library.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # whatever the library raises
        raise HeadwayError(
            f"{folder}: transformers cannot read its tokenizer ({type(e).__name__}: {printable(str(e), 300)}); nothing "
            "was written. Use --to safetensors, another version of transformers, or uninstall it to skip the comparison"
        ) from e


def compare_texts(reader: Any, codec: Codec, samples: Iterable[str]) -> int:
    """Compare the ids of texts between `reader` and training, with its default settings. Returns how many texts.

    samples: Texts of the dataset, compared besides `TEXTS` and texts with special tokens. Decoded text is compared too.
    Raises DataError if an id differs. Texts that the tokenizer of training cannot encode are left out.
    """
    ours = codec.tokenizer
    assert ours is not None
    number = 0
    for text in [*TEXTS, *_with_tokens(ours), *samples]:
        try:
            expected = ours.encode([text])[0]
        except DataError:
            continue
        _compare(codec, text, expected, reader)
        number += 1
    if (reader.bos_token_id, reader.eos_token_id) != (None, codec.eos_id):
        raise DataError(
            f"{codec.file}: transformers reads bos_token_id {reader.bos_token_id} and eos_token_id "
            f"{reader.eos_token_id}, but training had none and {codec.eos_id}; nothing was written. "
            "Use --to safetensors, which keeps the tokenizer"
        )
    return number


def _with_tokens(tokenizer: CorpusTokenizer) -> list[str]:
    tokens = tokenizer.added_tokens()[:MAX_TOKEN_TEXTS]
    return [form.format(token) for token in tokens for form in ("{}", "a{}b", "a {} b ")]


def _compare(codec: Codec, text: str, expected: Sequence[int], reader: Any) -> None:
    try:
        found = list(reader(text)["input_ids"])
        back = reader.decode(found, skip_special_tokens=False)
    except Exception as e:  # whatever the library raises
        raise DataError(
            _message(codec, text, f"an error ({type(e).__name__}: {printable(str(e), 200)})", expected)
        ) from e
    if found != list(expected):
        raise DataError(_message(codec, text, f"the ids {_shown(found)}", expected))
    assert codec.tokenizer is not None
    decoded = codec.tokenizer.decode(expected)
    if back != decoded:
        raise DataError(
            f"{codec.file}: transformers decodes the ids {_shown(found)} to {printable(repr(back))}, Headway to "
            f"{printable(repr(decoded))}; nothing was written. Use --to safetensors, which keeps the tokenizer"
        )


def _message(codec: Codec, text: str, found: str, expected: Sequence[int]) -> str:
    return (
        f"{codec.file}: transformers gives {found} for the text {printable(repr(text))}, but training had "
        f"{_shown(expected)}, so the exported model would get other ids than those it was trained on; nothing was "
        "written. Use --to safetensors, which keeps the tokenizer, or train on a dataset with a tokenizer.json that "
        "transformers reads alike (a byte-level BPE, or tokenizer.type: train_bpe)"
    )


def _shown(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:12]))}{', ...' if len(ids) > 12 else ''}]"
