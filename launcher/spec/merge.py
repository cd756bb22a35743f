"""Merge the layers of a spec: base files, the file itself, variants, overrides. The higher layer wins for each key.

Mappings are merged; lists and scalars are replaced. If a layer changes the `type` of a mapping, keys of lower layers
that exist only for the old type are dropped, because they have no meaning for the new type. Keys of the same layer or
a higher one are never dropped.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.launcher.base.errors import SpecError, printable
from headway.launcher.spec.fields import Shape
from headway.launcher.spec.paths import place_paths
from headway.launcher.spec.yamlio import MAX_DEPTH, Node, Place, load_yaml, parse_scalar, parse_yaml, value_node
from headway.parallel.secrecy import SECRET_NAME, secret_form

MAX_BASES = 16
_ENVIRONMENT = re.compile(r"launch\.env[.=]|launch=.*\benv\b", re.DOTALL)
_OF_TRACKERS = re.compile(r"[-+]*(tracking\b|\w*(wandb|mlflow))")
_KEY = r"[A-Za-z_]\w*(?:\.\w+)*"
_PLAIN = re.compile(r"[A-Za-z0-9_./~+]([A-Za-z0-9_./~+@=:<>|-]*[A-Za-z0-9_./~+@=<>|-])?")


def read_layers(path: Path, shape: Shape | None, *, inherit: bool = True) -> list[Node]:
    """Read the file and its base files, lowest layer first, with dotted keys nested.

    With `inherit`, the top-level key `base` names a file relative to the file that contains it. Other relative paths
    are looked up in the working folder and then in the folder of the file (`headway.launcher.spec.paths`).
    Raises NoInputError if `path` itself cannot be read, SpecError for all errors in the content, including a missing
    base and a cycle of bases.
    """
    label, layers, seen = str(path), [], []
    while True:
        node = load_yaml(path, label)
        seen.append((path.resolve(), label))
        base = node.value.pop("base", None) if inherit else None
        layer = nest(node, shape)
        place_paths(layer, path.parent)
        layers.append(layer)
        if base is None:
            return layers[::-1]
        if not isinstance(base.value, str) or not base.value:
            raise SpecError(f"{base.place}: base: expected the name of one YAML file")
        label = os.path.normpath(Path(label).parent / base.value)
        path = path.parent / base.value
        _check_base(path, label, base, seen)


def _check_base(path: Path, label: str, base: Node, seen: list[tuple[Path, str]]) -> None:
    try:
        if not path.is_file():
            raise SpecError(
                f"{base.place}: base: no such file: {printable(base.value)} (looked for "
                f"{printable(str(path.absolute()), 300)}); the name is relative to the file it stands in"
            )
        known = [resolved for resolved, _ in seen]
        if path.resolve() in known:
            ring = [name for _, name in seen[known.index(path.resolve()) :]]
            raise SpecError(f"{base.place}: base: the files are based on each other: {' -> '.join([*ring, label])}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"{base.place}: base: {printable(base.value)}: {reason}") from None
    if len(seen) >= MAX_BASES:
        raise SpecError(f"{base.place}: base: more than {MAX_BASES} files based on each other")


def nest(node: Node, shape: Shape | None, depth: int = 1) -> Node:
    """Convert dotted keys of `node` to nested mappings (`a.b: 1` becomes `a: {b: 1}`).

    Keys of mappings with free names (`dict[str, ...]` fields) are not changed; with `shape` None all keys are
    converted. Raises SpecError if the same key is given in both forms.
    """
    if isinstance(node.value, list):
        items = shape.items if shape is not None and shape.items is not None else Shape()
        return Node([nest(item, items, depth + 1) for item in node.value], node.place, node.key_place)
    if not node.is_mapping:
        return node
    out = Node({}, node.place, node.key_place)
    split = shape is None or shape.has_keys
    for key, item in node.value.items():
        parts = key.split(".") if split else [key]
        if "" in parts and split:
            raise SpecError(f"{item.at}: {printable(key)!r} is not a dotted key; write names with single dots between")
        if depth + len(parts) > MAX_DEPTH:
            raise SpecError(f"{item.at}: nested more than {MAX_DEPTH} levels deep")
        inner = shape
        for part in parts:
            inner = inner.child(part) if inner is not None else None
        _put(out, parts, nest(item, inner, depth + len(parts)), key)
    return out


def _put(target: Node, parts: Sequence[str], node: Node, name: str) -> None:
    *above, last = parts
    for part in above:
        target = target.value.setdefault(part, Node({}, node.at, node.at))
        if not target.is_mapping:
            raise _twice(name, node, target)
    there = target.value.get(last)
    if there is None:
        target.value[last] = node
    elif there.is_mapping and node.is_mapping:
        for key, item in node.value.items():
            _put(there, [key], item, f"{name}.{key}")
    else:
        raise _twice(name, node, there)


def _twice(name: str, node: Node, first: Node) -> SpecError:
    return SpecError(f"{node.at}: {printable(name)}: is given twice; the first one is at {first.at.short}")


def override_layer(overrides: Sequence[str], shape: Shape | None) -> Node:
    """Parse arguments `a.b=value` into one layer. Values are YAML, including `[...]`, `{...}` and quotes."""
    layer = Node({}, Place("arguments"))
    for i, argument in enumerate(overrides):
        key, equals, text = argument.partition("=")
        # The value of an environment variable may be a secret, so messages and origins do not contain it. The same
        # holds for an address with a login or a query.
        secret = _may_be_secret(argument) or (not equals and i and _ENVIRONMENT.match(overrides[i - 1]))
        secret = secret or not set("@?#").isdisjoint(argument.partition("://")[2])
        shown = (f"{key}=..." if equals else "...") if secret else argument
        place = Place(f"argument '{printable(shown, 200)}'")
        if not equals or not key or key != key.strip() or key.startswith("-"):
            right = "" if secret else _right_form(overrides, i)
            raise SpecError(f"{place}: is not KEY=VALUE, such as train.tokens=1e6 or attention.type=gqa{right}")
        if key == "base":
            raise SpecError(f"{place}: `base` can only stand in a file; name the other file instead of this one")
        node = _override_value(text, place)
        node.key_place = place
        nested = nest(Node({key: node}, place), shape)
        for name, item in nested.value.items():
            _put(layer, [name], item, key if not item.is_mapping else name)
    return layer


def _may_be_secret(argument: str) -> bool:
    """Whether the value of an argument must not be shown: a variable of the ranks, or what looks like a secret."""
    key, _, value = argument.partition("=")
    if _ENVIRONMENT.match(argument):
        return True
    return bool(_OF_TRACKERS.match(key) and (SECRET_NAME.search(key) or secret_form(value)))


def _right_form(overrides: Sequence[str], i: int) -> str:
    """Advice on what to write instead of `overrides[i]`, which is not KEY=VALUE, based on the adjacent arguments."""
    argument = overrides[i]
    before = overrides[i - 1] if i else ""
    behind = overrides[i + 1] if i + 1 < len(overrides) else ""
    if argument.startswith("~"):
        return f". A key cannot be deleted; write {printable(argument[1:])}= for null, or take it out of the file"
    if argument.startswith("-") and "=" in argument:
        return f". Write {printable(argument.lstrip('-'))}"
    if pair := re.fullmatch(rf"({_KEY}):\s*([^/\s].*)", argument):
        return f". Write {printable(f'{pair[1]}={pair[2]}')}"
    if re.fullmatch(rf"{_KEY}=", before):
        return f". Write {printable(before + argument)}, without a space behind the sign"
    if re.fullmatch(_KEY, argument) and behind.startswith("="):
        value = behind[1:] or (overrides[i + 2] if i + 2 < len(overrides) else "")
        return f". Write {printable(f'{argument}={value}')}, without a space before the sign"
    if re.fullmatch(_KEY, argument) and behind and "=" not in behind:
        return f". Write {printable(f'{argument}={behind}')}"
    return ""


def _override_value(text: str, place: Place) -> Node:
    if text[:1] in ("[", "{", '"', "'"):
        node = parse_yaml(text, place.source, one_line=True)
    else:
        try:
            text.encode("utf-8")
            node = Node(parse_scalar(text), place, text=text)
        except UnicodeEncodeError:
            raise SpecError(f"{place}: is not UTF-8 text") from None
        except ValueError as error:
            raise SpecError(f"{place}: {error}") from None
    if "\0" in text:
        raise SpecError(f"{place}: the character '\\x00' is not allowed")
    return node


def extra_layer(values: Any, source: str, shape: Shape | None) -> Node:
    """Layer of values from another file or program, such as a variant of a study, with the origin `source`."""
    node = value_node(values, Place(source))
    if not node.is_mapping:
        raise SpecError(f"{source}: expected a mapping from dotted keys to values")
    return nest(node, shape)


def merge(low: Node, high: Node, shape: Shape, notes: list[str], path: str = "") -> Node:
    """Merge `high` over `low`. Keys that are dropped because `high` changes a `type` are recorded in `notes`."""
    if not (low.is_mapping and high.is_mapping):
        return high
    kept = _drop_foreign(low, high, shape, notes, path)
    tag = _written_tag(high, shape) or tag_of(low, shape)
    merged = dict(kept)
    for key, item in high.value.items():
        below = kept.get(key)
        merged[key] = item if below is None else merge(below, item, shape.child(key, tag), notes, f"{path}{key}.")
    # a missing key is reported for a file, even if an argument changed the mapping last
    last = high if high.at.line or not low.at.line else low
    return Node(merged, last.place, last.key_place)


def tag_of(node: Node, shape: Shape) -> str | None:
    """Value of the discriminator in a mapping or its default, if the place has a discriminator."""
    if not shape.variants or not node.is_mapping:
        return None
    return shape.default_tag if shape.discriminator not in node.value else _written_tag(node, shape)


def _written_tag(node: Node, shape: Shape) -> str | None:
    if not shape.variants or not node.is_mapping:
        return None
    tag = node.value.get(shape.discriminator)
    return tag.value if tag is not None and isinstance(tag.value, str) else None


def _drop_foreign(low: Node, high: Node, shape: Shape, notes: list[str], path: str) -> dict[str, Node]:
    old, new = tag_of(low, shape), _written_tag(high, shape)
    if old is None or new is None or old == new or shape.known_model(new) is None:
        return low.value
    legal, somewhere = shape.keys(new), {*shape.keys(), *shape.keys(old)}
    kept = {}
    for key, item in low.value.items():
        # a key that no type has is a typing error in the lower layer: it is kept and then reported
        if key in legal or key not in somewhere:
            kept[key] = item
        else:
            shown = "" if item.is_mapping else f" = {format_value(item.plain())}"
            where = f"{path}{shape.discriminator} {new}"
            notes.append(f"{path}{key}{shown} ({item.at.short}) does not exist for {where}: dropped")
    return kept


def format_value(value: Any) -> str:
    """Format a value as one line of YAML that is parsed as the same value."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{format_value(str(k))}: {format_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and _stays_text(value) else _quote(value)
    return repr(value)


def _quote(text: str) -> str:
    """Double-quote `text` with YAML escapes for unprintable characters (YAML lacks the surrogate pairs of JSON)."""
    return '"' + "".join(_escape(letter) for letter in text) + '"'


def _escape(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    if letter.isprintable():
        return letter
    code = ord(letter)
    return f"\\x{code:02x}" if code < 1 << 8 else f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"


def _stays_text(text: str) -> bool:
    try:
        return isinstance(parse_scalar(text), str)
    except ValueError:
        return False
