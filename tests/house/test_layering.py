"""Imports only go down, and our folders never become importable under their bare names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
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
FILES = [file for folder in MAY_IMPORT for file in sorted((ROOT / folder).rglob("*.py"))]


def imported_names(source: str, package: str) -> Iterator[str]:
    """Dotted names of all imports, wherever they stand, relative ones resolved; also names given as text."""
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
            and re.fullmatch(r"headway(\.\w+)+", node.value)
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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down_only(file: Path) -> None:
    folder = file.relative_to(ROOT).parts[0]
    package = ".".join(["headway", *file.relative_to(ROOT).parts[:-1]])
    assert violations(file.read_text(), folder, package) == []


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
