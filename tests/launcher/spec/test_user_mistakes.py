"""Mistakes at the front door: one message that names the word, the place and the way on, and the right exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.cli.main import main
from headway.launcher.spec.load import load_spec
from headway.launcher.study.config import StudyConfig, load_study
from headway.launcher.study.plan import plan_study

SPEC = """
model: {width: 32, layers: 1, ffn_width: 64}
attention: {type: gqa, heads: 4, kv_heads: 2, head_dim: 8}
data:
  seq_len: 32
  source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}
optimizer: {lr: 3.0e-3}
train: {tokens: 2560, global_batch: 8, micro_batch: 8}
"""

STUDY = """study: small
base: base.yaml
match: {free: model.ffn_width, tolerance: 5%}
seeds: [1]
variants:
  gqa: {}
  routed: {attention.type: rgqa, attention.top_k: 1}
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(SPEC)
    Path("study.yaml").write_text(STUDY)
    return Path("study.yaml")


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(list(words))
    return code, capsys.readouterr().err


def test_a_misspelt_verb_names_the_closest_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = failure(capsys, "trian", "x.yaml")
    assert code == 64 and "Did you mean train?" in text


def test_no_verb_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = failure(capsys)
    assert code == 64 and "required: doctor|init|data|plan|train|study|compare|probe|bench|generate|" in text


def test_only_what_must_be_given_is_called_required(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = failure(capsys, "train")
    assert code == 64 and text.endswith("the following arguments are required: spec\n")


def test_a_study_given_as_a_spec_is_one_message_with_the_right_command(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = failure(capsys, "train", "--print-config", str(study))
    assert code == 64
    assert text == (
        "error: study.yaml:5:1: variants: this file is a study, not the spec of a run; use `headway study run "
        "study.yaml`, or name the spec of a run\n"
    )


def test_a_spec_given_as_a_study_is_one_message_with_the_right_command(study: Path) -> None:
    with pytest.raises(SpecError, match=r"^base\.yaml:2:1: model: this file is the spec of a run, not a study; use"):
        load_spec("base.yaml", root=StudyConfig)


def test_a_spec_with_one_foreign_key_is_still_a_spec(study: Path) -> None:
    Path("base.yaml").write_text(SPEC + "corpus: {type: stdlib}\n")
    with pytest.raises(SpecError, match=r"corpus: unknown key"):
        load_spec("base.yaml")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("ffn_width", "ffn_widht", "study.yaml:3:9: match.free: the spec has no such key 'model.ffn_widht'. Did you "
         "mean model.ffn_width?"),
        ("model.ffn_width", "optimizer.lr", "study.yaml:3:9: match.free is 0.003, not an integer"),
        ("base.yaml", "bse.yaml", "study.yaml:2:1: base: no such file: bse.yaml (looked for "),
        ("[1]", "[]", "study.yaml:4:1: seeds: needs at least 1 entry; got none"),
    ],
)  # fmt: skip
def test_a_wrong_study_file_is_one_line_with_its_place(study: Path, old: str, new: str, says: str) -> None:
    study.write_text(STUDY.replace(old, new))
    with pytest.raises(SpecError) as caught:
        plan_study(load_study(study))
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_key_of_the_study_as_argument_is_told_apart_from_those_of_the_base_spec(study: Path) -> None:
    with pytest.raises(SpecError, match=r"argument 'seeds=\[1,2\]': seeds belongs to the study; write it in study"):
        plan_study(load_study(study), ["seeds=[1,2]"])


def test_a_name_that_cannot_be_a_folder_says_which_letters_can(study: Path) -> None:
    with pytest.raises(SpecError, match=r"name: 'my run' cannot name a folder; use letters, digits"):
        load_spec("base.yaml", ["name=my run"])


@pytest.mark.parametrize(
    ("written", "says"),
    [("model.tied=true", "Did you mean model.tied_embeddings?"), ("launch.x=1", "launch.x: unknown key. Legal keys")],
)
def test_an_unknown_key_names_a_longer_one_and_never_its_own_section(study: Path, written: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec("base.yaml", [written])
    assert says in str(caught.value)


def test_a_place_that_cannot_be_written_is_status_74_without_a_traceback(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").write_text("not a folder")
    study.write_text(STUDY.replace("seeds:", "out: taken/inner\nseeds:"))
    code, text = failure(capsys, "study", "run", str(study))
    assert code == 74
    assert text.startswith("error: taken") and len(text.splitlines()) == 1
    assert Path("taken").read_text() == "not a folder"


def test_a_full_disk_has_no_file_name_and_is_status_74_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headway.launcher.cli.main._run", full)
    code, text = failure(capsys, "doctor")
    assert code == 74 and text.startswith("error: No space left on device; ")


def test_an_error_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> int:
        raise KeyError("a defect")

    monkeypatch.setattr("headway.launcher.cli.main._run", broken)
    with pytest.raises(KeyError):
        main(["doctor"])
