"""Every row of the matrix in docs/faults.md has a test, where it says."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text()
ROWS = re.findall(r"^\| (F\d+) \|.*\[(\S+)\]\(\S+\) \|$", PAGE, re.MULTILINE)


def test_the_matrix_is_whole():
    assert [row for row, _ in ROWS] == [f"F{n}" for n in range(1, 31)]


def test_every_row_is_named_by_a_test_in_the_file_it_points_to():
    for row, where in ROWS:
        path = ROOT / where
        files = sorted(path.glob("test_*.py")) if path.is_dir() else [path]
        if path.name == "soak.py":
            files = [path.with_name("test_soak.py")]
        assert files and any(re.search(rf"\b{row}\b", file.read_text()) for file in files), (row, where)
