"""Type checkers see our packages: a wrong call is an error, not an unknown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SOURCE = """\
import yaml
from headway.launcher.yamlio import parse_yaml

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
