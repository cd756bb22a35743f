"""Where the texts of an evaluation come from: the validation of a run, wherever its dataset lies, and folders."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from untrained_runs import untrained_run

from headway.data.build import build
from headway.data.corpus.config import CorpusConfig
from headway.launcher.evaluate.measure import Measure
from headway.launcher.evaluate.texts import TextSource, evaluate_text, own_sources
from headway.launcher.exchange.opened import Opened, open_model

ATTENTION = {"type": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 6}


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of several shards, and an untrained run on it."""
    folder = tmp_path_factory.mktemp("place")
    texts = write(folder / "all.jsonl", [f"The square of {n} is {n * n}. " * 9 for n in range(200)])
    settings = {
        "name": "texts",
        "corpus": {"type": "jsonl", "paths": [str(texts)]},
        "tokenizer": {"type": "train_bpe", "vocab_size": 270},
        "validation_fraction": 0.4,
        "shard_bytes": 4096,
    }
    build(CorpusConfig.model_validate(settings), out=folder / "data", progress=False)
    run_on(folder, "run", path=str(folder / "data"))
    return folder


def run_on(folder: Path, name: str, **source: str | int) -> Opened:
    data = {"source": {"type": "mds", **source}, "seq_len": 64, "shuffle_window": 1}
    return open_model(untrained_run(folder / name, attention=ATTENTION, data=data))


@pytest.fixture(scope="module")
def model(place: Path) -> Opened:
    return open_model(place / "run")


def own(model: Opened) -> TextSource:
    assert model.data is not None
    (found,) = own_sources(model.data)
    return found


def measured(model: Opened, source: TextSource) -> list[Measure]:
    return evaluate_text(model, source, limit=None, done=lambda tokens: None)


@pytest.mark.parametrize("cache_bytes", [None, 9000])
def test_the_validation_of_a_run_on_a_remote_dataset_is_fetched(
    cache_bytes: int | None, place: Path, model: Opened, tmp_path: Path
) -> None:
    """Training fetches the shards of its validation only, and a cache with a limit loses them again."""
    limit = {} if cache_bytes is None else {"cache_bytes": cache_bytes}
    cached = run_on(tmp_path, "run", path=str(tmp_path / "cache"), remote=str(place / "data"), **limit)
    assert not [*(tmp_path / "cache").rglob("*.mds")]
    assert measured(cached, own(cached)) == measured(model, own(model))
    sizes = [file.stat().st_size for file in (tmp_path / "cache").rglob("*.mds")]
    assert (len(sizes) > 2) if cache_bytes is None else (0 < sum(sizes) <= cache_bytes)


def test_the_path_of_a_dataset_may_begin_with_the_home_folder(
    place: Path, model: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place))
    at_home = run_on(tmp_path, "run", path="~/data")
    assert measured(at_home, own(at_home)) == measured(model, own(model))


def test_files_of_a_folder_that_are_not_read_are_named(
    model: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    (folder / ".cache").mkdir(parents=True)
    write(folder / "rows.jsonl", ["The square of 2 is 4.", "The square of 3 is 9."])
    write(folder / ".cache" / "hidden.jsonl", ["hidden"])
    (folder / "more.txt").write_text("A text beside the rows.")
    assert measured(model, TextSource(name="t", path=folder))[0].n == 2
    said = capsys.readouterr().err
    assert f"note: {folder}: 1 files of the type jsonl are read, 1 others left out: {folder / 'more.txt'}" in said
    (folder / "rows.jsonl").unlink()
    assert measured(model, TextSource(name="t", path=folder))[0].n == 1 and "left out" not in capsys.readouterr().err


def test_rows_are_rows_in_every_ending_that_a_build_knows(model: Opened, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"The square of {n} is {n * n}." for n in range(6)]
    plain = write(tmp_path / "rows.jsonl", texts)
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.pq")
    expected = measured(model, TextSource(name="t", path=plain))
    assert expected[0].n == 6
    for name in ("rows.json.gz", "rows.pq"):
        assert measured(model, TextSource(name="t", path=tmp_path / name)) == expected
