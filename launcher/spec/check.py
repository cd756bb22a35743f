"""Validate a located tree against a pydantic model: returns the model, or raises one error with all problems."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from headway.launcher.base.errors import SpecError, printable
from headway.launcher.spec import advice
from headway.launcher.spec.aliases import Alias, alias
from headway.launcher.spec.fields import Shape, paths, root_shape
from headway.launcher.spec.foreign_values import value_hint
from headway.launcher.spec.merge import tag_of
from headway.launcher.spec.yamlio import MAX_INT, Node, Place

MAX_PROBLEMS = 10
MAX_EXAMINED = 50  # limit for files with thousands of unknown keys: each is compared with all existing keys
_LOCATED = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*): (?=\S)")

M = TypeVar("M", bound=BaseModel)


def validate(tree: Node, root: type[M]) -> M:
    """Validate `tree` and return the model. Lists become tuples; `1e6` becomes an integer for an integer field.

    A float is converted to an integer only if it is exactly integral (`1.5e3` is, `1.5` is not).
    Raises SpecError with one line per problem (at most ten): file:line:column, dotted key, the problem, legal values.
    """
    shape = root_shape(root)
    # problems of the whole spec are reported for the file, not for its first line
    tree = Node(tree.value, tree.place, Place(tree.place.source))
    try:
        return root.model_validate(_data(tree, shape))
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = _problems(details[:MAX_EXAMINED], tree, shape)
    lines = [f"{problem.place}: {problem.text}" for problem in problems]
    if (more := len(lines) - MAX_PROBLEMS + max(0, len(details) - MAX_EXAMINED)) > 0:
        lines[MAX_PROBLEMS:] = [f"and {more} more"]
    raise SpecError("\n".join(lines))


@dataclass(frozen=True)
class _Problem:
    place: Place
    key: str
    text: str
    missing: bool = False
    kind: str = ""


@dataclass(frozen=True)
class _Spot:
    """Position in the tree for a pydantic location: the deepest existing node, and the Shape of the location."""

    node: Node
    exists: bool
    shape: Shape
    key: str
    parent: Node
    parent_shape: Shape

    @property
    def place(self) -> Place:
        return self.node.at


def _data(node: Node, shape: Shape) -> Any:
    if node.is_mapping:
        tag = tag_of(node, shape)
        return {key: _data(item, shape.child(key, tag)) for key, item in node.value.items()}
    if isinstance(node.value, list):
        shapes = shape.places or (shape.items or Shape(),) * len(node.value)
        items = [_data(item, shapes[i] if i < len(shapes) else Shape()) for i, item in enumerate(node.value)]
        return tuple(items) if shape.is_tuple else items
    if isinstance(node.value, float) and int in shape.scalars and float not in shape.scalars:
        return _whole(node)
    if isinstance(node.value, bool) and shape.literals and bool not in shape.scalars:
        return [node.value]  # Literal[1] would accept True, which equals 1; it rejects a list
    return node.value


def _whole(node: Node) -> int | float:
    """Convert an exactly integral float to an integer, based on its text (1e23 as a double is not 10**23)."""
    try:
        written = Decimal(node.text if node.text is not None else repr(node.value))
    except InvalidOperation:
        return node.value
    return int(written) if written == written.to_integral_value() and abs(written) < MAX_INT else node.value


def _problems(errors: Sequence[ErrorDetails], tree: Node, root: Shape) -> list[_Problem]:
    """One problem per dotted key, in the order of the files. Missing keys come last."""
    found: dict[str, _Problem] = {}
    for details in errors:
        problem = _problem(details, tree, root)
        # each arm of a union reports an error for the same value; the message already names all arms
        found.setdefault(problem.key, problem)
    # an arm of another type reports a type error for the whole value; the matching arm reports errors inside the value
    inner = [p for p in found.values() if not (p.kind.endswith("_type") and _looked_into(p.key, found))]
    return sorted(inner, key=lambda p: (p.missing, p.place.source, p.place.line, p.place.column))


def _looked_into(key: str, found: Mapping[str, _Problem]) -> bool:
    return any(other.startswith((f"{key}.", f"{key}[")) for other in found)


def _problem(details: ErrorDetails, tree: Node, root: Shape) -> _Problem:
    kind, location = details["type"], details["loc"]
    if kind == "missing" and isinstance(location[-1], int):
        kind, location = "too_short", location[:-1]  # an element of a tuple
    spot = _spot(location, tree, root)
    context = details.get("ctx", {})
    missing = False
    if kind in ("value_error", "assertion_error"):
        spot, text = _raised(str(context.get("error", details["msg"])), spot)
    elif kind == "extra_forbidden":
        text = _unknown_key(spot, tree, root)
    elif kind in ("missing", "union_tag_not_found"):
        spot, text = _missing(spot, kind)
        missing = True
    elif kind == "union_tag_invalid":
        tag = spot.node.value[spot.shape.discriminator] if spot.node.is_mapping else spot.node
        spot = _below(spot, spot.shape.discriminator)
        shape = spot.parent_shape
        text = advice.not_one_of(tag.value, shape.tags(), "type", value_hint(spot.key, tag.value))
        text += f"; {shape.registered.hint}" if shape.registered is not None else ""
    elif spot.key.startswith("launch.env."):
        text = "expected text or null; the value is not shown, because it may be a secret"
    elif spot.key == "launch.env":
        text = "expected variables with a value or null each, as {NCCL_DEBUG: INFO}; the value is not shown"
    else:
        hint = value_hint(spot.key, spot.node.value)
        text = advice.wrong_value(kind, details["msg"], context, spot.node, spot.shape, _field(spot), hint)
    where = f"{printable(spot.key, 200)}: " if spot.key else ""
    return _Problem(spot.place, spot.key, f"{where}{text}", missing, kind)


def _spot(location: tuple[int | str, ...], tree: Node, root: Shape) -> _Spot:
    spot = _Spot(tree, True, root, "", tree, root)
    passed_tag = False
    for element in location:
        if spot.shape.variants and not passed_tag:
            passed_tag = True  # pydantic includes the selected tag in the location
            continue
        if isinstance(element, str) and not (spot.shape.has_keys or spot.shape.values is not None):
            continue  # the name of an arm of a union
        if isinstance(element, str) and spot.node.is_mapping and "[" in element and element not in spot.node.value:
            continue  # the same, such as `tagged-union[...]` or `function-after[...]`
        if isinstance(element, str) and spot.shape.model is not None and not _names(element, spot):
            continue  # the same, if one arm is a mapping with its own keys
        spot = _below(spot, element)
        passed_tag = False
    return spot


def _names(element: str, spot: _Spot) -> bool:
    """Whether `element` is a legal key at this spot or a key that was written there."""
    legal = spot.shape.keys()
    return element in legal or (spot.node.is_mapping and element in spot.node.value)


def _below(spot: _Spot, element: int | str) -> _Spot:
    node, shape = spot.node, spot.shape
    if isinstance(element, int):
        inner = shape.places[element] if element < len(shape.places) else shape.items or Shape()
        items = node.value if isinstance(node.value, list) else []
        child = items[element] if spot.exists and element < len(items) else None
        key = f"{spot.key}[{element}]"
    else:
        inner = shape.child(element, tag_of(node, shape))
        child = node.value.get(element) if spot.exists and node.is_mapping else None
        key = f"{spot.key}.{element}" if spot.key else element
    parent = node if spot.exists else spot.parent
    return _Spot(child or node, child is not None, inner, key, parent, shape)


def _field(spot: _Spot) -> Any:
    """The pydantic FieldInfo of a spot, if there is one."""
    model = spot.parent_shape.known_model(tag_of(spot.parent, spot.parent_shape))
    return model.model_fields.get(spot.key.rpartition(".")[2]) if model else None


def _raised(message: str, spot: _Spot) -> tuple[_Spot, str]:
    """Locate the message of a validator: a leading `field: ...` or `a.b: ...` is looked up among the fields."""
    match = _LOCATED.match(message)
    if not match:
        return spot, message
    parts = match[1].split(".")
    inner = spot
    for part in parts:
        if part not in inner.shape.keys(tag_of(inner.node, inner.shape)):
            return spot, message
        inner = _below(inner, part)
    return inner, message[match.end() :]


def _missing(spot: _Spot, kind: str) -> tuple[_Spot, str]:
    if kind == "union_tag_not_found":
        names = spot.shape.tags()
        return _below(spot, spot.shape.discriminator), f"is missing; write one of: {', '.join(names)}"
    info = _field(spot)
    text = "is missing and has no default"
    if spot.shape.has_keys and not spot.shape.scalars:
        tag = f"; {spot.key}.{spot.shape.discriminator} is one of: {', '.join(spot.shape.tags())}"
        text += tag if spot.shape.variants else f"; its keys are: {', '.join(spot.shape.keys())}"
    else:
        expected = advice.expected(spot.shape, info)
        text += f"; write {expected}" if expected else ""
        text += f": {info.description}" if info is not None and info.description else ""
    return spot, text


def _unknown_key(spot: _Spot, tree: Node, root: Shape) -> str:
    name = spot.key.rpartition(".")[2] if "." in spot.key else spot.key
    prefix = spot.key.removesuffix(name)
    tag = tag_of(spot.parent, spot.parent_shape)
    legal = spot.parent_shape.keys(tag)
    owners = [t for t, model in spot.parent_shape.variants.items() if name in model.model_fields and t != tag]
    entries = list(_foreign(spot, tree, root)) if "train.tokens" in paths(root, {}) else []
    if owners:
        text = f"is no key of {prefix}{spot.parent_shape.discriminator} {tag}, only of: {', '.join(owners)}."
        text += f" Did you mean {prefix}{near[0]}?" if (near := advice.closest(name, legal, 0.9)) else ""
    elif entries:
        return " ".join(["unknown key.", *entries])
    elif not advice.closest(name, legal) and (near := advice.closest(name, spot.parent_shape.keys(), 0.8)):
        owners = [t for t, model in spot.parent_shape.variants.items() if near[0] in model.model_fields]
        kind = f"{prefix}{spot.parent_shape.discriminator}"
        text = f"unknown key. Did you mean {prefix}{near[0]}, which only exists for {kind}: {', '.join(owners)}?"
    else:
        close = advice.closest_key(name, prefix, legal, list(paths(root, _tags(tree, root))))
        text = "unknown key." + (f" Did you mean {' or '.join(close)}?" if close else "")
    return f"{text} Legal keys here: {', '.join(legal)}"


def _foreign(spot: _Spot, tree: Node, root: Shape) -> Iterator[str]:
    """Messages for a key of another tool, or for each key in a section that only other tools have."""
    if (entry := alias(spot.key)) is not None:
        yield _our_key(entry, spot.node, tree)
    elif spot.node.is_mapping:
        known = list(paths(root, _tags(tree, root)))
        keys = list(_scalars(spot.node, spot.key))[:MAX_PROBLEMS]
        near = advice.closest(spot.key, spot.parent_shape.keys())
        if near and all(near[0] + key.removeprefix(spot.key) in known for key, _ in keys):
            return  # the section name is misspelt, but its contents are legal
        for key, node in keys:
            if (entry := alias(key)) is not None:
                yield f"{printable(key)}: {_our_key(entry, node, tree)}"
            elif close := advice.closest_key(key.rpartition(".")[2], "", [], known):
                yield f"{printable(key)}: did you mean {' or '.join(close)}?"


def _our_key(entry: Alias, node: Node, tree: Node) -> str:
    """The sentence for one entry, with the value to write if the spec contains everything needed to compute it."""
    if not entry.hint:
        return f"Did you mean {entry.keys[0]}?"
    nodes = [node, *(_node_at(tree, key) for key in entry.times)]
    factors = [_whole(item) if type(item.value) is float else item.value for item in nodes]
    # a share is below 1 and a step count is an integer: in other tools `save_steps: 0.1` may mean a tenth of the run
    right = isinstance(factors[0], float) if entry.times == ("train.tokens",) else isinstance(factors[0], int)
    if not entry.times or not right or not all(type(factor) in (int, float) and factor > 0 for factor in factors):
        return entry.hint
    product = math.prod(Decimal(str(factor)) for factor in factors)
    return f"{entry.hint} Here {' x '.join(map(str, factors))}: {entry.keys[0]}={round(product)}."


def _node_at(tree: Node, key: str) -> Node:
    """The node of a dotted key, or an empty node."""
    for part in key.split("."):
        tree = tree.value.get(part, Node(None, tree.place)) if tree.is_mapping else Node(None, tree.place)
    return tree


def _scalars(node: Node, key: str) -> Iterator[tuple[str, Node]]:
    """Dotted keys and nodes below a mapping that are not mappings themselves."""
    for name, item in node.value.items():
        yield from _scalars(item, f"{key}.{name}") if item.is_mapping else [(f"{key}.{name}", item)]


def _tags(node: Node, shape: Shape, prefix: str = "") -> dict[str, str]:
    """Value of the discriminator at every dotted key that has one."""
    if not node.is_mapping:
        return {}
    tag = tag_of(node, shape)
    found = {prefix: tag} if tag is not None else {}
    for key, item in node.value.items():
        found |= _tags(item, shape.child(key, tag), f"{prefix}.{key}" if prefix else key)
    return found
