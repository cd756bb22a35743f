"""What CONTRIBUTING.md, CHANGELOG.md, CITATION.cff and the hooks of pre-commit say is true of this repository."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "README.md"])
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (ROOT / target).exists()] == []


def test_the_readme_links_to_the_pages_for_contributors() -> None:
    readme = (ROOT / "README.md").read_text()
    pages = ["CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "docs/architecture.md"]
    assert [page for page in pages if f"]({page})" not in readme] == []


def test_make_targets_and_test_files_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    lines = re.findall(r"^    make ([\w -]+?)(?:\s{2,}|\s*#|$)", CONTRIBUTING, re.M) + re.findall(
        r"`make ([\w-]+)`", CONTRIBUTING
    )
    named = {word for line in lines for word in line.split()}
    assert len(named) > 8 and named - targets == set()
    assert [path for path in re.findall(r"pytest (tests/\S+)", CONTRIBUTING) if not (ROOT / path).exists()] == []


def test_hooks_are_local_and_run_tools_that_the_environment_pins() -> None:
    pinned = (ROOT / "constraints.txt").read_text()
    for repository in read(".pre-commit-config.yaml")["repos"]:
        assert repository["repo"] == "local"
        for hook in repository["hooks"]:
            assert hook["language"] == "system" and {"id", "name", "entry"} <= set(hook)
            tool = hook["entry"].split()[0]
            assert tool.startswith(".venv/bin/")
            assert re.search(rf"^{tool.removeprefix('.venv/bin/')}(\[\w+\])?==", pinned, re.M), tool


def test_the_citation_is_a_cff_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["message"] and citation["title"] and citation["authors"] == [{"name": "The Headway authors"}]
    assert (str(citation["version"]), citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_the_changelog_has_this_version_below_what_is_not_released() -> None:
    versions = re.findall(r"^## \[(.+?)\]", CHANGELOG, re.M)
    assert versions[:2] == ["Unreleased", PROJECT["version"]]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", CHANGELOG, re.M)) <= kinds
