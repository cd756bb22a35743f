"""Calls that run code out of data, and paths of one machine, are nowhere in the project."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = [
    file for folder in ("launcher", "model", "data", "parallel", "kernels") for file in (ROOT / folder).rglob("*.py")
]
UNSAFE = {
    r"\byaml\.(unsafe_|full_)?load(_all)?\(": "yaml.load(",
    r"\bpickle\.(load|Unpickler)|\bimport pickle\b|\bfrom pickle\b": "pickle.load(",
    r"\bweights_only\s*=\s*False": "weights_only = False",
    r"\bshell\s*=\s*True": "shell=True",
    r"\bos\.(system|popen)\b": "os.system(",
    r"(?<![\w.])(eval|exec)\(": "eval(",
    r"\btrust_remote_code\s*=\s*True": "trust_remote_code=True",
    r"\ballow_pickle\s*=\s*True": "allow_pickle=True",
    r"\ballow_unsafe_types\s*=\s*True": "allow_unsafe_types=True",
}
# in two parts, so that this file does not hold them
MACHINE_PATHS = re.compile(
    "|".join(["/ro" + r"ot/", "/wo" + r"rk/", "/ho" + r"me/(?!headway\b)\w", "/Us" + r"ers/\w", r"\bC:\\Us" + "ers"])
)
SKIPPED = {
    ".git",
    ".venv",
    "build",
    "dist",
    "datasets",
    "runs",
    "studies",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
}


@pytest.mark.parametrize("pattern", UNSAFE)
def test_unsafe_calls_are_nowhere(pattern: str) -> None:
    hits = [
        f"{f.relative_to(ROOT)}:{i}"
        for f in CODE
        for i, line in enumerate(f.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert hits == []


@pytest.mark.parametrize(("pattern", "example"), UNSAFE.items())
def test_the_search_would_find_them(pattern: str, example: str) -> None:
    assert re.search(pattern, f"    x = {example}")
    assert not re.search(
        pattern, "model.eval(); yaml.safe_dump(x); weights_only=True; shell=False; retrieval(x); os.system_id"
    )


def project_files() -> list[Path]:
    """What belongs to the project: as git sees it, or in a source archive every file outside generated folders."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        return [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        return [file for file in ROOT.rglob("*") if not SKIPPED & set(file.relative_to(ROOT).parts)]


def text_files() -> list[Path]:
    return [file for file in project_files() if file.is_file() and b"\0" not in file.read_bytes()[:8192]]


def test_no_file_names_a_path_of_one_machine() -> None:
    files = text_files()
    assert ROOT / "pyproject.toml" in files
    hits = [
        f"{file.relative_to(ROOT)}:{i}"
        for file in files
        for i, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert hits == []


def test_links_lead_to_files_of_the_project() -> None:
    """A link to another place is broken in every other clone, and a command that writes below it fails there."""
    links = [file for file in project_files() if file.is_symlink()]
    assert links  # of `.typing`
    outside = [file for file in links if file.readlink().is_absolute() or not file.resolve().is_relative_to(ROOT)]
    assert outside == [] and all(file.exists() for file in links)
