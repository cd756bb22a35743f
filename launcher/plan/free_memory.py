"""How much memory the processes of this host can still take."""

from __future__ import annotations

from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")

_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and use of a control group, in versions 2 and 1."""


def available_bytes() -> float:
    """The least of what the host has available and what the control groups of this process leave.

    What a group uses holds file caches too, which the kernel would give up: taken off, they make this figure too small
    rather than too large. Infinite where nothing says.
    """
    return min([_host(), *_groups(Path("/proc/self/cgroup"))])


def _host() -> float:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return float("inf")
    kib = {line.partition(":")[0]: line.split()[1] for line in lines if len(line.split()) > 1}
    return float(kib["MemAvailable"]) * 1024 if "MemAvailable" in kib else float("inf")


def _groups(listing: Path) -> list[float]:
    """What each group that this process is in, and those above it, have left."""
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        top = GROUPS if not kinds else GROUPS / "memory"
        if kinds and "memory" not in kinds.split(","):
            continue
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group == top.parent:
                break
            left += [n for names in _FILES if (n := _left(group, *names)) is not None]
    return left


def _left(group: Path, limit: str, used: str) -> float | None:
    try:
        most, now = (group / limit).read_text().strip(), int((group / used).read_text())
        return None if most == "max" or int(most) >= 1 << 60 else max(0.0, float(int(most) - now))
    except (OSError, ValueError):
        return None
