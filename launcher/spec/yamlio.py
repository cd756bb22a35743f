"""Parse YAML into plain values with the place of every key and value. No type changes silently; tags are rejected.

Only events of PyYAML's safe parser are used; PyYAML constructs no objects. Plain (unquoted) scalars follow the core
schema of YAML 1.2.2 chapter 10.3, restricted where parsers disagree:

- `true`, `false`, `null`, `~` (also `True`, `TRUE`, ...): as written; `yes`, `no`, `on`, `off` stay text.
- integers: decimal without leading zeros, `0o17`, `0x1F`; underscores between digits are accepted (`1_000_000`).
- floats: `1e-4`, `.5`, `5.`, `1.5E+3`; a float that would overflow to infinity or underflow to zero stays text.
- everything else stays text: `017`, `12:30:45`, `2024-01-01`, `.inf`, `.nan`. If a number is expected, validation
  reports what to write instead.

Rejected with file:line:column: tags, anchors, aliases, merge keys, duplicate keys, keys that are not text, a second
document, an empty file, bytes that are not UTF-8, more than `MAX_BYTES`, `MAX_DEPTH` levels or `MAX_VALUES` values.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headway.launcher.base.errors import NoInputError, SpecError, printable

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000
MAX_INT = 1 << 64

Scalar = None | bool | int | float | str

_WORDS: dict[str, Scalar] = {"": None, "~": None}
_WORDS |= {form: value for word, value in (("null", None), ("true", True), ("false", False))
           for form in (word, word.capitalize(), word.upper())}  # fmt: skip
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_UNSAFE = re.compile("[\x00\ud800-\udfff]")


@dataclass(frozen=True)
class Place:
    """Place of a key or value. `line` and `column` count from 1; line 0 means that `source` is not a file."""

    source: str
    line: int = 0
    column: int = 0

    @property
    def short(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass
class Node:
    """A value and its place. `value` is a scalar, a list of nodes, or a mapping from key to node."""

    value: Any
    place: Place
    key_place: Place | None = None
    text: str | None = None  # a scalar as written, without its quotes
    quoted: bool = False

    @property
    def at(self) -> Place:
        """Place of the key, or of the value if there is no key."""
        return self.key_place or self.place

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.value, dict)

    def plain(self) -> Any:
        """The value as plain dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def parse_scalar(text: str) -> Scalar:
    """The value of an unquoted scalar. Raises ValueError for an integer that does not fit in 64 bits."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) or _BASED.fullmatch(text):
        # 70 characters suffice for a 64-bit integer in any notation; int() rejects very long ones with its own message
        value = int(text.replace("_", ""), 0) if len(text) <= 70 else MAX_INT
        if not -MAX_INT < value < MAX_INT:
            raise ValueError(
                f"the integer {printable(text, 24)} does not fit in 64 bits; put it in quotes if it is text"
            )
        return value
    if _FLOAT.fullmatch(text):
        number = float(text)
        vanished = number == 0.0 and re.search("[1-9]", re.split("[eE]", text)[0]) is not None
        return text if math.isinf(number) or vanished else number
    return text


def load_yaml(path: Path, label: str | None = None) -> Node:
    """Read the mapping in a file. `label` names the file in messages (default: the path as given).

    Raises NoInputError if the file cannot be read, SpecError with file:line:column if it is not a legal mapping.
    """
    label = printable(label if label is not None else str(path), 300)
    node = parse_yaml(read_text(path, label), label)
    if not node.is_mapping:
        raise SpecError(f"{node.place}: the file must hold `key: value` lines, not {describe(node.value)}")
    return node


def parse_yaml(text: str, label: str, *, one_line: bool = False) -> Node:
    """Parse the single YAML value in `text`. With `one_line`, places have `label` only (an argument, not a file)."""
    return _Builder(text, label, one_line).document()


def value_node(value: Any, place: Place) -> Node:
    """Convert plain Python values to a node. The node and all its parts have the place `place`.

    Raises SpecError for values that YAML cannot express (a key that is not text, a number that is not finite, ...).
    """
    if isinstance(value, Node):
        return value
    if isinstance(value, dict):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise SpecError(f"{place}: the key {bad[0]!r} is not text")
        items = {key: value_node(item, place) for key, item in value.items()}
        for item in items.values():
            item.key_place = item.key_place or place
        return Node(items, place)
    if isinstance(value, list | tuple):
        return Node([value_node(item, place) for item in value], place)
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return Node(value, place, quoted=isinstance(value, str))
    raise SpecError(f"{place}: {printable(repr(value))} cannot stand in a spec")


def describe(value: Any) -> str:
    """Describe the kind of a value together with the value, for messages."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{printable(value, 60)}'" if isinstance(value, str) else repr(value)


