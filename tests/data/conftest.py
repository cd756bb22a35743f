"""A small text dataset, built once with the real writer: 100 documents, some larger than the shard size limit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from headway.data.build import build
from headway.data.config import MdsSource
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


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(100)


@pytest.fixture(scope="session")
def config(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    return corpus_config(write_jsonl(tmp_path_factory.mktemp("corpus") / "tiny.jsonl", texts))


@pytest.fixture(scope="session")
def dataset(config: CorpusConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: tests that damage a dataset copy it first."""
    out = tmp_path_factory.mktemp("dataset") / "tiny"
    build(config, out=out, progress=False)
    return out


@pytest.fixture(scope="session")
def source(dataset: Path) -> MdsSource:
    return MdsSource(type="mds", path=str(dataset))
