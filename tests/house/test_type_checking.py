"""Type checkers see our packages: a wrong call is an error, not an unknown."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SOURCE = """\
import yaml
from headway.launcher.spec.yamlio import parse_yaml

good = parse_yaml("a: 1", "x.yaml").value
bad = parse_yaml(3, "x.yaml")
worse = yaml.compose_nothing("a")
"""


def test_pyright_accepts_a_right_call_and_rejects_a_wrong_one(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    (tmp_path / "calls.py").write_text(SOURCE)
    settings = {"extraPaths": [str(ROOT / ".typing")], "reportMissingModuleSource": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-P", "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "calls.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = [
        (item["range"]["start"]["line"] + 1, item.get("rule"))
        for item in json.loads(done.stdout)["generalDiagnostics"]
        if item["severity"] == "error"
    ]
    # line 6: `yaml` is PyYAML with its types, not our folder of that name
    assert found == [(5, "reportArgumentType"), (6, "reportAttributeAccessIssue")]


def test_what_is_checked_are_the_packages_themselves_and_the_tests() -> None:
    """Through links in a folder whose name begins with a dot pyright finds no files, and reports no errors either."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["pyright"]
    assert set(settings["include"]) == {"launcher", "model", "data", "parallel", "kernels", "tests"}
    assert "exclude" not in settings
    for folder in settings["include"]:
        assert (ROOT / folder).is_dir() and not (ROOT / folder).is_symlink()
