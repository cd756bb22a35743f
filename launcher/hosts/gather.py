"""The first host's part of `connect`: admit the other hosts, compare them, and let all try to connect to each other."""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.hosts.faults import Fault
from headway.launcher.hosts.place import rendezvous_port
from headway.launcher.hosts.shared import Secret
from headway.launcher.hosts.wire import Wire, hang_up, interfaces
from headway.launcher.run.run_dir import difference
from headway.launcher.spec.spec import Spec

NEXT_STEP = "read its output on that host, then start the same commands again"
_AT_ONCE = 64  # connections that a host tries in parallel


def host_name(host: int, facts: Mapping[str, Any]) -> str:
    """Name of a host in messages."""
    return f"host {host} ({facts['name']}, {facts['address']})"


def open_door(spec: Spec) -> socket.socket:
    """Listening socket for the launchers of the other hosts. Raises SpecError if this host cannot listen there."""
    address, port = spec.launch.address, rendezvous_port(spec) + 1
    assert address is not None, "LaunchConfig requires it, and a Slurm job sets it"
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((socket.gethostbyname(address), port))
    except socket.gaierror as e:
        door.close()
        raise SpecError(
            f"launch.address: {address} has no IPv4 address ({e.strerror}); use another name, or an IPv4 address"
        ) from e
    except OSError as e:
        door.close()
        have = ", ".join(f"{at} ({name})" for name, at in interfaces().items())
        raise SpecError(
            f"launch.address: host 0 cannot listen at {address} port {port} ({e.strerror}); use an address of this "
            f"host, which has {have}, or another launch.port (the launchers use launch.port + 1)"
        ) from e
    door.listen(spec.launch.hosts + 16)
    door.setblocking(False)
    return door


