"""Commands of one installed checkout, with their wall time, CPU time, memory and page faults."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command took. Times in seconds, memory in bytes; children that it waited for are included."""

    wall_s: float
    cpu_s: float
    system_s: float
    peak_bytes: int
    minor_faults: int
    lines: tuple[tuple[float, str], ...]  # (seconds since the start, line of stdout)
    err: str = field(repr=False, default="")

    def first(self, wanted: Callable[[str], bool]) -> float:
        """Seconds from the start to the first such line."""
        return next(at for at, line in self.lines if wanted(line))

    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A checkout with an environment in `.venv`."""

    root: Path

    def headway(self, words: Sequence[str], *, cwd: Path) -> Ran:
        """Run `headway WORDS`. Raises RuntimeError with its output if it fails."""
        return _run([str(self.root / ".venv" / "bin" / "headway"), *words], cwd)

    def python(self, code: str, words: Sequence[str], *, cwd: Path) -> Ran:
        """Run `code` in the environment of the checkout."""
        return _run([str(self.root / ".venv" / "bin" / "python"), "-P", "-c", code, *words], cwd)


def _run(command: list[str], cwd: Path) -> Ran:
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        child = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=err, text=True)
        assert child.stdout is not None
        lines = tuple((time.perf_counter() - start, line.rstrip("\n")) for line in child.stdout)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        said = err.read()
    if child.returncode:
        text = "\n".join([line for _, line in lines[-20:]] + said.splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command[:4])} ... ended with {child.returncode}:\n{text}")
    return Ran(
        wall_s=wall,
        cpu_s=used.ru_utime + used.ru_stime,
        system_s=used.ru_stime,
        peak_bytes=used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        minor_faults=used.ru_minflt,
        lines=lines,
        err=said,
    )
