"""The JSON Schema that editors get accepts what the loader accepts and marks wrong keys and values."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from headway.launcher.base.errors import SpecError
from headway.launcher.cli.schema import KINDS, schema_of, write_schema
from headway.launcher.match.matching import MatchConfig
from headway.launcher.spec.yamlio import load_yaml, parse_yaml

ROOT = Path(__file__).resolve().parents[3]
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def fits(value: Any, schema: dict[str, Any], whole: dict[str, Any]) -> bool:
    """The part of JSON Schema that our schemas use, as an editor applies it."""
    if "$ref" in schema:
        schema = {
            **whole["$defs"][schema["$ref"].rpartition("/")[2]],
            **{k: v for k, v in schema.items() if k != "$ref"},
        }
    if "anyOf" in schema and not any(fits(value, arm, whole) for arm in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(fits(value, arm, whole) for arm in schema["oneOf"]) != 1:
        return False
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match schema.get("type"):
        case "integer" if not (number and float(value).is_integer()):
            return False
        case "number" if not number:
            return False
        case str(name) if name in TYPES and not isinstance(value, TYPES[name]):
            return False
    if number and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return False
    if number and not schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf):
        return False
    return not isinstance(value, dict) or all(_key_fits(key, item, schema, whole) for key, item in value.items())


def _key_fits(key: str, item: Any, schema: dict[str, Any], whole: dict[str, Any]) -> bool:
    if key in schema.get("properties", {}):
        return fits(item, schema["properties"][key], whole)
    if any(re.search(pattern, key) for pattern in schema.get("patternProperties", {})):
        return True
    return schema.get("additionalProperties", True) is not False


SPEC = schema_of("spec")


def editor_accepts(text: str) -> bool:
    return fits(parse_yaml(text, "x.yaml").plain(), SPEC, SPEC)


SHIPPED = sorted((ROOT / "yaml").rglob("*.yaml"))
BY_KEY = {"tasks": "probe", "variants": "study", "corpus": "corpus"}
"""Key that only files of a kind have -> the kind."""


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_shipped_file_fits_the_schema_of_its_kind(file: Path) -> None:
    plain = load_yaml(file).plain()
    kind = next((kind for key, kind in BY_KEY.items() if key in plain), "spec")
    schema = schema_of(kind)
    assert fits(plain, schema, schema)


@pytest.mark.parametrize(
    ("tolerance", "right"),
    [
        *[("0.25%", True), (" 1 %", True), (".5%", True), (0.0025, True), (0, True)],
        *[("soon", False), ("%", False), ("1", False), (1, False), (-0.1, False), ("-1%", False)],
    ],
)
def test_editors_and_the_loader_accept_the_same_tolerances(tolerance: object, right: bool) -> None:
    schema = schema_of("study")
    study = {"study": "x", "base": "y", "seeds": [1], "variants": {"a": {}, "b": {}}, "match": {"tolerance": tolerance}}
    assert fits(study, schema, schema) == right
    if right:
        MatchConfig.model_validate({"tolerance": tolerance})
    else:
        with pytest.raises(ValueError, match="tolerance"):
            MatchConfig.model_validate({"tolerance": tolerance})


@pytest.mark.parametrize(
    "text",
    [
        "base: tiny.yaml",
        "base: tiny.yaml\nattention: {head_dim: 16}",
        "attention.type: rgqa\ntrain.tokens: 1e6",
        "data.source.type: mds",
        "data: {source.type: mds}",
        "train: {tokens: 1e6}",
        "run_dir: ~",
    ],
)
def test_partial_and_dotted_specs_are_not_marked(text: str) -> None:
    assert editor_accepts(text)


@pytest.mark.parametrize(
    "text",
    [
        "atention: {type: gqa}",
        "attention: {topk: 1}",
        "attention: {type: rqga}",
        "train: {tokens: soon}",
        "train: {tokens: 1.5}",
        "optimizer: {lr: 0}",
        "parallel: {zero: 4}",
        "trian.tokens: 1",
        "base: 3",
    ],
)
def test_wrong_keys_and_values_are_marked(text: str) -> None:
    assert not editor_accepts(text)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_has_a_schema_that_forbids_unknown_keys(kind: str) -> None:
    schema = schema_of(kind)
    assert schema["additionalProperties"] is False
    assert ("base" in schema["properties"]) and schema["$schema"].startswith("https://json-schema.org/")
    assert (kind in ("study", "probe")) == ("required" in schema)  # these inherit nothing: they must be complete


def test_schemas_are_written_to_a_file_a_folder_or_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_schema(tmp_path / "one.json")
    write_schema(tmp_path)
    write_schema()
    assert json.loads((tmp_path / "one.json").read_text()) == SPEC
    assert {file.name for file in tmp_path.glob("*.schema.json")} == {f"{kind}.schema.json" for kind in KINDS}
    assert json.loads(capsys.readouterr().out) == SPEC


def test_wrong_places_and_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="a folder that exists"):
        write_schema(tmp_path / "absent" / "x.json")
    (tmp_path / "mine.yaml").write_text("name: mine")
    for name in ("FOLDER", "mine.yaml", "x.schema"):
        with pytest.raises(SpecError, match=r"neither a folder that exists nor .*\.json file; run `mkdir "):
            write_schema(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "name: mine"
    with pytest.raises(SpecError, match="use one of: spec, corpus, study"):
        schema_of("run")
