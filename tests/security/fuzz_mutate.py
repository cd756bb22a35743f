"""Create broken inputs from valid ones. The result depends only on the given generator, so a seed reproduces it."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (0, -1, 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**13, 10**30, -(10**18), 0.5, 1e-320, 1e308)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
TEXTS = (
    *("", " ", "x" * 3000, "../../etc/passwd", "/etc/passwd", "..", ".", "a/b", "a\\b", "-oProxyCommand=id", "--help"),
    *(
        "$(id)",
        "`id`",
        "; id",
        "a\nb",
        "a\r\nb",
        "\x00",
        "\x1b[31m",
        "\ud800",
        "\u202e",
        "\ufeff",
        "é",
        "🙂",
        "٣",
        "NaN",
    ),
    *(
        "1e-4",
        "no",
        "null",
        "017",
        "0x1F",
        "12:30:45",
        "2024-01-01",
        "step-0000000001",
        "%s%n",
        "{0.__class__}",
        "hf://x",
    ),
)
WORDS = (
    *("~", "", "{}", "[]", "[[]]", "true", "yes", "-1", "1e400", "-.inf", ".nan", "9" * 30, "9" * 5000, "0o17", "1_0"),
    *("!!python/name:os.system", "!!python/object/apply:os.system [id]", "!!binary aGk=", "!!set {x}", "&a [*a]", "*a"),
    *(
        "<<: {a: 1}",
        "? x",
        "\t1",
        "- 1",
        "[1, 2",
        "{a: 1",
        "a: b",
        "|\n  text",
        ">-\n x",
        "%",
        "@",
        "`",
        "'",
        '"\\ud800"',
    ),
    *('"\\u0000"', "1\n---\nb: 1", "...", "NaN", "-Infinity", "1" * 400 + ".0", "# x", "slots=2", "=", ":", "{{}}"),
)
LINES = (
    *(
        "base: x.yaml",
        "base: .",
        "base: input.yaml",
        "attention.type: mha",
        "train: 3",
        "a.b.c: 1",
        "---",
        "...",
        "%YAML 9.9",
    ),
    *(
        "attention: {}",
        "variants: {}",
        "name: [a]",
        "launch.processes: 4097",
        "\x00",
        "\ufeff",
        "-",
        "?",
        "}",
        "]",
        "a slots=1",
    ),
)
BYTES = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\t",
    b"\r",
    b"\r\n",
    b"\x1b",
    b"\xed\xa0\x80",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
)


MAX_BYTES = 1 << 20


def mutated(rng: random.Random, good: bytes, *, tree: Any, seal: Callable[[Any], None] | None, text: bool) -> bytes:
    """One broken input derived from `good`, at most 1 MiB, because readers without a size limit take time for more.

    `tree`: the same input as plain values; None if there is no such form. `seal` updates the hashes that a tree has of
    itself, so that code after their check is reached, too. `text`: the input consists of lines.
    """
    return _mutated(rng, good, tree, seal, text)[:MAX_BYTES]


def _mutated(rng: random.Random, good: bytes, tree: Any, seal: Callable[[Any], None] | None, text: bool) -> bytes:
    if tree is not None and rng.random() < 0.55:
        return _tree(rng, tree, seal)
    if text and rng.random() < 0.6:
        lines = good.decode("utf-8", "surrogateescape").split("\n")
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            _line(rng, lines)
        data = "\n".join(lines).encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")
        return data if rng.random() < 0.9 else data.replace(b"\n", b"\r\n")
    if rng.random() < 0.06:
        return _whole(rng)
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 2, 8))):
        _bytes(rng, data)
    return bytes(data)


def _bytes(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    match rng.randrange(6):
        case 0 if data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            del data[at : at + rng.choice((1, 4, 64))]
        case 3:
            data[at:at] = data[at : at + rng.choice((1, 16, 400))]
        case 4:
            data[at:at] = rng.choice(BYTES) * rng.choice((1, 1, 40))
        case _:
            data[at : at + 4] = rng.randbytes(4)


def _line(rng: random.Random, lines: list[str]) -> None:
    at = rng.randrange(len(lines)) if lines else 0
    line = lines[at] if lines else ""
    key, colon, _ = line.partition(":")
    match rng.randrange(9):
        case 0:
            del lines[at : at + 1]
        case 1:
            lines.insert(at, line)
        case 2:
            lines.insert(at, rng.choice(LINES))
        case 3 | 4:
            lines[at : at + 1] = [f"{key}{colon or ':'} {rng.choice(WORDS)}"]
        case 5:
            lines[at : at + 1] = [
                key[: -rng.randrange(1, 3)] + rng.choice(("", "x", ".", "é", "'", "\x07")) + line[len(key) :]
            ]
        case 6:
            other = rng.randrange(max(1, len(lines)))
            lines[at : at + 1], lines[other : other + 1] = lines[other : other + 1], lines[at : at + 1]
        case 7:
            lines[at : at + 1] = [rng.choice(("\t", " ", "   ", "      ", "- ")) + line.lstrip()]
        case _:
            lines[at : at + 1] = [
                line + rng.choice((" #", " x", ",", " ]", " }", "\\", '"', "'", " : ", "\r", "\u2028"))
            ]


def _whole(rng: random.Random) -> bytes:
    """Inputs that do not derive from a valid one."""
    depth = rng.choice((30, 200, 2000, 20_000))
    bomb = [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)),
    ]
    return rng.choice(
        (
            b"",
            b"\n",
            b"null",
            b"[]",
            b"{}",
            b'"x"',
            b"\xef\xbb\xbf",
            b"[" * depth,
            b"[" * depth + b"]" * depth,
            b'{"a":' * depth + b"1" + b"}" * depth,
            b"a: {" * depth,
            b"- " * depth,
            b"a.b" + b".c" * depth + b": 1",
            b"a" * 70_000 + b": 1",
            b"9" * rng.choice((20, 5000, 60_000)),
            "\n".join(bomb).encode(),
            "".join(f"k{i}: {i}\n" for i in range(depth)).encode(),
            ("[" + "1," * depth + "1]").encode(),
            json.dumps({f"k{i}": {} for i in range(depth)}).encode(),
            rng.randbytes(rng.choice((1, 100, 4000))),
            "a: 1".encode("utf-16"),
        )
    )


# ---------------------------------------------------------------- plain values


def _tree(rng: random.Random, tree: Any, seal: Callable[[Any], None] | None) -> bytes:
    try:
        return _changed_tree(rng, copy.deepcopy(tree), seal)
    except RecursionError:  # two nested inputs in each other are too deep to copy
        return b'{"a":' * 1200 + b"[0]" + b"}" * 1200


def _changed_tree(rng: random.Random, tree: Any, seal: Callable[[Any], None] | None) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        tree = _changed(rng, tree)
    if seal is not None and rng.random() < 0.75:
        # An input that cannot be sealed is used as it is.
        with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError, RecursionError):
            seal(tree)
    text = json.dumps(tree, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05:  # a duplicate key in one mapping
        at = text.find("{") + 1
        text = text[:at] + text[at : text.find(",", at) + 1] + text[at:]
    return text.encode("utf-8", "surrogatepass")


def _changed(rng: random.Random, tree: Any) -> Any:
    holders = _holders(tree)
    if not holders:
        return _value(rng, tree)
    holder = rng.choice(holders)
    keys: Sequence[Any] = list(holder) if isinstance(holder, dict) else range(len(holder))
    key = rng.choice(keys)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice((f"{key}x", f"{key}"[:-1], f"{key}.a", rng.choice(TEXTS), f"{key}".upper()))] = (
                holder.pop(key)
            )
        case 1 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        case 2 if isinstance(holder, dict):
            holder[rng.choice((*TEXTS, "base", "type", "steps"))] = copy.deepcopy(holder[rng.choice(keys)])
        case 3:
            holder[key] = copy.deepcopy(holder[rng.choice(keys)])
        case _:
            holder[key] = _value(rng, holder[key])
    return tree


def _holders(tree: Any) -> list[Any]:
    found, left = [], [tree]
    while left:
        node = left.pop()
        if isinstance(node, dict | list) and node:
            found.append(node)
            left += node.values() if isinstance(node, dict) else node
    return found


def _value(rng: random.Random, old: Any) -> Any:
    """A replacement for a value, often of the same type, because type checks stop the others."""
    number = isinstance(old, int | float) and not isinstance(old, bool)
    match rng.randrange(12):
        case 0 | 1 | 2 if number:
            return rng.choice((*NUMBERS, old + 1, old - 1, -old, old * 1000, float(old)))
        case 0 | 1 | 2 if isinstance(old, str):
            return rng.choice((*TEXTS, old + "x", old[:-1], old.upper(), old * 20, "../" + old, old + "\n"))
        case 3:
            return rng.choice(TEXTS)
        case 4:
            return rng.choice(NUMBERS)
        case 5:
            return rng.choice(NOT_FINITE)
        case 6:
            return str(old)
        case 7:
            return [old]
        case 8:
            return {rng.choice(TEXTS): old}
        case 9:
            nested: Any = old
            for _ in range(rng.choice((3, 40, 300))):
                nested = [nested] if rng.random() < 0.5 else {"a": nested}
            return nested
        case 10:
            return [old] * min(rng.choice((0, 2, 500)), 2 if isinstance(old, dict | list) else 500)
        case _:
            return rng.choice((None, True, False, [], {}, "", 0))
