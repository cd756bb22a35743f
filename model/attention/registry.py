"""Registry of the attention mechanisms by name: the files in this folder, and other installed packages.

A built-in mechanism is a file in this folder with a config class whose `type` has its name for a default; nothing else
names it in code. Other packages register theirs by entry points (`headway.model.attention.external`). A config of type
`AnyMechanism` accepts both under their names; `headway.model.mixed.AnyAttention` also accepts several in one model.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidatorFunctionWrapHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, SchemaValidator, core_schema

from headway.model.attention.external import GROUP, Externals, MechanismError
from headway.model.base import AttentionConfig


def _built_in() -> dict[str, type[AttentionConfig]]:
    """Name -> config class of every mechanism in this folder, sorted by name."""
    found: dict[str, type[AttentionConfig]] = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        module = f"{__package__}.{file.stem}"
        if module == __name__ or file.stem == "__init__":
            continue
        for cls in vars(importlib.import_module(module)).values():
            if not (isinstance(cls, type) and issubclass(cls, AttentionConfig) and cls.__module__ == module):
                continue
            name = cls.model_fields["type"].default
            if isinstance(name, str):  # else a base class of mechanisms
                assert name not in found, f"{module} and {found[name].__module__} have the same type {name}"
                found[name] = cls
    return dict(sorted(found.items()))


MECHANISMS = _built_in()
"""The built-in mechanisms. `EXTERNALS` has those of other packages."""

OTHER_TYPES = ("mixed",)
"""Other values of `attention.type`, which packages cannot register either."""

EXTERNALS = Externals([*MECHANISMS, *OTHER_TYPES])


class RegisteredTypes:
    """Beside the union of built-in configs: names of `EXTERNALS` are accepted too, and validated by their own class.

    Whoever reads the annotation finds what is registered by `names` and `find`.
    """

    hint = (
        f"other packages add types by the entry point group {GROUP}, once they are installed into the environment of "
        "this Python (ranks do not get PYTHONPATH); `headway doctor` lists them"
    )

    def names(self) -> list[str]:
        """Registered names, without the import of a package."""
        return EXTERNALS.names()

    def find(self, tag: str) -> type[AttentionConfig] | None:
        """The config class of a registered name; None where there is none that can be used."""
        return EXTERNALS.find(tag)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # Written by the class of the value: the union knows the built-in ones alone.
        by_class = core_schema.simple_ser_schema("any")
        return core_schema.no_info_wrap_validator_function(_validate, handler(source), serialization=by_class)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler(schema)
        for name in EXTERNALS.names():
            if (config := EXTERNALS.find(name)) is not None:
                found["oneOf"].append(handler(config.__pydantic_core_schema__))
        return found


def _validate(value: Any, built_in: ValidatorFunctionWrapHandler) -> Any:
    name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if not isinstance(name, str) or name in MECHANISMS or name not in EXTERNALS.names():
        return built_in(value)
    try:
        validator = _validator(name)
    except MechanismError as error:
        raise MechanismError(f"type: {error}") from error
    return validator.validate_python(value)


@cache
def _validator(name: str) -> SchemaValidator:
    """A union of one, so that the location of an error has the type in it, as that of the built-in ones has."""
    config = EXTERNALS.load(name)
    config.model_rebuild()
    return SchemaValidator(core_schema.tagged_union_schema({name: config.__pydantic_core_schema__}, "type"))


if TYPE_CHECKING:
    AnyMechanism = Annotated[AttentionConfig, Field(discriminator="type")]
else:
    AnyMechanism = Annotated[Union[tuple(MECHANISMS.values())], Field(discriminator="type"), RegisteredTypes()]  # noqa: UP007

__all__ = ["EXTERNALS", "GROUP", "MECHANISMS", "OTHER_TYPES", "AnyMechanism", "MechanismError", "RegisteredTypes"]
