"""The server that forks ranks and commands goes on when a client ends at any point of its request."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

import pytest

from headway.launcher.hosts.forked import ForkServer


def ask(server: ForkServer, body: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(server.path))
        if body:
            with Path(os.devnull).open("wb") as nowhere:
                socket.send_fds(connection, [body[:8]], [nowhere.fileno()] * 2)
            with contextlib.suppress(BrokenPipeError):  # it may have given up already
                connection.sendall(body[8:])


WHOLE = json.dumps({"arguments": ["--version"], "env": {}, "cwd": "/"}).encode()
LENGTH = len(WHOLE).to_bytes(8, "little")


@pytest.mark.parametrize(
    "body",
    [b"", LENGTH[:3], LENGTH, LENGTH + WHOLE[:20], LENGTH + WHOLE],
    ids=["nothing", "a part of the length", "the length", "a part", "all"],
)
def test_a_client_that_ends_early_does_not_end_the_server(fork_server, headway, body):
    ask(fork_server, body)
    assert headway.run("--version").returncode == 0
    assert fork_server.is_running()
