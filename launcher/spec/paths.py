"""Relative paths that a file gives: taken from the working folder, or else from the folder of the file.

What is in the working folder is left as it was written. A path that is there only beside the file that wrote it becomes
absolute, so that what is recorded of it (the spec in a run folder) can be used from any working folder. Arguments are
not looked at: they mean the working folder alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from headway.data.places import remember
from headway.launcher.spec.yamlio import Node

OF_A_SPEC = ("data.source.path", "init.weights")
OF_A_CORPUS = ("corpus.paths", "tokenizer.path")


def place_paths(layer: Node, folder: Path) -> None:
    """Make the paths absolute that one file of `folder` wrote (keys nested) and that are nowhere but beside it."""
    for key, node in _leaves(layer):
        for item in node.value if isinstance(node.value, list) else [node]:
            if _names_path(key) and isinstance(item.value, str):
                item.value = _placed(item.value, folder)


def _names_path(key: str) -> bool:
    if key.startswith("variants."):  # of a study, whose variants hold keys of a spec
        return key.endswith(tuple(f".{name}" for name in OF_A_SPEC))
    return key in OF_A_SPEC or key in OF_A_CORPUS


def _leaves(node: Node, prefix: str = "") -> Iterator[tuple[str, Node]]:
    for key, item in node.value.items():
        if item.is_mapping:
            yield from _leaves(item, f"{prefix}{key}.")
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
    except (OSError, ValueError, RuntimeError):  # no name of a file: what reads it says so; RuntimeError: no home of ~x
        pass
    return written


def _there(folder: Path, written: str) -> bool:
    """Whether the file or folder is there, or a file of the pattern."""
    if (folder / written).exists():
        return True
    parts = Path(written).parts
    wild = next((place for place, part in enumerate(parts) if set(part) & set("*?[")), None)
    if wild is None:
        return False
    return next(folder.joinpath(*parts[:wild]).glob(str(Path(*parts[wild:]))), None) is not None
