"""Import a library without an optional dependency of it that may be broken."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """Make a package look as if it were not installed, unless it is already imported.

    transformers imports torchvision if it is installed. A torchvision built for another torch would make that fail.
    """
    if name in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]


@contextlib.contextmanager
def hidden_if_broken(name: str) -> Iterator[None]:
    """Make a package that is installed but cannot be imported look as if it were not installed."""
    try:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    except Exception:  # whatever a library for another torch raises
        with hidden(name):
            yield
    else:
        yield
