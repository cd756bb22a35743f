"""Description of this machine and this installation, recorded in every run and result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("headway", "torch", "deepspeed", "mosaicml-streaming", "tokenizers", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def machine() -> dict[str, Any]:
    """Processor, number of cores available to this process, memory, platform and GPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "platform": f"{platform.system()} {platform.machine()}",
        "gpu": _gpu_name(),
    }


@cache
def git_commit() -> str | None:
    """Commit of the source tree, followed by `+` if it has uncommitted changes; None outside a checkout.

    Files in docs/results do not count: studies write their own records there. The state is read once in a process:
    sources that change later are not those that run.
    """
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        if commit.returncode:
            return None
        status = ["git", "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs/results"]
        dirty = subprocess.run(status, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _gpu_name() -> str | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()
