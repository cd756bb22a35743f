"""Dotted keys of the files that `key=value` arguments change, for shell completion.

Collecting the keys imports PyTorch, which takes seconds. The keys are therefore cached in the user's cache folder until
a source file that declares keys changes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_DECLARED_IN = ("launcher/spec", "model", "parallel", "data")


def keys_of(kind: str) -> dict[str, list[str]]:
    """Every key with a value in files of a kind ("spec" or "corpus") -> its values if they can be listed."""
    cached = _folder() / f"keys-{kind}-{_stamp()}.txt"
    try:
        lines = cached.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = list(_lines(kind))
        with suppress(OSError):
            _write(cached, "\n".join(lines))
    return {key: values.split() for key, _, values in (line.partition(" ") for line in lines)}


def _lines(kind: str) -> Iterator[str]:
    """Lines of the cache file: `key value value ...`."""
    from headway.launcher.cli.schema import model_of
    from headway.launcher.spec.advice import shown
    from headway.launcher.spec.fields import Shape, paths, root_shape

    root = root_shape(model_of(kind))
    for path in dict.fromkeys(paths(root, {})):
        *above, last = path.split(".")
        parent = reduce(Shape.child, above, root)
        shape = parent.child(last)
        if (shape.has_keys or shape.values is not None) and not shape.scalars:
            continue
        values = [*shape.literals, *shape.words, *((True, False) if bool in shape.scalars else ())]
        if parent.variants and last == parent.discriminator:
            values = list(parent.variants)
        yield " ".join([path, *(shown(value) for value in values)])


def _stamp() -> str:
    """Paths, sizes and modification times of the source files that declare keys."""
    found = hashlib.sha256()
    for folder in _DECLARED_IN:
        for file in sorted((_ROOT / folder).rglob("*.py")):
            status = file.stat()
            found.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]


def _folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "headway"


def _write(path: Path, text: str) -> None:
    """Write the file atomically, so that two shells can do it at the same time, and delete older lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)
    for old in path.parent.glob(f"{path.name.rpartition('-')[0]}-*.txt"):
        if old != path:
            old.unlink(missing_ok=True)
