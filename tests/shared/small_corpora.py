"""Small corpora of text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from headway.data.corpus.config import CorpusConfig

WORDS = ["the", "of", "and", "a", "to", "in", "is", "was", "that", "for", "with", "they", "from", "word", "heat"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice([5, 40, 300, 1500]))) + f" {n}.\n" for n in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def corpus_config(path: Path, **changes: Any) -> CorpusConfig:
    settings: dict[str, Any] = {
        "name": "tiny",
        "corpus": {"type": "jsonl", "paths": [str(path)]},
        "tokenizer": {"type": "train_bpe", "vocab_size": 300},
        "validation_fraction": 0.2,
        "shard_bytes": 4096,
    }
    return CorpusConfig.model_validate(settings | changes)
