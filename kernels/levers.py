"""What a lever of speed needs that may not be there, and how that is said."""

from __future__ import annotations

import importlib.util

APEX_MODULES = ("amp_C", "fused_layer_norm_cuda")
"""NVIDIA apex is known by its compiled modules: the package `apex` on PyPI is another project."""

FA3_MODULE = "flash_attn_interface"
LIGER_MODULE = "liger_kernel"


class LeverError(Exception):
    """A lever that the spec asks for cannot be used here. The message names its key and what is legal."""

    exit_code = 64


def importable(module: str) -> bool:
    """Whether a top-level module is installed; it is not imported for that."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a module that is half there
        return False
