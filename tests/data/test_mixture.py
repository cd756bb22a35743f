"""Mixtures: shares of the weights, an order that is a function of the position, and validation sets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from small_corpora import corpus_config, make_texts, write_jsonl

from headway.data.build import build
from headway.data.config import DataConfig, DataError, MixSource
from headway.data.corpus.config import CorpusConfig
from headway.data.loader import Loader, open_source
from headway.data.mixture import BLOCK, MixedText, Mixture, validation_shares
from headway.data.overlap import Overlap, overlap
from headway.data.validation import ValidationData, validation_data
from headway.data.verify import verify_source

WEIGHTS = (3.0, 1.0, 0.01)


@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 1.0), (1 / 2047, 1.0), (0.3, 0.0, 0.7), (1.0, 0.0)])
def test_counts_are_within_one_of_the_exact_share_after_each_block(weights: tuple[float, ...]) -> None:
    mixture, total = Mixture([(0, weights)], seed=1), sum(weights)
    for blocks in (1, 2, 7, 1000, 12345):
        counts = mixture.counts(blocks * BLOCK)
        assert sum(counts) == blocks * BLOCK
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - blocks * BLOCK * weight / total) <= 1
            assert weight or not count


def test_each_dataset_is_read_in_its_own_order_without_gaps_over_stages() -> None:
    stages = [(0, WEIGHTS), (BLOCK + 17, (1.0, 2.0, 0.0)), (BLOCK + 20, (0.0, 1.0, 1.0))]
    mixture = Mixture(stages, seed=4)
    positions = 3 * BLOCK + 5
    places = [mixture.place(position) for position in range(positions)]
    for dataset in range(3):
        assert [place for which, place in places if which == dataset] == list(range(mixture.counts(positions)[dataset]))
    late = Counter(which for which, _ in places[BLOCK + 20 :])
    assert late[0] == 0 and abs(late[1] - late[2]) < 0.1 * BLOCK
    assert [mixture.counts(n) for n in (0, 1, BLOCK + 17)] == [
        [sum(which == dataset for which, _ in places[:n]) for dataset in range(3)] for n in (0, 1, BLOCK + 17)
    ]
    other = Mixture(stages, seed=4)  # random access, in any order, gives the same
    for position in np.random.default_rng(1).integers(0, positions, 200).tolist():
        assert other.place(position) == places[position]
    assert [Mixture(stages, seed=5).place(n)[0] for n in range(50)] != [which for which, _ in places[:50]]


def test_validation_shares_follow_the_weights_without_repeating_a_sequence() -> None:
    assert validation_shares([100, 100], [3, 1]) == [100, 33]
    assert validation_shares([100, 100], [3, 1], wanted=40) == [30, 10]
    assert validation_shares([100, 2], [1, 1], wanted=40) == [2, 2]
    assert validation_shares([1000, 5], [1000, 1], wanted=10) == [10, 1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three datasets with the tokenizer of the first."""
    root = tmp_path_factory.mktemp("mixture")
    made: list[Path] = []
    for number, name in enumerate(("wiki", "books", "code")):
        texts = write_jsonl(root / f"{name}.jsonl", [f"{name} {text}" for text in make_texts(60, seed=number)])
        tokenizer = {"type": "file", "path": str(made[0] / "tokenizer.json")} if made else None
        cfg = corpus_config(texts, name=name, **({"tokenizer": tokenizer} if tokenizer else {}))
        assert isinstance(cfg, CorpusConfig)
        build(cfg, out=root / name)
        made.append(root / name)
    return made


def config(folders: list[Path], weights: tuple[float, ...] = (2.0, 1.0, 1.0), **changes: Any) -> DataConfig:
    sources = [{"path": str(path), "weight": weight} for path, weight in zip(folders, weights, strict=True)]
    settings: dict[str, Any] = {"source": {"type": "mix", "sources": sources}, "seq_len": 32, "workers": 0}
    return DataConfig.model_validate_json(json.dumps(settings | changes))


def test_the_global_batch_does_not_depend_on_ranks_and_micro_batches(folders: list[Path]) -> None:
    def digests(ranks: int, micro: int) -> list[int]:
        found = []
        for step in (0, 1, 40):
            loaders = [
                Loader(config(folders), split="train", global_batch=8, micro_batch=micro, dp_rank=rank, dp_size=ranks)
                for rank in range(ranks)
            ]
            found.append(sum(loader.batch(step).digest for loader in loaders) % (1 << 64))
        return found

    assert digests(1, 8) == digests(2, 2) == digests(4, 1) == digests(8, 1)
    assert len(set(digests(1, 8))) == 3


def test_what_was_trained_of_each_dataset_is_counted(folders: list[Path]) -> None:
    cfg = config(folders)
    source = open_source(cfg, split="train")
    assert isinstance(source, MixedText)
    which = [int(np.searchsorted(source._first, source.index(n), "right")) - 1 for n in range(600)]
    trained = source.trained(600)
    assert list(trained) == ["wiki", "books", "code"]
    for number, (name, facts) in enumerate(trained.items()):
        assert facts["tokens"] == 32 * which.count(number), name
        assert facts["epochs"] == which.count(number) / source.parts[number].num_sequences
    total = sum(facts["tokens"] for facts in trained.values())
    assert trained["wiki"]["tokens"] / total == pytest.approx(0.5, abs=0.05)


