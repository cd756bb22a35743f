"""Files are read with the place of every key, and what YAML could mean in two ways is refused at its place."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.spec.yamlio import MAX_BYTES, MAX_DEPTH, MAX_VALUES, load_yaml, parse_yaml


def refusal(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "x.yaml")
    return str(caught.value)


def test_keys_and_values_know_their_place() -> None:
    tree = parse_yaml("a: 1\nb:\n  c: [x, 2.5]\n", "x.yaml")
    assert str(tree.value["b"].key_place) == "x.yaml:2:1"
    inner = tree.value["b"].value["c"]
    assert str(inner.key_place) == "x.yaml:3:3" and str(inner.place) == "x.yaml:3:6"
    assert str(inner.value[1].place) == "x.yaml:3:10" and inner.place.short == "x.yaml:3"
    assert tree.plain() == {"a": 1, "b": {"c": ["x", 2.5]}}


REFUSED = {
    "a: 1\nb: !!python/object/apply:os.system [touch x]": ("x.yaml:2:4", "tags", "os.system"),
    "a: !!binary aGk=": ("x.yaml:1:4", "tags"),
    "a: !!set {x}": ("x.yaml:1:4", "tags"),
    "a: !!float 1": ("x.yaml:1:4", "tags"),
    "a: ! 1": ("x.yaml:1:4", "tags"),
    "!mine\na: 1": ("x.yaml:1:1", "tags"),
    "a: &x 1": ("x.yaml:1:4", "anchors", "&x"),
    "a: 1\nb: *a": ("x.yaml:2:4", "aliases", "*a"),
    "a: &x [*x]": ("x.yaml:1:4", "anchors"),
    "a:\n  <<: {b: 1}": ("x.yaml:2:3", "merge keys", "base:"),
    "a: 1\nb: 2\na: 3": ("x.yaml:3:1", "a: is given twice", "x.yaml:1"),
    "m: {a: 1, 'a': 2}": ("x.yaml:1:11", "a: is given twice"),
    "a: 1\n7: 2": ("x.yaml:2:1", "keys are text", '"7"'),
    "null: 2": ("x.yaml:1:1", "keys are text"),
    "true: 2": ("x.yaml:1:1", "keys are text", '"true"'),
    "? [a, b]\n: 1": ("x.yaml:1:3", "keys are text"),
    "{? : 1}": ("keys are text",),
    "": ("x.yaml", "empty"),
    "# only a comment\n": ("x.yaml", "empty"),
    "a: 1\n---\nb: 2": ("x.yaml:2:1", "second document"),
    "a: 1\n...\nb: 2": ("x.yaml:3:1", "document"),
    "a:\t1": ("x.yaml:1:3", "tabs"),
    "a:\n\tb: 1": ("x.yaml:2:1", "tabs"),
    "a: b: c": ("x.yaml:1:5", "quotes"),
    "a: [1, 2": ("x.yaml:1:9",),
    "a: 1\n  b: 2": ("x.yaml:2:4", "indentation"),
    "a: 'open": ("x.yaml:1:9",),
    "a: \x07": ("x.yaml:1:4", "not allowed"),
    'a: "\\0"': ("x.yaml:1:4", "not allowed"),
    'a: "\\ud800"': ("x.yaml:1:4", "not allowed"),
    'a: "\\U00110000"': ("x.yaml:1",),
    "%YAML " + "9" * 5000 + ".1\n---\na: 1": ("x.yaml:1",),
    "a: " + "9" * 5000: ("x.yaml:1:4", "64 bits"),
    "a: " + "[" * 2000: ("x.yaml:1:", f"more than {MAX_DEPTH} levels"),
    "a: " + "{b: " * 2000: ("x.yaml:1:", f"more than {MAX_DEPTH} levels"),
    "a: @x": ("x.yaml:1:4",),
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:24]))
def test_is_refused_with_its_place(text: str) -> None:
    message = refusal(text)
    for part in REFUSED[text]:
        assert part in message
    assert "\n" not in message and message.isprintable() and len(message) < 400


def test_escape_sequences_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in refusal('"\\e[31mred": 1\n"\\e[31mred": 2\n')


def test_a_mapping_of_depth_32_is_accepted_and_of_33_refused() -> None:
    parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x.yaml")
    assert "levels deep" in refusal("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\nb:\r\n  c: no\r\n")
    tree = load_yaml(file, "x.yaml")
    assert tree.plain() == {"a": 1, "b": {"c": "no"}}
    assert str(tree.value["b"].value["c"].at) == "x.yaml:3:3"


@pytest.mark.parametrize("raw", [b"a: 1\nb: caf\xe9\n", "a: 1".encode("utf-16"), b"\x80", b"a: 1\nb: \xff\xfe"])
def test_other_encodings_are_refused_with_their_place(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(raw)
    with pytest.raises(SpecError, match=r"^x\.yaml:\d+:\d+: is not UTF-8") as caught:
        load_yaml(file, "x.yaml")
    if raw.startswith(b"a: 1\nb: caf"):
        assert str(caught.value).startswith("x.yaml:2:7: ")


@pytest.mark.parametrize("text", ["- 1", "just text", "3", "---\n~"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match="key: value"):
        load_yaml(file)


def test_what_cannot_be_read_is_no_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "pipe", tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(NoInputError) as caught:
            load_yaml(path)
        assert caught.value.exit_code == 66


def test_a_file_beyond_the_size_limit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"a: 1\n#" + b"x" * MAX_BYTES)
    with pytest.raises(SpecError, match="larger than"):
        load_yaml(file)


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"k{i}: {i}\n" for i in range(80_000)),
        "a: " + "x y " * 250_000,
        "- " * 500_000,
        "a: [" + "1, " * 300_000 + "]",
        "\n".join(
            [
                "a0: &a0 [x, x, x, x, x, x, x, x, x]",
                *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)),
            ]
        ),
    ],
    ids=["keys", "words", "nesting", "list", "alias bomb"],
)
def test_the_largest_files_take_bounded_time(text: str) -> None:
    start = time.process_time()
    try:
        parse_yaml(text, "x.yaml")
    except SpecError as error:
        assert str(MAX_VALUES) in str(error) or "levels" in str(error) or "anchors" in str(error)
    assert time.process_time() - start < 5  # measured: about 1 s; a quadratic scan would take minutes


def test_reading_yaml_imports_neither_torch_nor_pydantic() -> None:
    code = "import sys, headway.launcher.spec.yamlio; print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
