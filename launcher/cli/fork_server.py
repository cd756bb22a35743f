"""The fork server: fork ranks and commands from a process that has imported all modules.

`headway.launcher.hosts.forked` starts the server (`headway fork-server SOCKET OWNER PADDING`) and is its client.
`_Agent` replaces torchrun: it forks the ranks of one start, runs their store, and ends all ranks if one fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from headway.launcher.base.command import COMMAND, die_with_parent

_GRACE_S = 30.0  # time for ranks to end after SIGTERM, as under torchrun
_MODULES = (
    "headway.launcher.cli.main",
    "headway.launcher.launch.start",
    "headway.launcher.train.loop",
    "headway.launcher.train.worker",
    "headway.parallel.pipeline",
    "deepspeed.runtime.pipe.engine",
    "safetensors.torch",
    "torch._dynamo",  # imported by ranks that recompute activations or compile
    "scipy.special",  # by every rank at its first validation
    "torch.optim.adamw",
)


def serve(path: Path, owner: int, command: Callable[[list[str]], int]) -> int:
    """Serve until the process `owner` ends the server. Returns 1 if forking would not be safe."""
    die_with_parent(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # while it imports
    if os.getppid() != owner:
        return 1
    _import_everything()
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        print(f"{threads} threads run after the imports, so forking is not safe", file=sys.stderr)
        return 1
    with socket.socket(socket.AF_UNIX) as door:
        hidden = path.with_name(".socket")
        door.bind(str(hidden))
        door.listen(64)
        hidden.rename(path)  # clients can connect from here on
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        server = _Server(door, command)
        signal.signal(signal.SIGHUP, server.drain)
        server.serve()


def _import_everything() -> None:
    """Import all modules that ranks and launchers import, including DeepSpeed's engines and TensorBoard.

    Also identify the sources and versions once for all of them: they run what is imported here.
    """
    from headway.launcher.board.writer import writer_class
    from headway.launcher.run.identity import code_hash
    from headway.launcher.run.machine import git_commit, versions
    from headway.parallel.deepspeed_options import quiet_deepspeed

    writer_class()
    quiet_deepspeed(cpu=True)
    for name in _MODULES:
        importlib.import_module(name)
    for identify in (code_hash, versions, git_commit):
        identify()


class _Server:
    """Fork an agent for each request, send its exit status, and end the agent if the client disconnects."""

    def __init__(self, door: socket.socket, command: Callable[[list[str]], int]) -> None:
        self._door, self._command, self._clients = door, command, dict[int, socket.socket]()
        self._hangup: dict[int, int] = {}  # process -> the signal that it gets if its client disconnects
        self._draining = False

    def drain(self, *_: object) -> None:
        """Exit when the last client has gone. The owner has died; launchers that it left behind stop their ranks."""
        self._draining = True

    def serve(self) -> NoReturn:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._door, selectors.EVENT_READ)
                while self._clients or not self._draining:
                    for key, _ in selector.select(0.02):
                        if key.fileobj is self._door:
                            connection = self._door.accept()[0]
                            if self._start(connection):
                                selector.register(connection, selectors.EVENT_READ)
                        else:  # clients send nothing after the request: this one has disconnected
                            selector.unregister(key.fileobj)
                            self._end(key.fileobj)
                    for connection in self._collect():
                        with contextlib.suppress(KeyError, ValueError):
                            selector.unregister(connection)
                        connection.close()
            sys.exit(0)
        finally:
            for pid in self._clients:
                _kill_group(pid)

    def _start(self, connection: socket.socket) -> bool:
        """Start what the client asks for; False if the client ended before it had asked."""
        request, descriptors = _received(connection)
        if request is None:
            for descriptor in descriptors:
                os.close(descriptor)
            connection.close()
            return False
        server, pid = os.getpid(), _fork()
        if pid == 0:
            self._door.close()
            for other in (connection, *self._clients.values()):
                other.close()
            program = partial(_command_line, self._command) if "arguments" in request else _agent
            _become(program, request, descriptors, server)
        for descriptor in descriptors:
            os.close(descriptor)
        self._clients[pid] = connection
        if "at_hangup" in request:
            self._hangup[pid] = request["at_hangup"]
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        return True

    def _end(self, connection: Any) -> None:
        for pid, other in self._clients.items():
            if other is connection and pid in self._hangup:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, self._hangup[pid])
            elif other is connection:
                _kill_group(pid)

    def _collect(self) -> list[socket.socket]:
        closed = []
        for pid in list(self._clients):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                connection = self._clients.pop(pid)
                self._hangup.pop(pid, None)
                with contextlib.suppress(OSError):
                    connection.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
                closed.append(connection)
        return closed


def _received(connection: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """(the request, its descriptors); None for the request if the client has ended before all of it was sent."""
    descriptors: list[int] = []
    with contextlib.suppress(ConnectionError):
        size, descriptors, *_ = socket.recv_fds(connection, 8, 2)
        body, want = b"", int.from_bytes(size, "little") if len(size) == 8 else -1
        while len(body) < want and (part := connection.recv(want - len(body))):
            body += part
        if len(body) == want:
            return json.loads(body), descriptors
    return None, descriptors


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


# ---------------------------------------------------------------- in forked processes


_BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _fork() -> int:
    """Fork. The child starts with `_BLOCKED` signals blocked, so that none meets a handler of this process in it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
    return pid


