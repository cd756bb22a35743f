"""Plain scalars mean what YAML 1.2 says, and what two readers could read differently stays text."""

from __future__ import annotations

import math
import random
import struct

import pytest

from headway.launcher.spec.merge import format_value
from headway.launcher.spec.yamlio import parse_scalar, parse_yaml

VALUES = {
    "": None,
    "~": None,
    "null": None,
    "Null": None,
    "NULL": None,
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
    "0": 0,
    "-0": 0,
    "7": 7,
    "+7": 7,
    "-7": -7,
    "1_000_000": 1_000_000,
    "0o17": 15,
    "0x1F": 31,
    "0xff": 255,
    "18446744073709551615": (1 << 64) - 1,
    "-18446744073709551615": 1 - (1 << 64),
    "1e-4": 1e-4,
    "1E4": 1e4,
    "1.0e-4": 1e-4,
    ".5": 0.5,
    "5.": 5.0,
    "-1.5E+3": -1500.0,
    "0.0": 0.0,
    "0e5": 0.0,
    "1.7976931348623157e308": 1.7976931348623157e308,
    "5e-324": 5e-324,
}

TEXT = [
    "no",
    "yes",
    "on",
    "off",
    "No",
    "YES",
    "y",
    "n",
    "nULL",
    "tRUE",
    "none",
    "None",
    "017",
    "08",
    "00",
    "-01",
    "0o8",
    "0x",
    "0xG",
    "0b11",
    "00.5",
    "01e3",
    "1_",
    "_1",
    "1__0",
    "1_000.5",
    "1_0e3",
    "0_1",
    "1,000",
    "1 000",
    "10k",
    "25%",
    "1e",
    "e1",
    ".",
    "-",
    "+",
    "..5",
    "1.2.3",
    "- 1",
    "+-1",
    "12:30:45",
    "1:30",
    "2024-01-01",
    "2024-01-01T10:00:00Z",
    ".inf",
    "-.inf",
    ".nan",
    "inf",
    "nan",
    "NaN",
    "Infinity",
    "1e400",
    "-1e400",
    "1e-400",
    "1e9999999999",
    "\u0661",
    "\uff11",
    "1\n",
    "1 ",
    " 1",
    "=",
    "<<x",
]


@pytest.mark.parametrize(("text", "value"), VALUES.items())
def test_value_of(text: str, value: object) -> None:
    got = parse_scalar(text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", TEXT)
def test_stays_text(text: str) -> None:
    assert parse_scalar(text) == text


@pytest.mark.parametrize(
    "text", ["18446744073709551616", "-18446744073709551616", "9" * 5000, "0x" + "f" * 17, "1" + "_0" * 3000]
)
def test_integers_beyond_64_bits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        parse_scalar(text)


def test_no_text_becomes_a_number_that_is_not_finite() -> None:
    for text in [*TEXT, *VALUES]:
        value = parse_scalar(text)
        assert not isinstance(value, float) or math.isfinite(value)


def test_quoted_scalars_are_always_text() -> None:
    node = parse_yaml("""a: "1e-4"\nb: 'no'\nc: "017"\nd: ""\ne: 'null'\n""", "f")
    assert node.plain() == {"a": "1e-4", "b": "no", "c": "017", "d": "", "e": "null"}


def test_every_float_reads_back_from_how_a_config_prints_it() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        (value,) = struct.unpack("<d", rng.randbytes(8))
        if math.isfinite(value):
            got = parse_scalar(format_value(value))
            assert isinstance(got, float) and got == value


def test_every_text_reads_back_from_how_a_config_prints_it() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(
            chr(rng.choice([rng.randrange(1, 256), rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)]))
            for _ in range(5)
        )
        assert parse_yaml(f"key: [{format_value(text)}, {format_value(text[:1])}]", "f").plain() == {
            "key": [text, text[:1]]
        }


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        False,
        0,
        -3,
        1 << 63,
        "",
        "x",
        "no",
        "017",
        "1e-4",
        "null",
        "a: b",
        "a #b",
        "- a",
        "[a]",
        "{a",
        "'",
        '"',
        "é",
        "a\nb",
        "C:\\x",
        "9" * 30,
        [1, 2.5, "1", None, "a, b"],
        {"a": [True, {"b.c": "x"}]},
        [],
        {},
        " a ",
        "*x",
        "&x",
        "!x",
        "%x",
        "@x",
        "-",
        "a:",
        "=",
        "2024-01-01",
    ],
)
def test_every_value_reads_back_from_how_a_config_prints_it(value: object) -> None:
    assert parse_yaml(f"key: {format_value(value)}\n", "f").plain() == {"key": value}
