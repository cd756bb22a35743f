"""docs/architecture.md names files, functions and classes that exist, and its picture is the order of imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
BATCH = [
    "text", "tokenizer", "MDS shards", "order", "loader", "engine", "blocks", "loss", "update", "ZeRO step", "record",
    "checkpoint",
]  # fmt: skip
SPEC = ["YAML", "layers", "merge", "validate", "resolve", "plan", "launch", "worker"]
PLACES = [
    "loss", "KV-group sharding", "data order", "gates", "router", "balancing losses", "costs", "report text",
    "statistics of the comparison", "matching", "checkpoint commit", "resume", "learning rate schedule",
    "gradient clipping", "document mask", "RoPE", "Triton kernels", "kernel twins", "validation of keys",
    "did you mean", "TensorBoard", "supervision of ranks", "HF export",
]  # fmt: skip
TERMS = [
    "Spec", "Study", "variant", "cell", "run", "mechanism", "group", "slot", "expert", "layout", "engine", "probe",
    "matched", "paired", "useful FLOPs", "executed FLOPs",
]  # fmt: skip


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the rows of tables, without heads, rules and rows that only hold a title."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return [row for row in cells if any(row[1:])]


def named(row: list[str]) -> Iterator[tuple[str, str]]:
    """(file, function or class) of a row; the link's text is its target, seen from the repository's root."""
    link = re.fullmatch(r"\[(.+)\]\(\.\./(.+)\)", row[1])
    assert link and link[1] == link[2], row
    names = re.findall(r"`([^`]+)`", row[2])
    assert names, row
    yield from ((link[1], name) for name in names)


@cache
def defined(file: str) -> frozenset[str]:
    """Functions, classes, `Class.method` and constants of a file, without importing it."""
    found: set[str] = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


TABLES = ("The way of a batch", "The way of a spec", "Where is ...?")
NAMED = [pair for title in TABLES for row in rows(section(title)) for pair in named(row)]
PROSE = re.findall(r"`(\w+)` in \[(.+?)\]\(", PAGE) + [
    (name, file) for file, name in re.findall(r"\[([\w/.]+\.py)\]\([^)]*\), `(\w+)`", PAGE)
]


def test_what_is_named_exists() -> None:
    pairs = [*NAMED, *((file, name) for name, file in PROSE)]
    assert len(pairs) > 300
    assert [file for file, _ in pairs if not (ROOT / file).is_file()] == [], "correct docs/architecture.md"
    assert [pair for pair in pairs if pair[1] not in defined(pair[0])] == [], "correct docs/architecture.md"


def test_a_name_that_does_not_exist_is_seen() -> None:
    assert "Engine.train_step" in defined("parallel/engine.py")
    assert not {"Engine.no_such", "no_such", "np"} & defined("parallel/engine.py")


def test_links_lead_to_files_and_sections() -> None:
    headings = re.findall(r"^## (.*)$", PAGE, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert target.removeprefix("#") in anchors if target.startswith("#") else (ROOT / "docs" / target).exists()


@pytest.mark.parametrize(("title", "steps"), [("The way of a batch", BATCH), ("The way of a spec", SPEC)])
def test_a_way_has_its_steps_in_order(title: str, steps: list[str]) -> None:
    found = [row[0].partition(":")[0] for row in rows(section(title))]
    assert [name for name in found if name in steps] == steps


def test_what_newcomers_look_for_is_in_the_table() -> None:
    whats = [row[0] for row in rows(section("Where is ...?"))]
    missing = [place for place in PLACES if not any(what.startswith(place) or f"; {place}" in what for what in whats)]
    assert missing == []


def test_the_glossary_explains_each_term_once() -> None:
    terms = [row[0] for row in rows(section("Glossary"))]
    assert len(set(terms)) == len(terms)
    assert [term for term in TERMS if term not in terms] == []


# The picture. A node or group of nodes stands above another when all its nodes do.


def constant(name: str) -> Any:
    tree = ast.parse((ROOT / "tests/house/test_layering.py").read_text())
    values = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name]
    return ast.literal_eval(values[0])


ROOMS: tuple[str, ...] = constant("ROOMS")
MAY_IMPORT: dict[str, set[str]] = constant("MAY_IMPORT")


class Picture:
    """Nodes in the order they stand in, `subgraph` groups with their nodes, and arrows from one to the next."""

    def __init__(self, text: str) -> None:
        self.groups: dict[str, list[str]] = {}
        self.nodes: list[str] = []
        self.arrows: list[tuple[str, str]] = []
        inside: list[str] = []
        for line in (line.strip() for line in text.splitlines()):
            if group := re.match(r"subgraph (\w+)", line):
                inside.append(group[1])
                self.groups[group[1]] = []
            elif line == "end":
                inside.pop()
            elif not re.match(r"flowchart|direction|$", line):
                self._line(line, inside)
        assert not inside

    def _line(self, line: str, inside: list[str]) -> None:
        """`a["label"] --> b` adds a node for each word that is not a group, and the arrows between them."""
        words = [re.sub(r'\[".*?"\]$', "", part.strip()) for part in line.split("-->")]
        assert all(re.fullmatch(r"\w+", word) for word in words), line
        for word in words:
            if word not in self.groups and word not in self.nodes:
                self.nodes.append(word)
                for group in inside:
                    self.groups[group].append(word)
        self.arrows += pairwise(words)

    def members(self, name: str) -> list[str]:
        return self.groups.get(name, [name])


def drawn(text: str) -> Picture:
    return Picture(text.split("```mermaid\n")[1].split("```")[0])


def climbing(picture: Picture) -> list[tuple[str, str]]:
    """Arrows to something that may not be imported from where they start."""

    def may(upper: str, lower: str) -> bool:
        if lower in ROOMS:
            return upper in ROOMS and ROOMS.index(lower) < ROOMS.index(upper)
        own = "launcher" if upper in ROOMS else upper
        return lower != own and lower in MAY_IMPORT[own]

    return [
        (a, b) for a, b in picture.arrows if not all(may(x, y) for x in picture.members(a) for y in picture.members(b))
    ]


def test_the_picture_shows_every_room_in_order_and_every_package() -> None:
    picture = drawn(PAGE)
    assert picture.groups["launcher"] == list(reversed(ROOMS))
    assert set(picture.nodes) - set(ROOMS) == set(MAY_IMPORT) - {"launcher"}


def test_arrows_of_the_picture_only_go_down() -> None:
    assert climbing(drawn(PAGE)) == []


def test_arrows_lead_to_everything_that_may_be_imported() -> None:
    picture = drawn(PAGE)
    below: dict[str, set[str]] = {node: set() for node in [*picture.nodes, "launcher"]}
    for a, b in reversed(picture.arrows * len(picture.arrows)):  # often enough to reach the longest way
        for x in {a, *picture.members(a)} & set(below):
            below[x] |= {y for z in picture.members(b) for y in {z, *below.get(z, set())}}
    assert {package: below[package] | {package} for package in MAY_IMPORT if package != "launcher"} == {
        package: names for package, names in MAY_IMPORT.items() if package != "launcher"
    }
    assert below["launcher"] >= MAY_IMPORT["launcher"] - {"launcher"}
    for i, room in enumerate(ROOMS):
        assert below[room] >= set(ROOMS[:i]), room


@pytest.mark.parametrize("arrow", ["base --> spec", "model --> parallel", "front --> cli", "foundation --> training"])
def test_an_arrow_that_goes_up_is_seen(arrow: str) -> None:
    text = PAGE.replace("  launcher --> data", f"  {arrow}\n  launcher --> data")
    assert climbing(drawn(text)) == [tuple(arrow.split(" --> "))]
