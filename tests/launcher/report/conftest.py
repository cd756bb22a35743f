"""Study folders for the tests of reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_folders import GAIN, StudyFolder

from headway.launcher.report.study import report


@pytest.fixture(scope="session")
def full(tmp_path_factory) -> Path:
    """A study of four variants and three seeds in which nothing went wrong, with its report."""
    folder = StudyFolder(tmp_path_factory.mktemp("study") / "demo", list(GAIN), [1, 2, 3])
    report(folder.write())
    return folder.out


@pytest.fixture
def small(tmp_path, monkeypatch) -> StudyFolder:
    """Two variants and two seeds, not yet written; figures are left out (they take most of the time)."""
    monkeypatch.setattr("headway.launcher.report.study.draw_all", lambda result: [])
    return StudyFolder(tmp_path / "demo", ["gqa", "rgqa-k2"], [1, 2])
