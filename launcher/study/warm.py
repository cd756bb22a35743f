"""A fork server for the cells of a study: launchers and ranks come from a process that has imported everything.

A cold launcher and its rank spend about seven seconds on imports, which is much of a short cell. Warm and cold cells
train alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

from headway.launcher.hosts.forked import VARIABLE, ForkServer
from headway.launcher.spec.spec import Spec
from headway.launcher.study.jobs import on_this_cpu


class Warm:
    """The fork server of a study, if one pays off: for two or more cells whose ranks train on the CPU of this host.

    `server`, its socket, is None until it is ready, and again if it has ended. Cells then start cold. A server that
    the environment names already is used instead.
    """

    def __init__(self, cells: Sequence[Spec]) -> None:
        able = len(cells) > 1 and all(on_this_cpu(spec) and spec.launch.method == "torchrun" for spec in cells)
        self._given = os.environ.get(VARIABLE) if able else None
        self._server = ForkServer() if able and self._given is None else None

    @property
    def server(self) -> str | None:
        """The socket of the server that cells are forked from; None: they start cold."""
        if self._server is not None:
            return str(self._server.path) if self._server.is_ready() else None
        return self._given

    @property
    def starts(self) -> bool:
        """Whether the server still imports, so that a cell which waits for it starts sooner than a cold one."""
        return self._server is not None and self._server.is_running() and not self._server.is_ready()

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._server is not None:
            self._server.close()
