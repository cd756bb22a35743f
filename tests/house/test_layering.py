"""Imports only go down, and our folders never become importable under their bare names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "launcher": {"launcher", "parallel", "model", "kernels", "data"},
    "parallel": {"parallel", "model", "kernels"},
    "model": {"model", "kernels"},
    "kernels": {"kernels"},
    "data": {"data"},
}
ROOMS = (
    "base",
    "spec",
    "run",
    "convert",
    "board",
    "train",
    "hosts",
    "match",
    "plan",
    "launch",
    "compare",
    "report",
    "study",
    "bench",
    "exchange",
    "evaluate",
    "inspect",
    "chaos",
    "cli",
)
"""Rooms of launcher/, lowest first: each imports itself and those before it. `__main__` may import all of them, `api`
all but cli; nothing imports these two."""
LARGEST_FOLDER = 24
FILES = [file for folder in MAY_IMPORT for file in sorted((ROOT / folder).rglob("*.py"))]


@cache
def imported_names(source: str, package: str) -> tuple[str, ...]:
    """Dotted names of all imports, wherever they stand, relative ones resolved; also names given as text."""
    return tuple(_imported_names(source, package))


def _imported_names(source: str, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(rf"headway\.({'|'.join(MAY_IMPORT)})(\.\w+)*", node.value)
        ):
            yield node.value


def violations(source: str, folder: str, package: str) -> list[str]:
    found = []
    for name in imported_names(source, package):
        top, _, rest = name.partition(".")
        below = rest.partition(".")[0]
        wrong = (
            (top == "headway" and below not in MAY_IMPORT[folder])
            or top in MAY_IMPORT
            or (folder == "model" and (name + ".").startswith("torch.distributed."))
            or (
                folder == "kernels"
                and top not in {"torch", "triton", "headway", "__future__"} | sys.stdlib_module_names
            )
        )
        if wrong:
            found.append(name)
    return found


def test_imports_go_down_only() -> None:
    assert len(FILES) > 400
    found = {}
    for file in FILES:
        *folders, _ = file.relative_to(ROOT).parts
        found[str(file.relative_to(ROOT))] = violations(file.read_text(), folders[0], ".".join(["headway", *folders]))
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("model", "import torch.distributed as dist"),
        ("model", "from torch import distributed"),
        ("model", "from torch.distributed import all_reduce"),
        ("model", "def f():\n    from headway.parallel.layout import Layout"),
        ("model", "from ..data import config"),
        ("data", "from headway.model import base"),
        ("parallel", "import headway.launcher.base.errors"),
        ("parallel", "from headway import data"),
        ("kernels", "import numpy"),
        ("kernels", "from headway.model.base import Shard"),
        ("launcher", "import data"),
        ("launcher", "from model.base import Shard"),
        ("data", "import importlib\nimportlib.import_module('headway.launcher.base.errors')"),
    ],
)
def test_an_upward_or_bare_import_is_seen(folder: str, source: str) -> None:
    assert violations(source, folder, f"headway.{folder}")


def test_a_downward_import_is_not() -> None:
    assert (
        violations("from headway.model.base import Shard\nimport torch.distributed", "parallel", "headway.parallel")
        == []
    )
    assert violations("import torch, math\ndef f():\n    import triton", "kernels", "headway.kernels") == []


def room_of(module: str) -> int | None:
    """Place in ROOMS of `headway.launcher.ROOM...`; past the last for a module beside the rooms; None elsewhere."""
    parts = module.split(".")
    if parts[:2] != ["headway", "launcher"] or len(parts) < 3:
        return None
    return ROOMS.index(parts[2]) if parts[2] in ROOMS else len(ROOMS)


def module_name(file: Path) -> str:
    return ".".join(["headway", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


def climbs(source: str, module: str) -> list[str]:
    """What a module of launcher/ imports from a room above its own."""
    package = module.rpartition(".")[0]
    own = room_of(module)
    found = imported_names(source, package)
    return [name for name in found if own is not None and (other := room_of(name)) is not None and other > own]


def test_every_folder_of_the_launcher_is_a_room_in_the_order() -> None:
    assert {path.parent.name for path in (ROOT / "launcher").glob("*/__init__.py")} == set(ROOMS)


def test_rooms_import_only_rooms_below() -> None:
    files = [file for file in FILES if file.is_relative_to(ROOT / "launcher")]
    assert len(files) > 300
    found = {module_name(file): climbs(file.read_text(), module_name(file)) for file in files}
    assert {module: names for module, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("headway.launcher.base.errors", "from headway.launcher.spec import load"),
        ("headway.launcher.study.run", "def f():\n    import headway.launcher.cli.main"),
        ("headway.launcher.hosts.place", "COMMAND = 'headway.launcher.study.run'"),
        ("headway.launcher.cli.main", "import headway.launcher.__main__"),
    ],
)
def test_an_import_of_a_room_above_is_seen(module: str, source: str) -> None:
    assert climbs(source, module)


def test_the_python_interface_imports_no_command_line_and_is_imported_by_nothing() -> None:
    ours = imported_names((ROOT / "launcher" / "api.py").read_text(), "headway.launcher")
    assert ours and not [name for name in ours if name.startswith("headway.launcher.cli")]
    others = {module_name(file): file.read_text() for file in FILES if file.name != "api.py"}
    found = {m: set(imported_names(source, m.rpartition(".")[0])) for m, source in others.items()}
    assert [m for m, names in found.items() if any(f"{n}.".startswith("headway.launcher.api.") for n in names)] == []


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports anywhere, for type checkers too."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = set(imported_names(source, module.rpartition(".")[0]))
        graph[module] = {n for name in names for n in (name, name.rpartition(".")[0]) if n in sources and n != module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that are left when those that import none of the others are taken away, again and again; both ways."""
    left = {module: set(names) for module, names in graph.items()}
    while ends := {m for m, names in left.items() if not names or not any(m in other for other in left.values())}:
        left = {m: names - ends for m, names in left.items() if m not in ends}
    return [sorted(left)] if left else []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(import_graph({module_name(file): file.read_text() for file in FILES})) == []


