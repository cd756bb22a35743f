"""Lazy import of mosaicml-streaming, which takes seconds and needs a workaround on CPU builds of torch."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

# A torch.library.Library unregisters its operators when it is collected, so it must outlive the import.
_keep: list[Any] = []


def import_streaming(submodule: str = "") -> ModuleType:
    """Import `streaming` (or `streaming.<submodule>`): 2 to 12 s the first time, so never at the top of a module."""
    name = f"streaming.{submodule}" if submodule else "streaming"
    if name in sys.modules:
        return sys.modules[name]
    _make_torchvision_importable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _make_torchvision_importable() -> None:
    """Make torchvision importable, which mosaicml-streaming imports.

    A CUDA build of torchvision cannot be imported with a CPU build of torch: its C library does not load, and the
    import fails with `operator torchvision::nms does not exist`. Declaring the two operators whose meta kernels it
    registers on import is enough; nothing here calls them. If torchvision can be imported, nothing is declared, because
    a second declaration would conflict with its C library.
    """
    import torch

    if torch.version.cuda is not None or "torchvision" in sys.modules:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _keep.append(library)
