"""Relative paths of a spec: the working folder first, then the folder of the file that wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headway.data.build import build
from headway.data.config import DataError
from headway.data.corpus.config import CorpusConfig
from headway.launcher.base.errors import NoInputError
from headway.launcher.cli.main import main
from headway.launcher.run.initial_weights import with_initial_hash
from headway.launcher.run.resolve import resolve
from headway.launcher.spec.load import load_spec
from headway.launcher.study.config import load_study
from headway.launcher.study.plan import plan_study
from headway.model.huggingface.folder import WeightsError

SPEC = """
name: text
model: {width: 16, layers: 1, ffn_width: 16}
attention: {type: gqa, heads: 2, kv_heads: 1, head_dim: 8}
data: {seq_len: 16, source: {type: mds, path: datasets/tiny}}
optimizer: {lr: 3.0e-3}
train: {tokens: 128, global_batch: 4, micro_batch: 4, validation_tokens: 64}
launch: {processes: 1, threads: 1, device: cpu}
"""

STUDY = """
study: small
base: spec.yaml
seeds: [1]
variants:
  gqa: {}
  other-data: {data.source.path: datasets/other}
"""

CORPUS = """
name: tiny
corpus: {type: text, paths: ["texts/*.txt"]}
tokenizer: {type: train_bpe, vocab_size: 257}
validation_fraction: 0.3
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with specs, texts and a dataset; the working folder is another one."""
    project, here = tmp_path / "project", tmp_path / "here"
    (project / "texts").mkdir(parents=True)
    here.mkdir()
    for number in range(12):
        (project / "texts" / f"{number}.txt").write_text(f"text {number} " * 40)
    for name, text in (("spec.yaml", SPEC), ("study.yaml", STUDY), ("corpus.yaml", CORPUS)):
        (project / name).write_text(text)
    monkeypatch.chdir(here)
    return project


def dataset(project: Path, out: Path) -> None:
    build(load_spec(project / "corpus.yaml", root=CorpusConfig).spec, out=out, progress=False)


def source_of(spec: Path, *overrides: str) -> str:
    return load_spec(spec, overrides).spec.data.source.path  # type: ignore[union-attr]


def test_a_path_that_is_only_beside_the_spec_becomes_absolute(project: Path) -> None:
    (project / "datasets/tiny").mkdir(parents=True)
    assert source_of(project / "spec.yaml") == str((project / "datasets/tiny").resolve())


def test_the_working_folder_comes_first_and_its_paths_stay_as_written(project: Path) -> None:
    (project / "datasets/tiny").mkdir(parents=True)
    Path("datasets/tiny").mkdir(parents=True)
    assert source_of(project / "spec.yaml") == "datasets/tiny"


def test_a_path_that_is_nowhere_stays_as_written(project: Path) -> None:
    assert source_of(project / "spec.yaml") == "datasets/tiny"


def test_an_argument_means_the_working_folder_alone(project: Path) -> None:
    (project / "datasets/tiny").mkdir(parents=True)
    assert source_of(project / "spec.yaml", "data.source.path=datasets/tiny") == "datasets/tiny"


def test_each_file_of_a_chain_of_bases_has_its_own_folder(project: Path) -> None:
    (project / "datasets/tiny").mkdir(parents=True)
    Path("top.yaml").write_text("base: ../project/spec.yaml\nmodel.layers: 2\n")
    assert source_of(Path("top.yaml")) == str((project / "datasets/tiny").resolve())
    (project / "above").mkdir()
    (project / "above/top.yaml").write_text("base: ../spec.yaml\ndata.source.path: datasets/tiny\n")
    assert source_of(project / "above/top.yaml") == "datasets/tiny"  # what the base found is not what this file wrote


def test_missing_data_name_every_place_as_an_absolute_path(project: Path) -> None:
    with pytest.raises(DataError) as caught:
        resolve(load_spec(project / "spec.yaml").spec)
    for folder in (Path.cwd(), project.resolve()):
        assert f"{folder / 'datasets/tiny'}" in str(caught.value)
    assert "headway data build" in str(caught.value)


def test_missing_weights_name_every_place_as_an_absolute_path(project: Path) -> None:
    (project / "more.yaml").write_text("base: spec.yaml\ninit.weights: start\n")
    with pytest.raises(WeightsError) as caught:
        with_initial_hash(load_spec(project / "more.yaml").spec)
    assert f"{Path.cwd() / 'start'} and {project.resolve() / 'start'}" in str(caught.value)
    (project / "start").mkdir()
    assert load_spec(project / "more.yaml").spec.init.weights == str(project.resolve() / "start")


def test_a_missing_base_says_where_it_was_looked_for(project: Path) -> None:
    (project / "more.yaml").write_text("base: lower/none.yaml\n")
    with pytest.raises(Exception, match=f"looked for {project.resolve()}/lower/none.yaml"):
        load_spec(project / "more.yaml")
    with pytest.raises(NoInputError, match=f"looked for {Path.cwd()}/none.yaml"):
        load_spec("none.yaml")


def test_a_corpus_finds_patterns_and_tokenizers_beside_its_spec(project: Path) -> None:
    found = load_spec(project / "corpus.yaml", root=CorpusConfig).spec
    assert found.corpus.paths == [str(project.resolve() / "texts/*.txt")]  # type: ignore[union-attr]
    Path("texts").mkdir()
    Path("texts/own.txt").write_text("own")
    found = load_spec(project / "corpus.yaml", root=CorpusConfig).spec
    assert found.corpus.paths == ["texts/*.txt"]  # type: ignore[union-attr]
    (project / "tokenizer.json").write_text("{}")
    (project / "file.yaml").write_text(
        CORPUS.replace("type: train_bpe, vocab_size: 257", "type: file, path: tokenizer.json")
    )
    found = load_spec(project / "file.yaml", root=CorpusConfig).spec
    assert found.tokenizer.path == str(project.resolve() / "tokenizer.json")  # type: ignore[union-attr]


def test_missing_texts_name_every_place_as_an_absolute_path(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (project / "texts").iterdir():
        file.unlink()
    assert main(["data", "build", str(project / "corpus.yaml")]) == 65
    said = capsys.readouterr().err
    assert str(Path.cwd() / "texts/*.txt") in said and str(project.resolve() / "texts/*.txt") in said


def test_a_variant_of_a_study_finds_data_beside_the_study(project: Path) -> None:
    dataset(project, project / "datasets/tiny")
    dataset(project, project / "datasets/other")
    plan = plan_study(load_study(project / "study.yaml"))
    sources = {cell.variant: cell.spec.data.source.path for cell in plan.cells}  # type: ignore[union-attr]
    assert sources == {
        "gqa": str(project.resolve() / "datasets/tiny"),
        "other-data": str(project.resolve() / "datasets/other"),
    }
    for cell in plan.cells:  # what a cell is started with gives the same spec
        assert load_spec(plan.study.base, cell.overrides).spec == cell.spec


def test_a_run_with_data_beside_its_spec_can_be_used_from_any_folder(
    headway, tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(project, project / "datasets/tiny")
    done = headway.run("train", "project/spec.yaml")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/text"
    stored = json.loads((run / "spec.json").read_text())["data"]["source"]["path"]
    assert stored == str(project.resolve() / "datasets/tiny")
    monkeypatch.chdir("/")
    assert main(["generate", str(run), "text", "--tokens", "2"]) == 0
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "safetensors"]) == 0
    assert main(["train", str(project / "spec.yaml"), f"run_dir={run}"]) == 0
    assert "already complete" in capsys.readouterr().out