def test_a_circle_is_seen() -> None:
    sources = {
        "headway.data.a": "from headway.data import b",
        "headway.data.b": "def f():\n    from headway.data.c import x",
        "headway.data.c": "import headway.data.a",
        "headway.data.d": "from headway.data.a import y",
    }
    assert circles(import_graph(sources)) == [["headway.data.a", "headway.data.b", "headway.data.c"]]


def test_no_folder_holds_more_modules_than_a_reader_can_survey() -> None:
    folders = {file.parent for file in FILES}
    sizes = {str(f.relative_to(ROOT)): len(list(f.glob("[!_]*.py"))) for f in folders}
    assert {name: size for name, size in sizes.items() if size > LARGEST_FOLDER} == {}


def test_every_room_says_what_it_is_for_and_may_import() -> None:
    for room in ROOMS:
        text = ast.get_docstring(ast.parse((ROOT / "launcher" / room / "__init__.py").read_text())) or ""
        assert len(text) > 40 and "mports" in text, room


def test_package_files_hold_a_docstring_and_nothing_else() -> None:
    inits = [file for file in FILES if file.name == "__init__.py"]
    assert len(inits) >= len(MAY_IMPORT)
    for file in inits:
        body = ast.parse(file.read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), file
        assert isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str), file


def test_the_yaml_folder_holds_no_python() -> None:
    assert list((ROOT / "yaml").rglob("*.py")) == []  # a package `yaml` of ours would hide PyYAML


def test_tests_are_no_package_and_their_names_are_unique() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_importing_everything_leaves_no_bare_module_of_ours() -> None:
    modules = [
        ".".join(["headway", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__") for file in FILES
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(sorted(n for n in sys.modules if n.partition('.')[0] in {sorted(MAY_IMPORT)!r}), 'yaml' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] True"


def test_no_file_is_longer_than_500_lines() -> None:
    assert [str(file.relative_to(ROOT)) for file in FILES if len(file.read_text().splitlines()) > 500] == []
