"""What a user reads where a spec names a mechanism of another package, or one that is not installed."""

from pathlib import Path

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.cli.doctor import inspect_machine
from headway.launcher.cli.schema import schema_of
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.spec.load import load_spec

TINY = Path(__file__).parents[3] / "yaml" / "base" / "tiny.yaml"


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides)
    return str(caught.value)


@pytest.fixture
def ours(install, mechanism_source):
    return install("our_mechanism", mechanism_source("our_mechanism"))


def test_an_unknown_type_names_the_closest_and_where_other_types_come_from(ours):
    text = message(TINY, "attention.type=our_mechanisn")
    assert "attention.type: 'our_mechanisn' is not a known type. Did you mean our_mechanism?" in text
    assert "entry point group headway.mechanisms" in text and "`headway doctor`" in text
    assert "Did you mean gqa?" in message(TINY, "attention.type=gqaa")


def test_other_sections_with_a_type_say_nothing_of_packages():
    assert "headway.mechanisms" not in message(TINY, "data.source.type=mdss")


def test_a_package_that_cannot_be_imported_is_named_at_the_line_of_the_type(install, tmp_path):
    install("our_mechanism", "import no_such_module", package="bad-package", version="2.1")
    file = tmp_path / "spec.yaml"
    file.write_text(f"base: {TINY}\nattention.type: our_mechanism\n")
    text = message(file)
    assert text.startswith(f"{file}:2:1: attention.type: bad-package 2.1 registers our_mechanism")
    assert "no_such_module" in text and "repair or update that package" in text
    assert load_spec(TINY).spec.attention.type == "gqa"


def test_keys_follow_a_change_of_type_both_ways(ours, tmp_path):
    loaded = load_spec(TINY, ["attention.type=our_mechanism", "attention.gain=2.0"])
    assert loaded.spec.attention.model_dump()["gain"] == 2.0
    file = tmp_path / "spec.yaml"
    file.write_text(f"base: {TINY}\nattention: {{type: our_mechanism, gain: 3.0}}\n")
    back = load_spec(file, ["attention.type=gqa"])
    assert back.spec.attention.type == "gqa"
    assert any("attention.gain = 3.0" in note and "dropped" in note for note in back.notes)
    gated = tmp_path / "gated.yaml"
    gated.write_text(f"base: {TINY}\nattention: {{gate: headwise}}\n")
    away = load_spec(gated, ["attention.type=our_mechanism"])
    assert any("attention.gate = headwise" in note and "dropped" in note for note in away.notes)


def test_a_mistyped_key_of_it_is_named_with_its_own_keys(ours):
    text = message(TINY, "attention.type=our_mechanism", "attention.gian=2.0")
    assert "attention.gian: unknown key. Did you mean attention.gain?" in text


def test_a_stored_spec_whose_package_is_gone_is_a_message(ours, tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    spec = load_spec(TINY, ["attention.type=our_mechanism"]).spec
    write_json(run.spec, spec.model_dump(mode="json"))
    assert stored_spec(run) == spec
    text = run.spec.read_text()
    run.spec.write_text(text.replace('"our_mechanism"', '"gone_mechanism"'))
    with pytest.raises(SpecError, match=r"spec.json:\d+:\d+: attention.type: 'gone_mechanism' is not a known type"):
        stored_spec(run)


def test_doctor_lists_what_is_installed_and_what_is_broken(ours, install):
    install("broken", "1 / 0", package="bad-package", version="2.1")
    facts = {fact.name: fact for fact in inspect_machine()}
    assert facts["mechanism our_mechanism"].state == "ok" and "outside 1.0" in facts["mechanism our_mechanism"].found
    broken = facts["mechanism broken"]
    assert broken.state == "absent" and "bad-package 2.1" in broken.use and "ZeroDivisionError" in broken.use


def test_schemas_without_external_packages_have_the_built_in_types_and_with_them_theirs(install, mechanism_source):
    before = schema_of("spec")
    install("our_mechanism", mechanism_source("our_mechanism"))
    assert "our_mechanism" not in str(before) and "our_mechanism" in str(schema_of("spec"))
