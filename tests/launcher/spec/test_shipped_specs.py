"""Specs that come with Headway are found by name from any folder; a file of the working folder wins."""

from pathlib import Path

import pytest

from headway.launcher.base.errors import NoInputError
from headway.launcher.cli.main import main
from headway.launcher.spec.shipped import FOLDER, KINDS, find_spec, shipped_names

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "file"),
    [
        ("quickstart", "spec", "base/quickstart.yaml"),
        ("quickstart", "study", "quickstart.yaml"),
        ("stdlib", "corpus", "data/stdlib.yaml"),
        ("probes", "probe", "probes.yaml"),
        ("3b", "spec", "models/3b.yaml"),
        ("models/3b", "spec", "models/3b.yaml"),
        ("studies/wgqa", "study", "studies/wgqa.yaml"),
    ],
)
def test_a_name_means_the_shipped_file_of_the_kind_that_is_wanted(name, kind, file):
    assert find_spec(Path(name), kind) == ROOT / "yaml" / file


def test_every_shipped_file_has_a_name_but_the_templates():
    named = {file for kind in KINDS for file in shipped_names(kind).values()}
    assert named == {f for f in FOLDER.rglob("*.yaml") if f.parent.name != "project"} and len(named) > 20
    for kind in KINDS:
        assert all(find_spec(Path(name), kind) == file for name, file in shipped_names(kind).items())


def test_a_file_of_the_working_folder_wins():
    for name in ("quickstart.yaml", "quickstart"):
        Path(name).write_text("name: mine\n")
        assert find_spec(Path("quickstart"), "spec") == Path(name)
    Path("stdlib").mkdir()  # a folder is no spec
    assert find_spec(Path("stdlib"), "corpus") == ROOT / "yaml/data/stdlib.yaml"


def test_in_a_checkout_the_path_is_shown_as_one_types_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert find_spec(Path("quickstart"), "spec") == Path("yaml/base/quickstart.yaml")


def test_an_unknown_name_gets_the_closest_and_all_of_its_kind():
    with pytest.raises(NoInputError) as caught:
        find_spec(Path("quikstart"), "study")
    said = str(caught.value)
    assert "Did you mean quickstart?" in said and str(Path.cwd() / "quikstart") in said
    assert all(name in said for name in shipped_names("study")) and "82m" not in said


def test_a_name_of_another_kind_names_the_verb():
    with pytest.raises(NoInputError, match="`headway probe run probes`"):
        find_spec(Path("probes"), "spec")


def test_a_missing_file_is_never_a_shipped_one_silently():
    with pytest.raises(NoInputError, match="use `base/quickstart`"):
        find_spec(Path("yaml/base/quickstart.yaml"), "spec")
    with pytest.raises(NoInputError, match="no such file"):
        find_spec(Path("folder/absent"), "spec")


def test_names_that_no_file_can_have_are_left_to_the_reader():
    assert find_spec(Path("x" * 4000), "spec") == Path("x" * 4000)
    with pytest.raises(NoInputError):
        find_spec(Path("a\0b"), "spec")


def test_the_verbs_take_names(capsys):
    assert main(["train", "quickstart", "train.tokens=1024", "schedule.warmup_tokens=0", "--print-config"]) == 0
    assert "base/quickstart.yaml:" in capsys.readouterr().out
    assert main(["plan", "tiny"]) == 0
    assert main(["study", "status", "quickstart"]) == 0
    assert "switchhead/seed-2" in capsys.readouterr().out
    assert main(["data", "verify", "stdlib"]) == 65  # found, and not built here
    assert "headway data build" in capsys.readouterr().err
    assert main(["bench", "data", "quikstart"]) == 66
    assert "Did you mean quickstart?" in capsys.readouterr().err