class Hall:
    """The connected hosts. `facts` and `wires` are keyed by host number; `facts` includes the first host."""

    def __init__(self, spec: Spec, secret: Secret, own: dict[str, Any]) -> None:
        self.facts: dict[int, dict[str, Any]] = {0: own}
        self.wires: dict[int, Wire] = {}
        self._spec, self._secret = spec, secret

    @property
    def names(self) -> dict[int, str]:
        return {host: host_name(host, self.facts[host]) for host in sorted(self.facts)}

    def dismiss(self, error: HeadwayError) -> None:
        """Let every connected host end with the same error."""
        _turn_away(self.wires.values(), error)

    def admit(self, door: socket.socket, deadline: float) -> None:
        """Wait until all hosts are connected. Raises HeadwayError with the numbers of hosts missing at the deadline."""
        waiting: dict[Wire, str] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(door, selectors.EVENT_READ)
            while len(self.facts) < self._spec.launch.hosts:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise HeadwayError(self._missing())
                for key, _ in selector.select(min(left, 0.2)):
                    if key.fileobj is door and (wire := _accept(door)) is not None:
                        waiting[wire] = secrets.token_hex(16)
                        selector.register(wire, selectors.EVENT_READ)
                        wire.send({"challenge": waiting[wire], "sign": self._secret.sign})
                for wire in list(waiting):
                    message = wire.take()
                    if message is None and not wire.closed:
                        continue
                    selector.unregister(wire)
                    challenge = waiting.pop(wire)
                    if message is None or not self._take_in(wire, challenge, message):
                        wire.close()
        for wire in waiting:
            wire.close()

    def _take_in(self, wire: Wire, challenge: str, message: dict[str, Any]) -> bool:
        """Whether the host is admitted. Raises SpecError if it does not see the run folder."""
        host = message.get("host")
        if not isinstance(host, int) or not 0 < host < self._spec.launch.hosts:
            return False
        if message.get("proof") is None:
            error = SpecError(
                f"host {host} ({message.get('name', 'unknown')!s:.64}, {wire.address}) does not see "
                f"{self._secret.path}, which host 0 wrote: all hosts must share one run folder; use a run_dir on a "
                "shared file system, or mount it on that host"
            )
            _turn_away([wire], error)
            raise error
        shown, right = str(message["proof"]), self._secret.proof(challenge, host)
        if not hmac.compare_digest(shown.encode(errors="replace"), right.encode()):
            return False
        if host in self.facts:
            there = host_name(host, self.facts[host])
            error = SpecError(f"host {host} is already connected ({there}); give each host its own --node-rank")
            _turn_away([wire], error)
            return False
        self.facts[host], self.wires[host] = message["facts"], wire
        return True

    def _missing(self) -> str:
        launch = self._spec.launch
        missing = sorted(set(range(launch.hosts)) - set(self.facts))
        listed = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        return (
            f"host {listed} of {launch.hosts} did not connect within {launch.rendezvous_s} s; start the same command "
            f"there with --node-rank {missing[0]} and read its output, or increase launch.rendezvous_s. It must reach "
            f"{launch.address} ({self.facts[0]['name']}) at port {rendezvous_port(self._spec) + 1}"
        )

    def compare(self) -> None:
        """Compare every host with the first. Raises SpecError if the specs differ, HeadwayError if other facts do."""
        first, names = self.facts[0]["equal"], self.names
        for host in names:
            other = self.facts[host]["equal"]
            for key, a, b in difference(first["spec"], other["spec"]):
                raise SpecError(
                    f"{names[host]} has {key} = {b!r}, {names[0]} has {a!r}; start the same command with the same "
                    "files on all hosts"
                )
            for key, a, b in difference(first, other):
                if key != "spec":
                    raise HeadwayError(
                        f"{names[host]} has {key} {b}, {names[0]} has {a}; install the same versions and use the same "
                        "data on all hosts"
                    )

    def connect_all(self, limit_s: float) -> None:
        """Raises HeadwayError with the pairs of hosts that cannot connect to each other."""
        names = self.names
        ends = {host: [each["address"], each["port"]] for host, each in self.facts.items()}
        for wire in self.wires.values():
            wire.send({"try": [[host, *end] for host, end in ends.items()], "limit_s": limit_s})
        failed = [(0, to, why) for to, why in try_all(0, ends, limit_s)]
        end = time.monotonic() + limit_s * (2 + len(ends) // _AT_ONCE) + 5
        left = dict(self.wires)
        while left and time.monotonic() < end:
            for host, wire in list(left.items()):
                if (message := wire.take()) is not None:
                    failed += [(host, to, why) for to, why in message.get("failed", [])]
                    del left[host]
                elif wire.closed:
                    raise HeadwayError(
                        f"the launcher on {names[host]} ended or closed the connection at the start; {NEXT_STEP}"
                    )
            time.sleep(0.02)
        if left:
            raise HeadwayError(f"the launcher on {names[min(left)]} stopped responding at the start; {NEXT_STEP}")
        if failed:
            lines = [f"{names[a]} cannot reach {names[b]} at port {ends[b][1]}: {why}" for a, b, why in failed[:10]]
            lines.append("check routes and firewalls between these hosts, or use another launch.interface")
            raise HeadwayError("\n".join(lines))


def try_all(own_host: int, ends: Mapping[int, list[Any]], limit_s: float) -> list[tuple[int, str]]:
    """(host, reason) of the hosts in `ends` (host -> [address, port]) to which this host cannot connect."""

    def attempt(host: int) -> tuple[int, str] | None:
        address, port = ends[host]
        try:
            socket.create_connection((address, port), timeout=limit_s).close()
        except TimeoutError:
            return host, f"timed out after {limit_s:g} s"
        except OSError as e:
            return host, e.strerror or str(e)
        return None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [found for found in pool.map(attempt, [h for h in ends if h != own_host]) if found is not None]


def _accept(door: socket.socket) -> Wire | None:
    try:
        return Wire(door.accept()[0])
    except OSError:  # the other end has already closed the connection
        return None


def _turn_away(wires: Iterable[Wire], error: HeadwayError) -> None:
    wires = list(wires)
    for wire in wires:
        wire.send({"end": Fault(text=str(error), code=error.exit_code).as_json()})
    hang_up(wires, 2.0)
