"""Whether the kernel ended a rank because memory was short: it does so with SIGKILL and tells nobody."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
KERNEL_LOG = Path("/dev/kmsg")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_RECORD_BYTES = 8192  # the kernel hands out one whole record at each read, and none is longer
_ADVICE = (
    "use a smaller train.micro_batch (auto finds one that fits), parallel.recompute=selective or block, or fewer "
    "processes on a host"
)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The control group of a process: where the kernel counts those it has ended, how many they were, its limit."""

    counter: Path
    before: int
    limit: Path


class MemoryWatch:
    """Remembers the groups of processes while they live, so that their counters can be compared afterwards.

    What cannot be read (no control groups, a log of the kernel for administrators alone) is left out.
    """

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}
        self._log: int | None = None
        with contextlib.suppress(OSError):
            self._log = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._log, 0, os.SEEK_END)  # what it says from now on
        self._said = ""

    def close(self) -> None:
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def note(self, pid: int) -> None:
        """Process `pid` runs now."""
        group = _group_of(pid)
        if group is not None:
            self._groups[pid] = group

    def reason(self, pid: int) -> str | None:
        """Why process `pid`, which was ended by SIGKILL, was; None where nothing says that memory was short."""
        if re.search(rf"Killed process {pid} \(", self._kernel_says()):
            return f"the kernel ended it because memory ran out (it says so in {KERNEL_LOG}); {_ADVICE}"
        group = self._groups.get(pid)
        if group is None or (now := _count(group.counter)) is None or now <= group.before:
            return None
        limit = _bytes(group.limit)
        of = "" if limit is None else f", limit {limit / 2**30:.2f} GiB"
        return (
            f"the kernel ended processes because memory ran out (oom_kill in {group.counter}: {group.before} before, "
            f"{now} now{of}); {_ADVICE}"
        )

    def _kernel_says(self) -> str:
        while self._log is not None:
            try:
                part = os.read(self._log, _RECORD_BYTES)
            except BrokenPipeError:  # records were overwritten before they were read; the next read goes on behind them
                continue
            except OSError:  # no more, for now
                break
            if not part:
                break
            self._said += part.decode(errors="replace")
        return self._said


def _group_of(pid: int) -> _Group | None:
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return None
    places: list[tuple[Path, str, str]] = []
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        inside = path.lstrip("/")
        if number == "0":  # version 2: one tree for everything
            places += [(GROUPS / inside, "memory.events", "memory.max")]
        elif "memory" in kinds.split(","):
            # A container may be shown the path that its host sees, with its own group mounted at the top.
            roots = [GROUPS / "memory" / inside, GROUPS / "memory"]
            places += [(root, "memory.oom_control", "memory.limit_in_bytes") for root in roots]
    for folder, counter, limit in places:
        before = _count(folder / counter)
        if before is not None:
            return _Group(counter=folder / counter, before=before, limit=folder / limit)
    return None


def _count(path: Path) -> int | None:
    try:
        found = _COUNT.search(path.read_text())
    except OSError:
        return None
    return int(found[1]) if found else None


def _bytes(path: Path) -> int | None:
    """A limit of memory; None where there is none."""
    try:
        value = int(path.read_text())
    except (OSError, ValueError):  # "max"
        return None
    return value if value < 1 << 60 else None  # version 1 writes a number of pages that nobody has
