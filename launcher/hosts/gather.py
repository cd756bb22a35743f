"""The first host's part in bringing the hosts together: let them in, compare them, let each connect to each."""

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

_AT_ONCE = 64  # connections that a host tries together


def host_name(host: int, facts: Mapping[str, Any]) -> str:
    """What messages call a host."""
    return f"host {host} ({facts['name']}, {facts['address']})"


def open_door(spec: Spec) -> socket.socket:
    """Where the launchers of the other hosts come to. Raises SpecError where this host cannot listen there."""
    address, port = spec.launch.address, rendezvous_port(spec) + 1
    assert address is not None, "LaunchConfig asks for it, and a job of Slurm brings it"
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((socket.gethostbyname(address), port))
    except socket.gaierror as e:
        door.close()
        raise SpecError(
            f"launch.address: {address} has no IPv4 address ({e.strerror}); use another name, or an address"
        ) from e
    except OSError as e:
        door.close()
        have = ", ".join(f"{at} ({name})" for name, at in interfaces().items())
        raise SpecError(
            f"launch.address: host 0 cannot listen at {address} port {port} ({e.strerror}); use an address of this "
            f"host, which has {have}, or another launch.port (this is the one behind it)"
        ) from e
    door.listen(spec.launch.hosts + 16)
    door.setblocking(False)
    return door


class Hall:
    """The hosts that have come. `facts` and `wires` by host number; `facts` has the first host too."""

    def __init__(self, spec: Spec, secret: Secret, own: dict[str, Any]) -> None:
        self.facts: dict[int, dict[str, Any]] = {0: own}
        self.wires: dict[int, Wire] = {}
        self._spec, self._secret = spec, secret

    @property
    def names(self) -> dict[int, str]:
        return {host: host_name(host, self.facts[host]) for host in sorted(self.facts)}

    def dismiss(self, error: HeadwayError) -> None:
        """Let every host that is here end with the same error."""
        _turn_away(self.wires.values(), error)

    def admit(self, door: socket.socket, deadline: float) -> None:
        """Until all are here. Raises HeadwayError with the numbers of those that are not at the deadline."""
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
        """Whether the host is taken in. Raises SpecError for one that does not see the run folder."""
        host = message.get("host")
        if not isinstance(host, int) or not 0 < host < self._spec.launch.hosts:
            return False
        if message.get("proof") is None:
            error = SpecError(
                f"host {host} ({message.get('name', 'unknown')!s:.64}, {wire.address}) does not see "
                f"{self._secret.path}, which host 0 wrote: the run folder must be one and the same on all hosts; use "
                "run_dir on a file system that all share, or mount it there"
            )
            _turn_away([wire], error)
            raise error
        shown, right = str(message["proof"]), self._secret.proof(challenge, host)
        if not hmac.compare_digest(shown.encode(errors="replace"), right.encode()):
            return False
        if host in self.facts:
            there = host_name(host, self.facts[host])
            _turn_away([wire], SpecError(f"host {host} is there already ({there}); give each host its own --node-rank"))
            return False
        self.facts[host], self.wires[host] = message["facts"], wire
        return True

    def _missing(self) -> str:
        launch = self._spec.launch
        missing = sorted(set(range(launch.hosts)) - set(self.facts))
        listed = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        return (
            f"host {listed} of {launch.hosts} did not come within {launch.rendezvous_s} s; start the same command "
            f"there with --node-rank {missing[0]} and see what it says, or give more time with launch.rendezvous_s. It "
            f"must reach {launch.address} ({self.facts[0]['name']}) at port {rendezvous_port(self._spec) + 1}"
        )

    def compare(self) -> None:
        """Raises SpecError, or HeadwayError for what is not the spec, with what a host has that the first has not."""
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
                        f"{names[host]} has {key} {b}, {names[0]} has {a}; install the same versions, and give the "
                        "same data, on all hosts"
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
                    raise HeadwayError(f"the launcher on {names[host]} went away during the start; see what it says")
            time.sleep(0.02)
        if left:
            raise HeadwayError(f"{names[min(left)]} fell silent during the start; see what its launcher says")
        if failed:
            lines = [f"{names[a]} cannot reach {names[b]} at port {ends[b][1]}: {why}" for a, b, why in failed[:10]]
            lines.append("check routes and firewalls between them, or name another launch.interface")
            raise HeadwayError("\n".join(lines))


def try_all(own_host: int, ends: Mapping[int, list[Any]], limit_s: float) -> list[tuple[int, str]]:
    """(host, why) of those at whose [address, port] nobody answers this host."""

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
    except OSError:  # who knocked has left
        return None


def _turn_away(wires: Iterable[Wire], error: HeadwayError) -> None:
    wires = list(wires)
    for wire in wires:
        wire.send({"end": Fault(text=str(error), code=error.exit_code).as_json()})
    hang_up(wires, 2.0)
