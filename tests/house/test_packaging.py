"""What is installed is `headway` and nothing else, from pinned and documented dependencies."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("launcher", "model", "data", "parallel", "kernels")
SPECS = Path("yaml")
"""Installed beside the packages, and no package of code."""
TOP = Path("model/huggingface/top")
"""Its modules are installed directly below the namespace `headway`, which is no package."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = [(normal(name), version) for name, _, version in (line.partition("==") for line in lines if line)]
    assert all(version for _, version in found), "every line of constraints.txt pins one version"
    assert len(dict(found)) == len(found), "a package is pinned twice"
    return dict(found)


def requirements(project: dict[str, Any]) -> list[str]:
    extras = project["project"]["optional-dependencies"].values()
    return [*project["project"]["dependencies"], *(line for lines in extras for line in lines)]


def test_every_dependency_is_pinned_to_a_version_in_its_range(project: dict[str, Any], pins: dict[str, str]) -> None:
    requirement = pytest.importorskip("packaging.requirements").Requirement
    for line in requirements(project):
        wanted = requirement(line)
        assert normal(wanted.name) in pins, f"{wanted.name} is not pinned"
        assert wanted.specifier.contains(pins[normal(wanted.name)]), line


def test_every_dependency_is_documented(project: dict[str, Any]) -> None:
    text = (ROOT / "docs/dependencies.md").read_text().lower()
    named = {normal(word) for word in re.findall(r"[a-z0-9][a-z0-9._-]*", text)}
    for line in requirements(project):
        assert normal(re.split(r"[\[<>=! ;]", line)[0]) in named, line


def test_every_folder_with_code_is_a_listed_package(project: dict[str, Any]) -> None:
    found = {file.parent.relative_to(ROOT) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    listed = set(project["tool"]["setuptools"]["packages"])
    assert listed == {".".join(["headway", *path.parts]) for path in [*found - {TOP}, SPECS]} | {"headway"}
    mapping = dict(project["tool"]["setuptools"]["package-dir"])
    assert mapping.pop("headway") == str(TOP) and not (ROOT / TOP / "__init__.py").exists()
    assert all(mapping[name] == name.removeprefix("headway.").replace(".", "/") for name in listed - {"headway"})


def test_the_links_for_type_checkers_lead_to_the_folders() -> None:
    links = {link.name: link for link in (ROOT / ".typing/headway").iterdir()}
    targets = {name: ROOT / name for name in FOLDERS} | {file.name: file for file in (ROOT / TOP).glob("*.py")}
    assert set(links) == set(targets)
    for name, link in links.items():
        assert link.is_symlink() and not link.readlink().is_absolute() and link.resolve() == targets[name]


def test_this_environment_finds_modules_below_the_namespace() -> None:
    for file in (ROOT / TOP).glob("*.py"):
        found = importlib.util.find_spec(f"headway.{file.stem}")
        assert found is not None, "pyproject.toml is newer than this installation; install again (make test does it)"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in (*FOLDERS, str(SPECS)):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, which takes its dependencies from this one and cannot see this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    # A line of a .pth file is a folder of modules; the .pth files in it, which lead to this checkout, are not read.
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in packages))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, "--force-reinstall", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_headway_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        files = file.namelist()
    tops = {name.partition("/")[0] for name in files}
    assert sorted(re.sub("-.*(?=[.]dist-info)", "", top) for top in tops) == ["headway", "headway.dist-info"]
    code_files = {name for name in files if name.endswith(".py")}
    ours = {file.relative_to(ROOT) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    assert code_files == {f"headway/{file.name if file.parent == TOP else file}" for file in ours}
    assert any(name.endswith("licenses/LICENSE") for name in files)
    parts = {f"headway/launcher/report/{name}" for name in ("page.css", "page.js", "charts.js", "renew.js")}
    assert {name for name in files if name.endswith((".css", ".js"))} == parts
    specs = {name for name in files if name.startswith("headway/yaml/")}
    assert specs == {f"headway/{file.relative_to(ROOT)}" for file in (ROOT / SPECS).rglob("*") if file.is_file()}
    assert {name for name in files if name.endswith("py.typed")} == {f"headway/{name}/py.typed" for name in FOLDERS}


def test_the_wheel_works_outside_of_a_checkout(installed: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def headway(*words: str) -> str:
        command = [str(installed / "bin/headway"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import headway.launcher.cli.main as main, headway.hf as hf; print(main.__file__, hf.__file__, sep='\\n')"
    where = subprocess.run(
        [str(installed / "bin/python"), "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    lines = where.stdout.splitlines()
    assert len(lines) == 2 and all(Path(line).is_relative_to(installed) for line in lines), where.stdout + where.stderr
    assert "write the files of a first project" in headway("--help")
    shown = headway("train", "long-2048", "--print-config")  # a shipped spec, and another one that is its base
    assert "headway/yaml/bench/long-2048.yaml" in shown and "headway/yaml/base/quickstart.yaml" in shown
    assert str(ROOT) not in shown
    assert "switchhead/seed-1" in headway("study", "status", "quickstart")
    headway("init", "project")
    assert (tmp_path / "project/model.yaml").read_text() == (ROOT / "yaml/project/model.yaml").read_text()


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and len(text.splitlines()) > 190
