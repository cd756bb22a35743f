"""Ranks forked from a process that has imported everything: they start in about a second instead of ten.

`ForkServer` starts that process, on one host. Studies, the chaos drill, soak and tests use it, because they start many
short runs. While the environment variable HEADWAY_FORK_SERVER names its socket, launchers let it start their ranks.
Apart from that, the run is the same as with torchrun. The server itself is the hidden verb `headway fork-server`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.command import COMMAND
from headway.launcher.hosts.processes import state

VARIABLE = "HEADWAY_FORK_SERVER"
_TITLE_BYTES = 4096  # space for the command line that a rank shows in /proc
_READY_S = 120.0


class ForkServer:
    """Starts the process; use it in a `with` statement, around launchers that are given `environment`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="headway-fork-")
        self.path = Path(self._folder.name) / "socket"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        # Importing torch's compiler creates a folder. Without this variable it would be left in the temporary folder.
        env["TORCHINDUCTOR_CACHE_DIR"] = str(Path(self._folder.name) / "inductor")
        command = [*COMMAND, "fork-server", str(self.path), str(os.getpid())]
        log = (Path(self._folder.name) / "log").open("wb")
        self._process = subprocess.Popen(
            [*command, "x" * _TITLE_BYTES],
            env=env,
            stdin=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # Ctrl-C must not end the ranks before they have saved
        )
        log.close()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for launchers whose ranks the server shall start."""
        return {VARIABLE: str(self.path)}

    def wait_ready(self) -> None:
        """Wait until it has imported everything. Raises RuntimeError with the end of its log if it cannot start."""
        end = time.monotonic() + _READY_S
        while not self.path.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the fork server did not start: {self.path.with_name('log').read_text()[-2000:]}")
            time.sleep(0.02)

    def is_running(self) -> bool:
        """Whether it runs. It may still import."""
        return self._process.poll() is None

    def is_ready(self) -> bool:
        """Whether it runs and has imported everything."""
        return self.is_running() and self.path.exists()

    def close(self) -> None:
        """End the server and every rank it has started."""
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> ForkServer:
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Forked:
    """A process that the server has started, with the interface of `subprocess.Popen`.

    It is either a process that takes torchrun's place around ranks, or a `headway` command. `lost`: the server has
    ended before the process, so that its exit status is not known.
    """

    def __init__(self, server: str | Path, request: Mapping[str, Any], stdout: int, stderr: int) -> None:
        self.returncode: int | None = None
        self.lost = False
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(server))
            body = json.dumps({"cwd": str(Path.cwd()), **request}).encode()
            socket.send_fds(self._socket, [len(body).to_bytes(8, "little")], [stdout, stderr])
            self._socket.sendall(body)
            with self._socket.makefile("rb", buffering=0) as answer:
                self.pid: int = json.loads(answer.readline())["pid"]
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)

    @classmethod
    def ranks(cls, server: str, worker: list[str], processes: int, env: Mapping[str, str], stderr: int) -> Forked:
        """Start `processes` ranks in environment `env`. `worker`: module, whose `main()` is called, and arguments."""
        return cls(server, {"worker": worker, "processes": processes, "env": dict(env)}, 1, stderr)

    @classmethod
    def headway(cls, server: ForkServer, arguments: list[str], *, cwd: Path, log: int, **env: str) -> Forked:
        """Start `headway ARGUMENTS` in `cwd` with `env` added to the environment. Its output goes to `log`."""
        environment = {**console.plain_environment(), **server.environment, **env}
        return cls(server.path, {"arguments": arguments, "env": environment, "cwd": str(cwd)}, log, log)

    @classmethod
    def cell(cls, server: str, arguments: list[str], *, log: int, env: Mapping[str, str]) -> Forked:
        """Start `headway ARGUMENTS` in environment `env`, and stop it with SIGTERM if this process ends before it.

        Its output goes to `log`. Raises OSError or ValueError if no server answers.
        """
        request = {"arguments": arguments, "env": {**env, VARIABLE: server}, "at_hangup": int(signal.SIGTERM)}
        return cls(server, request, log, log)

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        if self.returncode is None and not self.lost:
            with contextlib.suppress(BlockingIOError):
                answer = self._answer()
                self._socket.close()
                self.lost = not answer
                self.returncode = json.loads(answer)["status"] if answer else None
        if self.lost and self.returncode is None and not state(self.pid).strip("Z"):
            self.returncode = -signal.SIGKILL
        return self.returncode

    def _answer(self) -> bytes:
        try:
            return self._socket.recv(4096)
        except ConnectionResetError:
            return b""

    def wait(self) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.01)
        return status