def _become(
    program: Callable[[dict[str, Any]], int], request: dict[str, Any], descriptors: list[int], server: int
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        for signum in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)
        die_with_parent(signal.SIGTERM)  # the server ends it if its client goes: without the server, nobody would
        if os.getppid() != server:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
        for place, descriptor in zip((1, 2), descriptors, strict=True):
            os.dup2(descriptor, place)
            os.close(descriptor)
        os.chdir(request["cwd"])
        code = program(request)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _command_line(command: Callable[[list[str]], int], request: dict[str, Any]) -> int:
    """Run `headway ARGUMENTS` through its entry point `command`."""
    os.environ.clear()
    os.environ.update(request["env"])
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    arguments = request["arguments"]
    _show_as([*COMMAND, *arguments])
    return command(arguments)


def _agent(request: dict[str, Any]) -> int:
    return _Agent(request).run()


class _Agent:
    """Starts and supervises the ranks of one host, as torchrun does."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request, self._asked_s = request, None
        self._live: dict[int, int] = {}  # process -> rank
        self._failed: list[tuple[int, int, int]] = []  # (rank, process, status), in the order in which they ended
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run(self) -> int:
        count = self._request["processes"]
        pipes = [os.pipe() for _ in range(count)]
        for rank in range(count):
            pid = _fork()
            if pid == 0:
                for reader, writer in pipes:
                    os.close(writer)
                    if reader != pipes[rank][0]:
                        os.close(reader)
                _become_rank(self._request, rank, pipes[rank][0])
            self._live[pid] = rank
        # The store is created after the forks, because it starts threads.
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        for reader, writer in pipes:
            os.close(reader)
            with contextlib.suppress(BrokenPipeError):
                os.write(writer, str(store.port).encode())
            os.close(writer)
        while self._live:
            self._collect()
            time.sleep(0.02)
        for rank, pid, status in self._failed:
            print(f"  rank      : {rank} (local_rank: {rank})\n  exitcode  : {status} (pid: {pid})", file=sys.stderr)
        statuses = [status for *_, status in self._failed]
        return next((status for status in statuses if count == 1 and status > 0), int(bool(statuses)))

    def _collect(self) -> None:
        for pid in list(self._live):
            found, raw = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            rank, status = self._live.pop(pid), os.waitstatus_to_exitcode(raw)
            if status:
                self._failed.append((rank, pid, status))
                self._ask()
        if self._asked_s is not None and time.monotonic() - self._asked_s > _GRACE_S:
            self._send(signal.SIGKILL)

    def _ask(self, *_: object) -> None:
        self._asked_s = self._asked_s or time.monotonic()
        self._send(signal.SIGTERM)

    def _send(self, signum: int) -> None:
        for pid in self._live:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)


def _become_rank(request: dict[str, Any], rank: int, port_from: int) -> NoReturn:
    code = 1
    try:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
        die_with_parent()
        port = os.read(port_from, 16).decode()
        os.close(port_from)
        count = str(request["processes"])
        os.environ.clear()
        os.environ.update(request["env"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
        sys.argv = list(request["worker"])
        _show_as([sys.executable, "-P", "-m", *request["worker"]])
        code = importlib.import_module(request["worker"][0]).main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _show_as(words: list[str]) -> None:
    """Make the kernel show `words` as the command line of this process. Launchers identify a rank by it.

    The kernel reads the command line from the memory that contained the arguments of the server.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    text = b"\0".join(os.fsencode(word) for word in words)[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)
