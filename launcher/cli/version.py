"""`headway --version`."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def version_line() -> str:
    """`headway 0.1.0`, followed by the commit in a git checkout; `+` marks uncommitted changes."""
    try:
        version = importlib.metadata.version("headway")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    commit = None
    if (Path(__file__).resolve().parents[2] / ".git").exists():  # not an enclosing repository of an installation
        from headway.launcher.run.machine import git_commit

        commit = git_commit()
    return f"headway {version}" + (f" ({commit[:12]}{'+' if commit.endswith('+') else ''})" if commit else "")
