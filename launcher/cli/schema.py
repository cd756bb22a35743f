"""JSON Schema of the YAML files, for completion and checking in editors."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError

DRAFT = "https://json-schema.org/draft/2020-12/schema"

KINDS = {
    "spec": ("headway.launcher.spec.spec", "Spec"),
    "corpus": ("headway.data.corpus.config", "CorpusConfig"),
    "study": ("headway.launcher.study.config", "StudyConfig"),
    "probe": ("headway.launcher.study.probe_config", "ProbeConfig"),
}


def schema_of(kind: str = "spec") -> dict[str, Any]:
    """Schema of one kind of file. It is less strict than the loader, because `base:` may supply missing keys.

    Dotted keys (`attention.type: rgqa`) are accepted; only the loader checks their values. Raises SpecError for an
    unknown kind.
    """
    if kind not in KINDS:
        raise SpecError(f"schema: {kind!r} is not a kind of file; use one of: {', '.join(KINDS)}")
    return model_schema(model_of(kind), title=f"Headway {kind}")


def model_of(kind: str) -> type[BaseModel]:
    """The model of one of `KINDS`."""
    module, name = KINDS[kind]
    return getattr(importlib.import_module(module), name)


def model_schema(root: type[BaseModel], *, title: str) -> dict[str, Any]:
    """Schema of the files that `load_spec(..., root=root)` reads."""
    schema = root.model_json_schema()
    inherits = "base" not in root.model_fields
    _loosen(schema, schema.get("$defs", {}), inherits)
    if inherits:
        base = {"type": "string", "description": "file this one starts from, relative to this file; mappings merge"}
        schema["properties"] = {"base": base, **schema["properties"]}
    return {"$schema": DRAFT, **schema, "title": title}


def write_schema(path: Path | None = None, kind: str = "spec") -> int:
    """Write one schema to a file, all of them (`KIND.schema.json`) into a folder, or one to stdout if `path` is None.

    Returns the exit status 0. Raises SpecError if the path cannot be written, or is neither a folder nor a .json
    file: a file of another kind is never overwritten.
    """
    if path is None:
        sys.stdout.write(_text(schema_of(kind)))
        return 0
    if not path.is_dir() and path.suffix != ".json":
        raise SpecError(
            f"{path}: neither a folder that exists nor the name of a .json file; run `mkdir {path}` first for the "
            f"schemas of all kinds, or name a file, such as {path.with_suffix('.json') if path.name else 'spec.json'}"
        )
    files = {path / f"{each}.schema.json": each for each in KINDS} if path.is_dir() else {path: kind}
    for file, each in files.items():
        text = _text(schema_of(each))
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise SpecError(f"{file}: cannot be written: {reason}; name a file in a folder that exists") from None
        console.note(f"written: {file}")
    return 0


def _text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _loosen(schema: Any, definitions: dict[str, Any], inherits: bool) -> None:
    if isinstance(schema, list):
        for item in schema:
            _loosen(item, definitions, inherits)
    if not isinstance(schema, dict):
        return
    for item in schema.values():
        _loosen(item, definitions, inherits)
    if "oneOf" in schema and "discriminator" in schema:
        # a section that inherits its `type` matches several variants, which oneOf rejects
        schema["anyOf"] = schema.pop("oneOf")
        del schema["discriminator"]  # an OpenAPI keyword; editors that support it require the key
    if isinstance(schema.get("properties"), dict):
        if inherits:
            schema.pop("required", None)
        sections = [name for name, item in schema["properties"].items() if _has_keys(item, definitions)]
        if sections:
            schema["patternProperties"] = {rf"^({'|'.join(sections)})\..+": {}}


def _has_keys(schema: dict[str, Any], definitions: dict[str, Any]) -> bool:
    if "$ref" in schema:
        return _has_keys(definitions.get(schema["$ref"].rpartition("/")[2], {}), definitions)
    if schema.get("type") == "object" or "properties" in schema:
        return True
    return any(_has_keys(arm, definitions) for key in ("anyOf", "oneOf", "allOf") for arm in schema.get(key, ()))
