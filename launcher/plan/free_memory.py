"""How much more memory the processes of this host can use."""

from __future__ import annotations

from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")

_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Names of the files with limit and usage of a control group, in cgroup versions 2 and 1."""


def available_bytes() -> float:
    """Minimum of the host's available memory and the memory left in the control groups of this process.

    The usage of a group includes file caches, which the kernel could free. The result is therefore a lower bound of the
    memory left in the group. Infinite if no source can be read.
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
    """Bytes left in each control group of this process and in all their parents."""
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
