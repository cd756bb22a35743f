"""Connections between the launchers of a run, which exchange lines of JSON. `connect` and `control` use them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

_LIMIT_BYTES = 4 << 20  # of one line: a spec, or the addresses of 4096 hosts
_SEND_S = 10.0


class Wire:
    """One end of a connection. Reads never block. `closed`: the other end has closed, or sent an invalid message."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket, self._buffer = connection, b""
        self._pending: deque[dict[str, Any]] = deque()
        self.closed, self.heard_s = False, time.monotonic()

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    @property
    def own_address(self) -> str:
        """IPv4 address of this end."""
        return self._socket.getsockname()[0]

    @property
    def address(self) -> str:
        """IPv4 address of the other end; empty after it has closed."""
        try:
            return self._socket.getpeername()[0]
        except OSError:
            return ""

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. Sets `closed` if that takes more than 10 s."""
        if self.closed:
            return
        try:
            self._socket.settimeout(_SEND_S)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.closed = True
        finally:
            self._socket.setblocking(False)

    def take(self) -> dict[str, Any] | None:
        """The next received message; None if there is none yet, or no more."""
        if not self._pending:
            self._read()
        return self._pending.popleft() if self._pending else None

    def _read(self) -> None:
        while not self.closed:
            try:
                part = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                part = b""
            if not part or len(self._buffer) > _LIMIT_BYTES:
                self.closed = True
                break
            self.heard_s = time.monotonic()
            self._buffer += part
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self.closed = True
                return
            self._pending.append(message)

    def end_sending(self) -> None:
        """Close the sending direction. Messages from the other end can still be received."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection at once. If unread messages are left here, the other end may lose messages that it has
        not read yet; `hang_up` avoids this.
        """
        self.closed = True
        self._socket.close()


def hang_up(wires: Iterable[Wire], seconds: float = 5.0) -> None:
    """Close connections once the other ends have closed and so have read everything, at the latest after `seconds`."""
    wires = list(wires)
    for wire in wires:
        wire.end_sending()
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(wire.closed for wire in wires):
        for wire in wires:
            while wire.take() is not None:
                pass
        time.sleep(0.02)
    for wire in wires:
        wire.close()


def interfaces() -> dict[str, str]:
    """IPv4 address of each network interface of this host that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:
                continue
            found[name] = socket.inet_ntoa(reply[20:24])
    return found
