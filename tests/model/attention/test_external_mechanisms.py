"""Mechanisms that other packages register: found by name, imported only when named, refused with a reason."""

import json
import sys
from importlib import metadata
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from headway.model.attention import external
from headway.model.attention.external import MechanismError, provenance
from headway.model.attention.registry import EXTERNALS, MECHANISMS, AnyMechanism

ADAPTER = TypeAdapter(AnyMechanism)
SHAPE = {"heads": 8, "kv_heads": 2, "head_dim": 16}
GQA = {"type": "gqa", **SHAPE}
OURS = {"type": "ours", **SHAPE}


class Holder(BaseModel):
    attention: AnyMechanism


def refusal(fields):
    with pytest.raises(ValidationError) as caught:
        ADAPTER.validate_python(fields)
    (error,) = caught.value.errors()
    return error


def test_a_registered_mechanism_is_a_type_like_any_other(install, mechanism_source):
    install("ours", mechanism_source("ours"))
    config = ADAPTER.validate_python({**OURS, "gain": 2.0})
    assert type(config).__module__ == "outside" and config.type == "ours"
    assert config.num_params(width=32) == ADAPTER.validate_python(GQA).num_params(width=32)
    held = Holder(attention=config)
    assert held.attention is config
    assert held.model_dump()["attention"] == config.model_dump()
    assert held.model_dump(exclude_unset=True)["attention"] == {**OURS, "gain": 2.0}
    assert Holder.model_validate_json(held.model_dump_json()) == held


def test_errors_in_its_fields_stand_where_those_of_built_in_types_stand(install, mechanism_source):
    install("ours", mechanism_source("ours"))
    assert refusal({**OURS, "kv_heads": 0})["loc"] == ("ours", "kv_heads")
    assert refusal({**GQA, "kv_heads": 0})["loc"] == ("gqa", "kv_heads")
    assert refusal({**OURS, "kv_head": 1})["type"] == "extra_forbidden"


@pytest.mark.parametrize("name", MECHANISMS)
def test_built_in_configs_are_written_as_by_their_own_class(name, mechanisms):
    for config in (c for c in mechanisms.values() if c.type == name):
        choices: list[dict[str, Any]] = [{}, {"mode": "json"}, {"exclude_unset": True}, {"exclude_defaults": True}]
        for options in choices:
            assert Holder(attention=config).model_dump(**options)["attention"] == config.model_dump(**options)


def test_a_package_is_imported_once_and_only_when_a_spec_names_it(install, mechanism_source, tmp_path):
    log = tmp_path / "imports"
    install("ours", mechanism_source("ours", f"open({str(log)!r}, 'a').write('x')"))
    ADAPTER.validate_python(GQA)
    with pytest.raises(ValidationError):
        ADAPTER.validate_python({**GQA, "type": "unknown"})
    assert EXTERNALS.names() == ["ours"] and not log.exists()
    for _ in range(2):
        ADAPTER.validate_python(OURS)
    assert log.read_text() == "x"


def test_metadata_is_read_once_and_not_for_built_in_types(monkeypatch):
    calls = []
    real = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **by: calls.append(by) or real(**by))
    external.registered.cache_clear()
    for fields in (GQA, GQA):
        ADAPTER.validate_python(fields)
    assert calls == []
    for _ in range(3):
        with pytest.raises(ValidationError):
            ADAPTER.validate_python({**GQA, "type": "unknown"})
    assert calls == [{"group": "headway.mechanisms"}]


@pytest.mark.parametrize("source", ["import no_such_module", "raise SystemExit('gone')", "x = 1 +", "1 / 0"])
def test_a_package_that_cannot_be_imported_is_named_and_breaks_no_other_type(install, source):
    install("ours", source, package="bad-package", version="2.1")
    assert ADAPTER.validate_python(GQA).type == "gqa"
    for _ in range(2):
        message = refusal(OURS)["msg"]
        assert "bad-package 2.1 registers ours as bad_package:Config" in message
        assert "cannot be imported" in message and "repair or update" in message
    assert set(EXTERNALS.problems()) == {"ours"} and EXTERNALS.find("ours") is None


def test_a_name_that_is_built_in_stays_the_built_in_one(install, mechanism_source, tmp_path):
    log = tmp_path / "imports"
    install("gqa", mechanism_source("gqa", f"open({str(log)!r}, 'a').write('x')"))
    assert type(ADAPTER.validate_python(GQA)) is MECHANISMS["gqa"]
    assert EXTERNALS.names() == [] and not log.exists()
    assert "outside 1.0 registers gqa, which is built in" in EXTERNALS.problems()["gqa"]


def test_a_name_that_two_packages_register_is_refused_with_both(install, mechanism_source):
    install("ours", mechanism_source("ours"), package="first")
    install("ours", mechanism_source("ours"), package="second", version="3.0")
    message = refusal(OURS)["msg"]
    assert "first 1.0" in message and "second 3.0" in message and "uninstall all but one" in message
    assert "first" not in sys.modules and "second" not in sys.modules


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("outside:Nothing", "cannot be imported"),
        ("outside:Literal", "no subclass"),
        ("outside:GroupedConfig", "does not declare"),
        ("outside:Other", 'does not declare `type: Literal["ours"] = "ours"`'),
        ("outside:Unfinished", "does not define groups"),
    ],
)
def test_what_is_no_config_of_that_name_is_refused(install, mechanism_source, value, reason):
    more = """
class Other(Config):
    type: Literal["other"] = "other"


class Unfinished(GroupedConfig):
    type: Literal["ours"] = "ours"
"""
    install("ours", mechanism_source("ours", more), value=value)
    assert reason in refusal(OURS)["msg"]


def test_the_schema_for_editors_has_what_can_be_imported(install, mechanism_source):
    before = ADAPTER.json_schema()
    install("ours", mechanism_source("ours"))
    install("broken", "1 / 0", package="broken")
    found = ADAPTER.json_schema()
    (ours,) = [arm for arm in found["oneOf"] if arm not in before["oneOf"]]
    assert ours["properties"]["type"]["const"] == "ours" and "gain" in ours["properties"]
    assert len(before["oneOf"]) == len(MECHANISMS) and ours["additionalProperties"] is False
    json.dumps(found)


def test_where_a_mechanism_comes_from_is_version_and_sources(install, mechanism_source):
    assert provenance(ADAPTER.validate_python(GQA)) == {}
    file = install("ours", mechanism_source("ours"), version="1.5")
    config = ADAPTER.validate_python(OURS)
    found = provenance(config)
    assert found["name"] == "ours" and found["package"] == "outside 1.5" and len(found["sources"]) == 16
    assert provenance(config) == found
    with file.open("a") as f:
        f.write("# edited\n")
    edited = provenance(config)
    assert edited["sources"] != found["sources"] and edited["package"] == found["package"]


def test_sources_of_a_package_are_all_its_modules(install, mechanism_source):
    file = install("ours", "", value="outside_package.inner:Config")
    folder = file.parent / "outside_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "inner.py").write_text(mechanism_source("ours"))
    (folder / "kernel.py").write_text("x = 1\n")
    try:
        config = ADAPTER.validate_python(OURS)
        found = provenance(config)["sources"]
        (folder / "kernel.py").write_text("x = 2\n")
        assert provenance(config)["sources"] != found
    finally:
        for name in [name for name in sys.modules if name.startswith("outside_package")]:
            del sys.modules[name]


def test_an_error_of_registration_ends_the_command_as_a_mistake_in_the_spec():
    assert MechanismError.exit_code == 64
