"""Optional dependencies of the speed options, and the error for options that are not available."""

from __future__ import annotations

import importlib.util

APEX_MODULES = ("amp_C", "fused_layer_norm_cuda")
"""Compiled modules that identify NVIDIA apex. The package `apex` on PyPI is a different project."""

FA3_MODULE = "flash_attn_interface"
FLA_MODULE = "fla"
LIGER_MODULE = "liger_kernel"


class LeverError(Exception):
    """A speed option of the spec is not available. The message names its key and the legal values."""

    exit_code = 64


def importable(module: str) -> bool:
    """Whether a top-level module is installed. Does not import it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # incomplete installation
        return False
