"""Legal keys and values at each place of a spec, read from the annotations of a pydantic model without any values.

The loader needs this for information that validation does not provide: which keys belong to which `type`, where a
misplaced key belongs, which default a missing key has, and whether `1e6` may be an integer.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin, runtime_checkable

from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.fields import FieldInfo

AUTO = "auto"
"""The word for a value that Headway determines itself."""

_MAX_DEPTH = 8  # maximum depth of listed paths; a mechanism may contain mechanisms


@dataclass(frozen=True)
class Word:
    """Annotation of a field: a word that a file may contain instead of a value. It is replaced before validation.

    The field therefore keeps a single type in code, and editors and messages know the word.
    """

    text: str

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"const": self.text, "type": "string"}]}


@runtime_checkable
class Registered(Protocol):
    """Annotation of a union of models: models from installed packages, known by name before they are imported."""

    @property
    def hint(self) -> str: ...  # source of types that are not in the list
    def names(self) -> list[str]: ...
    def find(self, tag: str) -> type[BaseModel] | None: ...


@dataclass(frozen=True)
class Shape:
    """Legal values at one place. An empty Shape allows any value."""

    scalars: frozenset[type] = frozenset()
    literals: tuple[Any, ...] = ()
    words: tuple[str, ...] = ()  # words that may replace a value, see `Word`
    model: type[BaseModel] | None = None
    variants: Mapping[str, type[BaseModel]] = field(default_factory=dict)  # value of `discriminator` -> model
    registered: Registered | None = None  # further variants, from installed packages
    discriminator: str = "type"
    default_tag: str | None = None  # variant of a mapping without a discriminator, that of the field's default
    items: Shape | None = None  # elements of a list, or of a tuple with one element type
    places: tuple[Shape, ...] = ()  # elements of a tuple of fixed length
    is_tuple: bool = False
    values: Shape | None = None  # values of a mapping with free keys
    nullable: bool = False

    @property
    def has_keys(self) -> bool:
        return self.model is not None or bool(self.variants)

    def known_model(self, tag: Any) -> type[BaseModel] | None:
        """The model of a mapping whose discriminator has the value `tag`."""
        if not self.variants or not isinstance(tag, str):
            return self.model
        known = self.variants.get(tag)
        return self.registered.find(tag) if known is None and self.registered is not None else known

    def tags(self) -> list[str]:
        """Legal values of the discriminator."""
        return [*self.variants, *(self.registered.names() if self.registered is not None else ())]

    def child(self, key: str, tag: Any = None) -> Shape:
        """Shape of `key`. If `tag` is unknown, the shape of that key in any variant that has it."""
        if self.values is not None:
            return self.values
        known = self.known_model(tag)
        for model in [known] if known else self.variants.values():
            if model is not None and key in model.model_fields:
                return field_shape(model.model_fields[key])
        return Shape()

    def keys(self, tag: Any = None) -> list[str]:
        """Legal keys. If `tag` is unknown, the keys of all variants."""
        known = self.known_model(tag)
        models = [known] if known else list(self.variants.values())
        return list(dict.fromkeys(key for model in models for key in model.model_fields))


def root_shape(root: type[BaseModel]) -> Shape:
    return Shape(model=root)


def field_shape(info: FieldInfo) -> Shape:
    discriminator = info.discriminator if isinstance(info.discriminator, str) else None
    shape = _shape(info.annotation, discriminator)
    words = tuple(item.text for item in info.metadata if isinstance(item, Word))
    shape = replace(shape, words=words) if words else shape
    if shape.variants and isinstance(info.default, BaseModel):
        shape = replace(shape, default_tag=getattr(info.default, shape.discriminator))
    return _with_registered(shape, info.metadata)


def paths(shape: Shape, tag_at: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[str]:
    """All dotted keys of a spec. `tag_at`: dotted key -> selected variant; without an entry all variants are listed."""
    if depth > _MAX_DEPTH or not shape.has_keys:
        return
    tag = tag_at.get(prefix.removesuffix("."))
    for key in shape.keys(tag):
        yield prefix + key
        yield from paths(shape.child(key, tag), tag_at, f"{prefix}{key}.", depth + 1)


def _shape(annotation: Any, discriminator: str | None = None) -> Shape:
    origin = get_origin(annotation)
    if isinstance(annotation, getattr(typing, "TypeAliasType", ())):
        return _shape(annotation.__value__, discriminator)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        found = [m.discriminator for m in metadata if isinstance(getattr(m, "discriminator", None), str)]
        return _with_registered(_shape(inner, found[0] if found else discriminator), metadata)
    if origin in (Union, types.UnionType):
        return _union([_shape(arm, discriminator) for arm in get_args(annotation)], discriminator)
    if origin is Literal:
        return Shape(literals=get_args(annotation), scalars=frozenset(type(v) for v in get_args(annotation)))
    if annotation is None or annotation is type(None):
        return Shape(nullable=True)
    if origin is list or annotation is list:
        return Shape(items=_shape(*get_args(annotation)) if get_args(annotation) else Shape())
    if origin is tuple or annotation is tuple:
        return _tuple(get_args(annotation))
    if origin in (dict, Mapping) or annotation is dict:
        return Shape(values=_shape(get_args(annotation)[1]) if get_args(annotation) else Shape())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Shape(model=annotation)
    if annotation in (int, float, bool, str):
        return Shape(scalars=frozenset([annotation]))
    return Shape()


def _with_registered(shape: Shape, metadata: Iterable[Any]) -> Shape:
    found = next((item for item in metadata if isinstance(item, Registered)), None)
    return shape if found is None else replace(shape, registered=found)


def _tuple(arguments: tuple[Any, ...]) -> Shape:
    if not arguments:
        return Shape(items=Shape(), is_tuple=True)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return Shape(items=_shape(arguments[0]), is_tuple=True)
    return Shape(places=tuple(_shape(argument) for argument in arguments), is_tuple=True)


def _union(arms: list[Shape], discriminator: str | None) -> Shape:
    """Combine the arms of a union. A discriminator selects among several models; without one, the first is used."""
    models = [arm.model for arm in arms if arm.model is not None]
    variants = {tag: model for arm in arms for tag, model in arm.variants.items()}
    discriminator = discriminator or next((arm.discriminator for arm in arms if arm.variants), "type")
    if len(models) > 1 or variants:
        for model in models:
            info = model.model_fields.get(discriminator)
            variants |= {str(tag): model for tag in (_shape(info.annotation).literals if info else ())}
    return Shape(
        scalars=frozenset(kind for arm in arms for kind in arm.scalars),
        literals=tuple(value for arm in arms for value in arm.literals),
        model=models[0] if models and not variants else None,
        variants=variants,
        registered=next((arm.registered for arm in arms if arm.registered is not None), None),
        discriminator=discriminator,
        items=next((arm.items for arm in arms if arm.items is not None), None),
        places=next((arm.places for arm in arms if arm.places), ()),
        is_tuple=any(arm.is_tuple for arm in arms),
        values=next((arm.values for arm in arms if arm.values is not None), None),
        nullable=any(arm.nullable for arm in arms),
    )
