"""Find out whether the kernel killed a rank because memory ran out. It sends SIGKILL without notifying the launcher."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
KERNEL_LOG = Path("/dev/kmsg")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
_RECORD_BYTES = 8192  # each read of the kernel log returns one whole record, and no record is longer
_ADVICE = (
    "use a smaller train.micro_batch (auto finds one that fits), parallel.recompute=selective or block, or fewer "
    "processes on a host"
)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The control group of a process: file of the kernel's out-of-memory kill counter, its first value, limit file."""

    counter: Path
    before: int
    limit: Path


class MemoryWatch:
    """Records the control groups of live processes, so that their counters can be compared after a process has ended.

    Sources that cannot be read are skipped, such as missing control groups or a kernel log for administrators only.
    """

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}
        self._log: int | None = None
        with contextlib.suppress(OSError):
            self._log = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._log, 0, os.SEEK_END)  # read only records from now on
        self._said = ""

    def close(self) -> None:
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def note(self, pid: int) -> None:
        """Record the control group of process `pid`, which runs now."""
        group = _group_of(pid)
        if group is not None:
            self._groups[pid] = group

    def reason(self, pid: int) -> str | None:
        """Why the kernel sent SIGKILL to process `pid`; None if there is no sign that memory ran out."""
        if re.search(rf"Killed process {pid} \(", self._kernel_says()):
            return f"the kernel killed it because memory ran out (source: {KERNEL_LOG}); {_ADVICE}"
        group = self._groups.get(pid)
        if group is None or (now := _count(group.counter)) is None or now <= group.before:
            return None
        limit = _bytes(group.limit)
        of = "" if limit is None else f", limit {limit / 2**30:.2f} GiB"
        return (
            f"the kernel killed processes because memory ran out (oom_kill in {group.counter}: {group.before} before, "
            f"{now} now{of}); {_ADVICE}"
        )

    def _kernel_says(self) -> str:
        while self._log is not None:
            try:
                part = os.read(self._log, _RECORD_BYTES)
            except BrokenPipeError:  # records were overwritten before they were read; the next read skips them
                continue
            except OSError:  # no more records for now
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
        if number == "0":  # cgroup version 2: one hierarchy for all controllers
            places += [(GROUPS / inside, "memory.events", "memory.max")]
        elif "memory" in kinds.split(","):
            # cgroup version 1. In a container, the path may be that of the host, while the group is mounted at the top.
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
    """A memory limit in bytes; None if there is no limit."""
    try:
        value = int(path.read_text())
    except (OSError, ValueError):  # "max"
        return None
    return value if value < 1 << 60 else None  # cgroup version 1 writes a huge number for "no limit"