def read_text(path: Path, label: str) -> str:
    """Read the text of a file of at most `MAX_BYTES`. `label` names the file in messages.

    Raises NoInputError if it cannot be read or is not a file, SpecError if it is too large or not UTF-8.
    """
    try:
        if not path.exists():
            raise NoInputError(f"{label}: no such file (looked for {printable(str(path.absolute()), 300)})")
        if not path.is_file():  # a named pipe would block, and a folder has no text
            raise NoInputError(f"{label}: is not a file; name a file of text")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise NoInputError(f"{label}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise SpecError(f"{label}: is larger than {MAX_BYTES} bytes, more than is ever needed; is it the right file?")
    raw = raw.removeprefix(b"\xef\xbb\xbf")  # byte order mark, as editors on Windows write it
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        good = raw[: error.start].decode("utf-8")
        line = len(re.findall("\r\n|\r|\n", good)) + 1
        column = len(re.split("\r\n|\r|\n", good)[-1]) + 1
        raise SpecError(f"{label}:{line}:{column}: is not UTF-8 text; save the file as UTF-8") from None


class _Builder:
    """Build a tree in one pass over the events of the parser."""

    def __init__(self, text: str, label: str, one_line: bool) -> None:
        self.text, self.label, self.one_line = text, label, one_line
        self.values = 0

    def place(self, mark: yaml.Mark) -> Place:
        return Place(self.label) if self.one_line else Place(self.label, mark.line + 1, mark.column + 1)

    def next(self) -> Any:
        try:
            return self.parser.get_event()
        except yaml.MarkedYAMLError as error:
            raise SpecError(self._syntax(error)) from None
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: "\\U00110000", %YAML 9999...
            place = self.place(self.parser.get_mark())
            raise SpecError(f"{place}: is not valid YAML: {printable(str(error), 100)}") from None

    def document(self) -> Node:
        if match := yaml.reader.Reader.NON_PRINTABLE.search(self.text):
            lines = re.split("\r\n|\r|\n", self.text[: match.start()])
            place = Place(self.label, 0 if self.one_line else len(lines), len(lines[-1]) + 1)
            raise SpecError(f"{place}: the character {match[0]!r} is not allowed in YAML")
        self.parser = yaml.SafeLoader(self.text)
        self.next()  # stream start
        if isinstance(self.next(), yaml.StreamEndEvent):
            raise SpecError(f"{self.label}: is empty; write at least one `key: value` line")
        node = self._node(self.next(), 1)
        self.next()  # document end
        after = self.next()
        if not isinstance(after, yaml.StreamEndEvent):
            raise SpecError(
                f"{self.place(after.start_mark)}: a second document starts here; one file holds one document"
            )
        return node

    def _node(self, event: Any, depth: int) -> Node:
        place = self.place(event.start_mark)
        self.values += 1
        if self.values > MAX_VALUES:
            raise SpecError(f"{place}: more than {MAX_VALUES} values; no spec needs so many")
        if isinstance(event, yaml.AliasEvent):
            name = printable(str(event.anchor), 40)
            raise SpecError(f"{place}: aliases (*{name}) are not allowed; use `base:` or repeat the value")
        if event.anchor is not None:
            raise SpecError(
                f"{place}: anchors (&{printable(event.anchor, 40)}) are not allowed; use `base:` or repeat the value"
            )
        if event.tag is not None:
            raise SpecError(
                f"{place}: tags ({printable(event.tag, 60)}) are not allowed; write a plain value, or text in quotes"
            )
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, place)
        if depth > MAX_DEPTH:
            raise SpecError(f"{place}: nested more than {MAX_DEPTH} levels deep")
        return self._mapping(place, depth) if isinstance(event, yaml.MappingStartEvent) else self._list(place, depth)

    def _scalar(self, event: yaml.ScalarEvent, place: Place) -> Node:
        text = event.value
        if match := _UNSAFE.search(text):
            raise SpecError(f"{place}: the text holds the character {match[0]!r}, which is not allowed")
        quoted = event.style is not None
        try:
            return Node(text if quoted else parse_scalar(text), place, text=text, quoted=quoted)
        except ValueError as error:
            raise SpecError(f"{place}: {error}") from None

    def _list(self, place: Place, depth: int) -> Node:
        items: list[Node] = []
        while not isinstance(event := self.next(), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return Node(items, place)

    def _mapping(self, place: Place, depth: int) -> Node:
        items: dict[str, Node] = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            key = self._key(event, depth)
            name = key.value
            if name in items:
                first = items[name].at
                raise SpecError(f"{key.place}: {printable(name)}: is given twice; the first one is at {first.short}")
            node = self._node(self.next(), depth + 1)
            node.key_place = key.place
            items[name] = node
        return Node(items, place)

    def _key(self, event: Any, depth: int) -> Node:
        key = self._node(event, depth + 1)
        if key.text == "<<" and not key.quoted:
            raise SpecError(f"{key.place}: merge keys (<<) are not allowed; use `base:` or repeat the values")
        if not isinstance(key.value, str):
            advice = f'; write "{printable(key.text, 40)}": in quotes if it is a name' if key.text else ""
            raise SpecError(f"{key.place}: the key is {describe(key.value)}, but keys are text{advice}")
        return key

    def _syntax(self, error: yaml.MarkedYAMLError) -> str:
        mark = error.problem_mark or error.context_mark
        place = self.place(mark) if mark else Place(self.label)
        problem = error.problem or error.context or "syntax error"
        if "'\\t'" in problem:
            problem += "; indent and separate with spaces, not tabs"
        elif "mapping values are not allowed" in problem:
            problem += "; check the indentation, and put text that holds ': ' in quotes"
        elif error.context and error.context_mark and mark and error.context_mark.line != mark.line:
            problem += f" ({error.context} that starts at line {error.context_mark.line + 1})"
        return f"{place}: is not valid YAML: {printable(problem, 200)}"
