"""Resolve relative paths in a file: against the working folder first, then against the folder of the file.

A path that exists in the working folder is not changed. A path that exists only in the folder of the file becomes
absolute, so that the recorded spec in a run folder works from any working folder. Paths in arguments are not changed:
they are always relative to the working folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from headway.data.places import remember
from headway.launcher.spec.yamlio import Node

OF_A_RUN = ("init.run", "init.weights")
"""Keys whose path may be followed by @STEP."""
OF_A_SPEC = ("data.source.path", "data.source.sources.path", *OF_A_RUN)
SETS = "data.validation."
"""Validation sets: the keys below it are names, the values paths."""
OF_A_CORPUS = ("corpus.paths", "validation.paths", "tokenizer.path")
_AT_STEP = re.compile(r"(.+)@([0-9]{1,10})", re.DOTALL)


def place_paths(layer: Node, folder: Path) -> None:
    """Make paths of `layer` absolute if they exist only in `folder`, the folder of its file. Keys must be nested."""
    for key, node in _leaves(layer):
        for item in node.value if isinstance(node.value, list) else [node]:
            if _names_path(key) and isinstance(item.value, str):
                item.value = _placed_run(item.value, folder) if _names_run(key) else _placed(item.value, folder)


def split_step(written: str) -> tuple[str, int] | None:
    """(PATH, STEP) of `PATH@STEP`; None for another text. The path itself may contain `@`."""
    match = _AT_STEP.fullmatch(written)
    return None if match is None else (match[1], int(match[2]))


def _names_run(key: str) -> bool:
    return key in OF_A_RUN or key.endswith(tuple(f".{name}" for name in OF_A_RUN))


def _placed_run(written: str, folder: Path) -> str:
    placed, parts = _placed(written, folder), split_step(written)
    if placed != written or parts is None:
        return placed
    return f"{_placed(parts[0], folder)}@{written.rpartition('@')[2]}"


def _names_path(key: str) -> bool:
    if key.startswith("variants."):  # a study, whose variants contain keys of a spec
        return key.endswith(tuple(f".{name}" for name in OF_A_SPEC)) or f".{SETS}" in key
    return key in OF_A_SPEC or key in OF_A_CORPUS or key.startswith(SETS)


def _leaves(node: Node, prefix: str = "") -> Iterator[tuple[str, Node]]:
    for key, item in node.value.items():
        if item.is_mapping:
            yield from _leaves(item, f"{prefix}{key}.")
        elif isinstance(item.value, list) and any(part.is_mapping for part in item.value):
            for part in item.value:
                if part.is_mapping:
                    yield from _leaves(part, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _placed(written: str, folder: Path) -> str:
    try:
        if not written or Path(written).expanduser().is_absolute() or _there(Path(), written):
            return written
        folder = folder.resolve()
        if _there(folder, written):
            return str((folder / written).resolve())
        remember(written, [Path.cwd(), folder])
    except (OSError, ValueError, RuntimeError):  # not a file name: its reader reports it; RuntimeError: no home of ~x
        pass
    return written


def _there(folder: Path, written: str) -> bool:
    """Whether the file or folder exists, or a file that matches the pattern."""
    if (folder / written).exists():
        return True
    parts = Path(written).parts
    wild = next((place for place, part in enumerate(parts) if set(part) & set("*?[")), None)
    if wild is None:
        return False
    return next(folder.joinpath(*parts[:wild]).glob(str(Path(*parts[wild:]))), None) is not None