def test_validation_has_a_set_for_each_dataset_and_for_each_name(folders: list[Path]) -> None:
    cfg = config(folders, validation={"more": str(folders[1])})
    whole = validation_data(cfg, tokens=32 * 40, micro_batch=4, dp_rank=0, dp_size=1)
    assert list(whole.sets) == ["wiki", "books", "code", "more"]
    rows = {name: _rows_of([whole], documents) for name, documents in whole.sets.items()}
    assert whole.main == range(whole.sets["more"].start)
    assert len(rows["wiki"]) == pytest.approx(2 * len(rows["books"]), abs=1) and len(rows["code"]) >= 1
    first = " ".join(_text(folders[0], rows["wiki"][0])[:40].split())
    assert first and rows["wiki"] != rows["books"]
    parts = [validation_data(cfg, tokens=32 * 40, micro_batch=2, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert parts[0].sets == parts[1].sets == whole.sets
    assert len(parts[0].batches) == len(parts[1].batches)
    for name, documents in whole.sets.items():
        assert sorted(_rows_of(parts, documents)) == sorted(rows[name]), name


def _rows_of(parts: list[ValidationData], documents: range) -> list[list[int]]:
    """Tokens of the rows of these documents, over all ranks. Rows without targets are padding."""
    return [
        row.tolist()
        for part in parts
        for batch, numbers in zip(part.batches, part.documents, strict=True)
        for row, labels, of in zip(batch.tokens, batch.labels, numbers, strict=True)
        if (labels >= 0).any() and int(of[0]) in documents
    ]


def _text(folder: Path, ids: list[int]) -> str:
    from headway.data.tokenizer import load

    return load(folder / "tokenizer.json", eos_token="<|endoftext|>").decode(ids)


def test_datasets_with_other_tokenizers_are_refused(folders: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    build(corpus_config(write_jsonl(tmp_path / "other.jsonl", make_texts(50, seed=9)), name="other"), out=other)
    source = config([folders[0], folders[1], other]).source
    assert isinstance(source, MixSource)
    with pytest.raises(DataError, match=r"data\.source\.sources: .*other was made with another tokenizer than .*wiki"):
        verify_source(source, seq_len=32)


def test_facts_of_a_mixture_are_those_of_its_datasets(folders: list[Path]) -> None:
    source = config(folders).source
    assert isinstance(source, MixSource)
    info, parts = verify_source(source, seq_len=32)
    assert info.train_tokens == sum(part.train_tokens for part in parts)
    assert info.fingerprint not in {part.fingerprint for part in parts}
    sizes = [part.validation_bytes_per_token or 0 for part in parts]
    assert info.validation_bytes_per_token == pytest.approx((2 * sizes[0] + sizes[1] + sizes[2]) / 4)


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ((1.0, 1.0, 1e-4), {}, "smallest share is 1/2048"),
        ((1.0, 1.0, 0.0), {}, "greater than 0"),
        ((1.0, 1.0, 1.0), {"stages": [{"from_tokens": 64, "weights": [1.0, 2.0]}]}, "weights .* for 3 datasets"),
        ((1.0, 1.0, 1.0), {"stages": [{"from_tokens": 64, "weights": [0.0, 0.0, 0.0]}]}, "not only zeros"),
        ((1.0, 1.0, 1.0), {"stages": [{"from_tokens": n, "weights": [1.0, 1.0, 1.0]} for n in (64, 32)]}, "increase"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(
    weights: tuple[float, ...], changes: dict[str, Any], message: str, folders: list[Path]
) -> None:
    sources = [{"path": str(path), "weight": weight} for path, weight in zip(folders, weights, strict=True)]
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate_json(
            json.dumps({"source": {"type": "mix", "sources": sources} | changes, "seq_len": 32})
        )


def test_two_datasets_of_one_name_need_names(folders: list[Path]) -> None:
    sources = [{"path": str(folders[0]), "weight": 1.0}] * 2
    with pytest.raises(ValidationError, match="two datasets are called wiki; give one of them a `name`"):
        DataConfig.model_validate_json(json.dumps({"source": {"type": "mix", "sources": sources}, "seq_len": 32}))


def test_validation_documents_that_another_dataset_trains_on_are_found(folders: list[Path], tmp_path: Path) -> None:
    texts, others = make_texts(60), [f"other {text}" for text in make_texts(60)]
    held = build_last(tmp_path / "held", folders[0], [*others, *texts[:20]], "last 20%")
    apart = build_last(tmp_path / "apart", folders[0], others, "last 20%")
    trained = build_last(tmp_path / "trained", folders[0], [*texts, "the end of it " * 60], "last 5%")
    found, none = overlap(held, trained), overlap(apart, trained)
    assert 3 < found.compared <= found.shared + 1  # the first one may be the second half of a document
    assert none == Overlap(compared=none.compared, shared=0) and none.compared > 3


def build_last(out: Path, tokenizer: Path, texts: list[str], validation: str) -> Path:
    settings = {
        "name": out.name,
        "corpus": {"type": "jsonl", "paths": [str(write_jsonl(out.with_suffix(".jsonl"), texts))]},
        "tokenizer": {"type": "file", "path": str(tokenizer / "tokenizer.json")},
        "validation": validation,
    }
    build(CorpusConfig.model_validate(settings), out=out, progress=False)
    return out
