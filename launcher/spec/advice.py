"""Messages that explain why a value is wrong and what to write instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headway.launcher.base.errors import printable
from headway.launcher.spec.fields import Shape
from headway.launcher.spec.yamlio import Node, Scalar, describe, parse_scalar

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "a multiple of"}
_RANGE_ERRORS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le",
                 "multiple_of": "multiple_of"}  # fmt: skip
_SUFFIXES = {"k": 3, "m": 6, "g": 9, "b": 9, "t": 12}
_NAME = "^[A-Za-z0-9][A-Za-z0-9._-]*$"
_BOOLEAN_WORDS = ("yes", "no", "on", "off", "y", "n", "true", "false")

SEVERAL = "A run has one value here; to compare several, write a study with a variant or a seed for each"


def closest(name: str, choices: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The choice that is most similar to `name`, or none. Ignores case, dashes and underscores."""
    plain = {_fold(choice): choice for choice in reversed(list(choices))}
    return [plain[match] for match in difflib.get_close_matches(_fold(name), plain, n=1, cutoff=cutoff)]


def closest_key(name: str, prefix: str, legal: Sequence[str], everywhere: Sequence[str]) -> list[str]:
    """Suggest dotted keys for an unknown key `prefix` + `name`.

    The order is: a key of the same mapping with a similar name, the same name elsewhere, a similar name elsewhere.
    """
    if here := closest(name, legal):
        return [prefix + here[0]]
    last = {path: path.rpartition(".")[2] for path in everywhere}
    if same := [path for path in everywhere if _fold(last[path]) == _fold(name)]:
        return same[:2]
    if similar := closest(name, last.values(), 0.8):
        return [path for path in everywhere if last[path] == similar[0]][:2]
    if longer := [key for key in legal if len(name) > 2 and _fold(key).startswith(_fold(name))]:
        return [prefix + longer[0]]
    return closest(prefix + name, [path for path in everywhere if not prefix.startswith(f"{path}.")], 0.8)


def not_one_of(value: Any, legal: Sequence[Any], noun: str = "value", hint: str = "") -> str:
    """`'rqga' is not a known type. Did you mean rgqa? Legal: gqa, rgqa, ...`; `hint` replaces the question."""
    names = [shown(item) for item in legal]
    close = closest(value, names) if isinstance(value, str) and value not in names else []
    if isinstance(value, str) and _all_of(value.split(","), names):
        hint = f" {SEVERAL}."
    elif hint or close:
        hint = f" {hint or f'Did you mean {close[0]}?'}"
    return f"{describe(value)} is not a known {noun}.{hint} Legal: {', '.join(names)}"


def shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def expected(shape: Shape, info: Any = None) -> str:
    """Describe the legal values at a place, with the legal range if the field has one."""
    if shape.literals:
        return f"one of: {', '.join(shown(value) for value in shape.literals)}"
    words = [text for kind, text in _KINDS.items() if kind in shape.scalars]
    if int in shape.scalars and float in shape.scalars:
        words.remove(_KINDS[int])
    if shape.has_keys or shape.values is not None:
        words.append("a mapping (key: value)")
    if shape.items is not None:
        words.append("a list, such as [1, 2]" if shape.items.scalars & {int, float} else "a list, such as [a, b]")
    if shape.places:
        words.append(f"a list of {len(shape.places)} values")
    if shape.nullable and words:
        words.append("null")
    span = legal_range(info)
    text = " or ".join(words) + (f" ({span})" if span and words else "")
    return " or ".join([text, *shape.words])


def legal_range(info: Any) -> str:
    """The legal range, such as `> 0, <= 10`, from the constraints of a pydantic FieldInfo."""
    found = []
    for item in getattr(info, "metadata", ()):
        found += [
            f"{sign} {getattr(item, name)}" for name, sign in _BOUNDS.items() if getattr(item, name, None) is not None
        ]
    return ", ".join(found)


