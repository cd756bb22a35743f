"""A small text dataset, built once with the real writer: 100 documents, some larger than the shard size limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_corpora import corpus_config, make_texts, write_jsonl

from headway.data.build import build
from headway.data.config import MdsSource
from headway.data.corpus.config import CorpusConfig


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
