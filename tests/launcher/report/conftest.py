"""Study folders for the tests of reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from study_folders import GAIN, StudyFolder

from headway.launcher.report.study import report

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of four variants and three seeds in which nothing went wrong, with its report."""
    folder = StudyFolder(tmp_path_factory.mktemp("few") / "demo", list(GAIN), [1, 2, 3])
    report(folder.write())
    return folder.out


@pytest.fixture(scope="session")
def many_names() -> list[str]:
    """The names of all variants of yaml/studies/all-mechanisms.yaml, 23 or more."""
    names = list(yaml.safe_load((ROOT / "yaml/studies/all-mechanisms.yaml").read_text())["variants"])
    assert len(names) >= 23
    return names


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory, many_names: list[str]) -> Path:
    """A study with these names, with its report."""
    folder = StudyFolder(tmp_path_factory.mktemp("many") / "demo", many_names, [1, 2])
    report(folder.write())
    return folder.out


@pytest.fixture(scope="session")
def full(few: Path) -> Path:
    """The same study, for tests that do not need several."""
    return few


@pytest.fixture
def small(tmp_path, monkeypatch) -> StudyFolder:
    """Two variants and two seeds, not yet written; figures are left out (they take most of the time)."""
    monkeypatch.setattr("headway.launcher.report.study.draw_all", lambda *_: [])
    return StudyFolder(tmp_path / "demo", ["gqa", "rgqa-k2"], [1, 2])
