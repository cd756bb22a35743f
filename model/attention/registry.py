"""The mechanisms by name. A new built-in one is a new file and a name in the union below.

Other installed packages register mechanisms by entry points (`headway.model.attention.external`); a config section of
type `AnyAttention` accepts them under their names.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, get_args

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidatorFunctionWrapHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from headway.model.attention.dynamic import DynamicGqaConfig
from headway.model.attention.external import GROUP, Externals, MechanismError
from headway.model.attention.gqa import GqaConfig, MhaConfig, MqaConfig
from headway.model.attention.gqe import GqeConfig
from headway.model.attention.hybrid import HybridConfig
from headway.model.attention.moa import MoaConfig
from headway.model.attention.moh import MohConfig
from headway.model.attention.rgqa import RgqaConfig
from headway.model.attention.sqa import SqaConfig
from headway.model.attention.switchhead import SwitchHeadConfig
from headway.model.attention.wgqa import WgqaConfig
from headway.model.base import AttentionConfig

_BuiltIn = (
    GqaConfig
    | MhaConfig
    | MqaConfig
    | SqaConfig
    | DynamicGqaConfig
    | GqeConfig
    | HybridConfig
    | MoaConfig
    | MohConfig
    | RgqaConfig
    | SwitchHeadConfig
    | WgqaConfig
)

MECHANISMS: dict[str, type[AttentionConfig]] = {
    config.model_fields["type"].default: config for config in get_args(_BuiltIn)
}
"""The built-in mechanisms. `EXTERNALS` has those of other packages."""

EXTERNALS = Externals(MECHANISMS)


class RegisteredTypes:
    """Beside the union of built-in configs: names of `EXTERNALS` are accepted too, and validated by their own class.

    Whoever reads the annotation finds what is registered by `names` and `find`.
    """

    hint = f"other packages add types by the entry point group {GROUP}; `headway doctor` lists what is installed"

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
                one = handler(config.__pydantic_core_schema__)
                found["oneOf"].append(one)
                found["discriminator"]["mapping"][name] = one["$ref"]
        return found


def _validate(value: Any, built_in: ValidatorFunctionWrapHandler) -> Any:
    name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if not isinstance(name, str) or name in MECHANISMS or name not in EXTERNALS.names():
        return built_in(value)
    try:
        adapter = _adapter(name)
    except MechanismError as error:
        raise MechanismError(f"type: {error}") from error
    return adapter.validate_python(value)


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    """A union with one built-in config, so that errors have the location that they have for all types."""
    return TypeAdapter(Annotated[GqaConfig | EXTERNALS.load(name), Field(discriminator="type")])


AnyAttention = Annotated[_BuiltIn, Field(discriminator="type"), RegisteredTypes()]

__all__ = ["EXTERNALS", "GROUP", "MECHANISMS", "AnyAttention", "MechanismError", "RegisteredTypes"]
