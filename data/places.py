"""Where a relative path of a spec was looked for and is not; what messages about a missing file say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_LOOKED: dict[str, tuple[Path, ...]] = {}
"""Path as written -> folders it was looked for in, for paths that are in none of them. Read by messages alone."""


def remember(written: str, folders: Sequence[Path]) -> None:
    """Keep for messages that the relative path `written` is in none of `folders`."""
    _LOOKED[str(Path(written))] = tuple(folders)


def looked_for(path: Path | str) -> str:
    """`; looked for /a/x and /b/x`: every place of a relative path, as absolute paths; empty for an absolute one."""
    path = Path(path)
    if path.is_absolute():
        return ""
    folders = dict.fromkeys([Path.cwd(), *_LOOKED.get(str(path), ())])
    return f"; looked for {' and '.join(str(folder / path) for folder in folders)}"
