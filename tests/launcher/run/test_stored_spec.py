"""The dataset of a run is found from any working folder, and after the folders were moved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headway.data.build import build
from headway.data.config import MdsSource
from headway.data.corpus.config import CorpusConfig
from headway.launcher.run.codec import Codec
from headway.launcher.run.run_dir import RunDir
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.spec.load import load_spec

ROOT = Path(__file__).resolve().parents[3]
WRITTEN = "datasets/tiny"


def dataset(folder: Path, word: str) -> str:
    """Build a dataset of a few documents; returns its fingerprint."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    texts = folder.parent / f"{folder.name}.txt"
    texts.write_text("".join(f"{word} {n}\n" for n in range(40)))
    settings = {
        "name": "tiny",
        "corpus": {"type": "text", "paths": [str(texts)], "document": "line"},
        "tokenizer": {"type": "train_bpe", "vocab_size": 270},
    }
    return build(CorpusConfig.model_validate(settings), out=folder).fingerprint


def run_of(folder: Path, fingerprint: str, working_dir: Path) -> RunDir:
    spec = load_spec(ROOT / "yaml/base/quickstart.yaml", [f"data.source.path={WRITTEN}", "model.vocab_size=270"]).spec
    folder.mkdir(parents=True)
    run = RunDir(folder)
    run.spec.write_text(spec.model_dump_json())
    run.card.write_text(json.dumps({"data_fingerprint": fingerprint, "working_dir": str(working_dir)}))
    return run


def path_of(run: RunDir) -> Path:
    source = stored_spec(run).data.source
    assert isinstance(source, MdsSource)
    return Path(source.path)


def test_the_dataset_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    fingerprint = dataset(project / WRITTEN, "word")
    run = run_of(project / "runs" / "a", fingerprint, project)
    monkeypatch.chdir(project)
    assert path_of(run) == Path(WRITTEN)
    monkeypatch.chdir(elsewhere)
    assert path_of(run) == project / WRITTEN
    assert Codec.of(stored_spec(run), run).encode("word")

    project.rename(tmp_path / "moved")  # the run and its dataset together
    assert path_of(RunDir(tmp_path / "moved/runs/a")) == tmp_path / "moved" / WRITTEN

    (tmp_path / "moved/runs/a").rename(elsewhere / "a")  # the run alone, away from the folder that it was started in
    card = elsewhere / "a" / "run.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"working_dir": str(tmp_path / "moved")}))
    assert path_of(RunDir(elsewhere / "a")) == tmp_path / "moved" / WRITTEN


def test_another_dataset_of_that_name_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    fingerprint = dataset(project / WRITTEN, "word")
    assert dataset(project / "runs" / WRITTEN, "other") != fingerprint
    run = run_of(project / "runs" / "a", fingerprint, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert path_of(run) == project / WRITTEN


def test_the_message_names_every_folder_that_was_looked_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path / "runs" / "a", "0" * 64, tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=r"no dataset here") as raised:
        Codec.of(stored_spec(run), run)
    for folder in (tmp_path, tmp_path / "runs", tmp_path / "start"):
        assert str(folder / WRITTEN) in str(raised.value)
