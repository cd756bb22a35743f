"""Size of a folder on disk. Links are never followed."""

from __future__ import annotations

import os
from pathlib import Path


def bytes_below(folder: Path) -> int:
    """Bytes of all regular files in and below a folder. Files that disappear during the scan count as 0."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    total += bytes_below(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    total += _size(entry)
    except OSError:
        return total
    return total


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:
        return 0