def wrong_value(
    kind: str, message: str, context: Mapping[str, Any], node: Node, shape: Shape, info: Any, hint: str = ""
) -> str:
    """The message for a value that pydantic rejected with error type `kind`. `hint`: known advice on the value."""
    value = node.value
    if kind in _RANGE_ERRORS:
        name = _RANGE_ERRORS[kind]
        span = legal_range(info) or f"{_BOUNDS[name]} {context.get(name)}"
        return f"must be {span}; got {describe(value)}"
    if kind == "literal_error":
        return not_one_of(value, shape.literals, hint=hint) + _literal_advice(node, shape)
    if kind == "string_pattern_mismatch":
        pattern = context.get("pattern")
        if pattern == _NAME:
            return f"{describe(value)} cannot name a folder; use letters, digits, '.', '_' and '-', not '.' first"
        return f"{describe(value)} does not match the pattern {pattern}"
    if kind == "too_short" and not shape.places and isinstance(value, list | dict):
        least = context.get("min_length", 1)
        return f"needs at least {least} {'entry' if least == 1 else 'entries'}; got {len(value) or 'none'}"
    if kind == "finite_number":
        return "must be a finite number"
    if kind.endswith(("_type", "_parsing", "_from_float")) or (shape.places and kind in ("too_long", "too_short")):
        wanted = expected(shape, info)
        if wanted:
            return (
                f"expected {wanted}; got {describe(value)}" + type_advice(node, shape) + (f". {hint}" if hint else "")
            )
    text = printable(message, 200)
    return f"{text[:1].lower()}{text[1:]}; got {describe(value)}"


def type_advice(node: Node, shape: Shape) -> str:
    """Advice on what to write instead of a value of the wrong type; empty if there is none."""
    value = node.value
    if isinstance(value, str):
        if close := closest(value, shape.words):
            return f". Did you mean {close[0]}?"
        if bool in shape.scalars and value.lower() in _BOOLEAN_WORDS:
            truth = value.lower() in ("yes", "on", "y", "true")
            return f". Write {str(truth).lower()}" + (" without quotes" if node.quoted else "")
        if (shape.places or shape.items is not None) and "," in value and not node.quoted:
            quotes = "" if node.place.line else "'"  # a shell may interpret brackets as a pattern
            return f". Write {quotes}[{printable(value, 60)}]{quotes}"
        if shape.scalars & {int, float}:
            return _number_advice(node, shape)
        if shape.variants and value in shape.tags():
            return f". Write {{{shape.discriminator}: {value}, ...}}"
    if str in shape.scalars and isinstance(value, bool | int | float) and node.text is not None:
        return f'. Put it in quotes if it is text: "{printable(node.text, 60)}"'
    if isinstance(value, float) and int in shape.scalars:
        return f". The nearest whole number is {round(value)}"
    if shape.items is not None and not isinstance(value, dict | list):
        return f". Write [{printable(node.text or '', 60)}]" if value is not None else ""
    return ""


def _all_of(parts: Sequence[str], names: Sequence[str]) -> bool:
    return len(parts) > 1 and all(part.strip() in names for part in parts)


def _fold(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _number(text: str) -> Scalar:
    try:
        value = parse_scalar(text)
    except ValueError:
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _number_advice(node: Node, shape: Shape) -> str:
    text = node.value.strip()
    if len(parts := text.split(",")) > 1 and len(parts[-1]) != 3 and all(_number(part) is not None for part in parts):
        return f". {SEVERAL}"
    bare = text.lstrip("+-").lower()
    if node.quoted and _number(text) is not None:
        return f". Remove the quotes: {text}"
    if bare in ("inf", ".inf", "infinity", "nan", ".nan") or re.fullmatch(r"[\d._]+e[+-]?\d+", bare):
        return ". Write a finite number that a 64-bit float can hold"
    if re.fullmatch(r"0[0-9_]+", bare) and len(bare) < 20:
        plain = bare.replace("_", "").lstrip("0") or "0"
        octal = f", or 0o{plain} for the octal number {int(plain, 8)}" if not set(plain) & set("89") else ""
        return f". A leading zero is ambiguous: write {plain}{octal}"
    if re.fullmatch(r"\d+(:\d{1,2})+(\.\d*)?", bare):
        return ". Write one number in the unit of the key, such as 90 for 1:30 minutes in seconds"
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgbt])i?b?", bare)) and len(bare) < 20:
        return f". Write {match[1]}e{_SUFFIXES[match[2]]}"
    if re.fullmatch(r"\d{1,3}([, '.]\d{3})+|\d+_+[\d_]*", bare):
        return f". Write {re.sub('[^0-9]', '', bare)}, or with underscores between digits"
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", bare)) and float in shape.scalars and len(bare) < 20:
        return f". Write {float(match[1]) / 100:g}"
    if bare in _BOOLEAN_WORDS:
        return ". Write 1 or 0"
    return ""


def _literal_advice(node: Node, shape: Shape) -> str:
    number = _number(node.value) if isinstance(node.value, str) and node.quoted else None
    if number is not None and number in shape.literals:
        return f". Remove the quotes: {node.value}"
    if isinstance(node.value, int | float) and str in shape.scalars and node.text in shape.literals:
        return f'. Put it in quotes: "{node.text}"'
    return ""
