"""What is recorded about the source tree that runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from headway.launcher.run import machine


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_changed_tree_is_marked_but_not_for_records_of_studies(tmp_path, monkeypatch):
    source, record = tmp_path / "launcher" / "run" / "machine.py", tmp_path / "docs" / "results" / "x.json"
    for file in (source, record):
        file.parent.mkdir(parents=True)
        file.write_text("1")
    monkeypatch.setattr(machine, "__file__", str(source))
    read = machine.git_commit.__wrapped__  # without the cache
    assert read() is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "x")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    record.write_text("2")
    assert read() == commit
    source.write_text("2")
    assert read() == f"{commit}+"
