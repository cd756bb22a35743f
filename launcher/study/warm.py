"""Warm ranks for the cells of a study: forked from a process that has imported everything.

A cold rank spends about five seconds on imports, which is much of a short cell. Warm and cold ranks train alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from headway.launcher.hosts.forked import VARIABLE, ForkServer
from headway.launcher.spec.spec import Spec


class WarmRanks:
    """The fork server of a study, if one pays off: for two or more cells whose ranks train on the CPU of this host.

    The server imports while the first cell starts, so nothing waits for it: `environment` is empty until it is ready,
    and again if it has ended. Cells then start cold. A server that the environment names already is used instead.
    """

    def __init__(self, cells: Sequence[Spec]) -> None:
        pays = len(cells) > 1 and VARIABLE not in os.environ and all(_on_this_cpu(spec) for spec in cells)
        self._server = ForkServer() if pays else None

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for the launcher of the next cell."""
        return self._server.environment if self._server is not None and self._server.is_ready() else {}

    def __enter__(self) -> WarmRanks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._server is not None:
            self._server.close()


def _on_this_cpu(spec: Spec) -> bool:
    launch = spec.launch
    on_cpu = launch.device == "cpu" or (launch.device == "auto" and not has_nvidia_gpu())
    return on_cpu and launch.hosts == 1 and launch.method == "torchrun"


def has_nvidia_gpu() -> bool:
    """Whether this host has the device file of an NVIDIA GPU that `CUDA_VISIBLE_DEVICES` does not hide."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and any(Path("/dev").glob("nvidia[0-9]*"))
