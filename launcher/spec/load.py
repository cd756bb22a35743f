"""Load a validated spec from a YAML file and arguments, with the origin of each value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from pydantic import BaseModel

from headway.launcher.base.errors import SpecError
from headway.launcher.spec.auto import MICRO_BATCH, refuse, replaced
from headway.launcher.spec.check import validate
from headway.launcher.spec.fields import AUTO, Shape, root_shape
from headway.launcher.spec.merge import extra_layer, format_value, merge, override_layer, read_layers
from headway.launcher.spec.yamlio import Node

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

__all__ = ["Loaded", "Origin", "format_config", "load_mapping", "load_spec", "validate"]

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Origin:
    """Origin of a value: `yaml/base/tiny.yaml:12`, `argument 'train.tokens=1e6'` or `default`."""

    text: str

    def __str__(self) -> str:
        return self.text


DEFAULT = Origin("default")


@dataclass(frozen=True)
class Loaded(Generic[M]):
    """A validated model and its provenance. `origins` contains every dotted key of `format_config`."""

    spec: M
    origins: dict[str, Origin]
    notes: list[str]  # inherited keys that were dropped because `type` changed
    tree: Node
    auto: frozenset[str] = frozenset()  # dotted keys that are `auto`; the spec has the smallest legal value there


NO_AUTO = "is for `headway train`, which measures before it starts; this command needs a number"
"""Reason why most commands reject `auto`."""

Layer = tuple[Mapping[str, Any] | Node, str]  # values (keys may be dotted) and their origin


@overload
def load_spec(
    path: Path | str, overrides: Sequence[str] = (), *, extra: Sequence[Layer] = (), no_auto: str | None = ...
) -> Loaded[Spec]: ...
@overload
def load_spec(
    path: Path | str, overrides: Sequence[str] = (), *, root: type[M], extra: Sequence[Layer] = ()
) -> Loaded[M]: ...
def load_spec(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    root: type[BaseModel] | None = None,
    extra: Sequence[Layer] = (),
    no_auto: str | None = NO_AUTO,
) -> Loaded[Any]:
    """Read, merge and validate. `root` is the model to construct (default: `headway.launcher.spec.spec.Spec`).

    `no_auto`: reason why the caller needs a number where a spec has `auto`, for the SpecError; None for a caller that
    reads `Loaded.auto`.

    Layers from lowest to highest: the chain of `base:` files, the file, each `(values, origin)` of `extra`, all
    `overrides` together. If the root model has its own field `base`, nothing is inherited.
    Raises NoInputError (66) if the file cannot be read, SpecError (64) with file:line:column for all other errors.
    """
    of_run = root is None
    if root is None:
        from headway.launcher.spec.spec import Spec  # imports torch, so only when a spec is loaded

        root = Spec
    shape = root_shape(root)
    layers = read_layers(Path(path), shape, inherit="base" not in root.model_fields)
    layers += [extra_layer(values, source, shape) for values, source in extra]
    if overrides:
        layers.append(override_layer(overrides, shape))
    tree, notes = _merge_all(layers, shape)
    _refuse_other_kind(tree, root)
    tree, auto = replaced(tree) if of_run else (tree, {})
    spec = validate(tree, root)
    if auto and cast("Spec", spec).model.is_encoder_decoder:
        raise SpecError(
            f"{auto[MICRO_BATCH]}: {MICRO_BATCH}: auto is planned and measured for decoders only; write a number with "
            "model.type encoder_decoder"
        )
    if auto and no_auto is not None:
        refuse(cast("Spec", spec), auto, str(path), no_auto)
    return Loaded(spec=spec, origins=dict(_origins(spec, tree)), notes=notes, tree=tree, auto=frozenset(auto))


def load_mapping(path: Path | str, *, inherit: bool = False) -> Node:
    """The located tree of a file with keys as written, not validated. `inherit` merges it over its `base:` files."""
    free = Shape(values=Shape())
    tree, _ = _merge_all(read_layers(Path(path), None if inherit else free, inherit=inherit), free)
    return tree


def format_config(loaded: Loaded[Any]) -> str:
    """Format all resolved values, including defaults, as `dotted.key = value   # origin`. Dropped keys follow below."""
    rows = [
        (key, AUTO if key in loaded.auto else format_value(value), loaded.origins[key].text)
        for key, value in _leaves(loaded.spec)
    ]
    wide = max((len(key) for key, _, _ in rows), default=0)
    # one very long value (such as a list of paths) must not move all origins off the screen
    value_wide = min(max((len(value) for _, value, _ in rows), default=0), 40)
    lines = [f"{key:<{wide}} = {value:<{value_wide}}  # {origin}" for key, value, origin in rows]
    return "\n".join([*lines, *(f"# {note}" for note in loaded.notes)])


_KINDS = {
    "tasks": ("a set of probe tasks", "headway probe run"),  # before `variants`, which such a file also has
    "model": ("the spec of a run", "headway train"),
    "variants": ("a study", "headway study run"),
    "corpus": ("the spec of a corpus", "headway data build"),
}
"""Key that only one kind of file has -> description of that kind, and the verb for it."""


def _refuse_other_kind(tree: Node, root: type[BaseModel]) -> None:
    """Raise one SpecError for a file of another kind, instead of one error for each unknown key."""
    expected = [kind for key, (kind, _) in _KINDS.items() if key in root.model_fields]
    own = [key for key, node in tree.value.items() if node.at.source == tree.place.source]
    shared = any(key in root.model_fields for key in own if key not in ("name", "seed", "out", "base"))
    if not expected or (shared and ("tasks" not in own or "tasks" in root.model_fields)):
        return
    for key, (kind, verb) in _KINDS.items():
        if key in own:
            raise SpecError(
                f"{tree.value[key].at}: {key}: this file is {kind}, not {expected[0]}; use "
                f"`{verb} {tree.place.source}`, or name {expected[0]}"
            )


def _merge_all(layers: Sequence[Node], shape: Shape) -> tuple[Node, list[str]]:
    notes: list[str] = []
    tree = layers[0]
    for layer in layers[1:]:
        tree = merge(tree, layer, shape, notes)
    # the requested file, for messages about keys that no file contains
    top = next((layer for layer in reversed(layers) if layer.place.line), tree)
    tree.place = top.place
    return tree, notes


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        items = [(name, getattr(value, name)) for name in type(value).model_fields]
    elif isinstance(value, dict) and value:
        items = list(value.items())
    else:
        return [(prefix, _plain(value))]
    return [leaf for name, item in items for leaf in _leaves(item, f"{prefix}.{name}" if prefix else str(name))]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.model_dump() if isinstance(value, BaseModel) else value


def _origins(spec: BaseModel, tree: Node) -> list[tuple[str, Origin]]:
    return [(key, _origin(tree, key)) for key, _ in _leaves(spec)]


def _origin(tree: Node, key: str) -> Origin:
    node, rest = tree, key
    while node.is_mapping:
        # free names may contain dots, so the longest matching key is used
        names = [name for name in node.value if rest == name or rest.startswith(f"{name}.")]
        if not names:
            return DEFAULT
        name = max(names, key=len)
        node, rest = node.value[name], rest[len(name) + 1 :]
        if not rest:
            return Origin(node.at.short)
    return Origin(node.at.short)
