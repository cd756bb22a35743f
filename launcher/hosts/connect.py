"""Connect the launchers of all hosts before a model is built, and check that they agree and reach each other.

The first host listens at launch.address, one port above that of the rendezvous. Every other host proves that it sees
the run folder: it knows a secret number that the first host wrote there. This also keeps other programs out. Then the
first host compares everything that must be equal, and every host tries to connect to every other host.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.hosts.control import Hub, Link
from headway.launcher.hosts.faults import Ended, Fault
from headway.launcher.hosts.gather import NEXT_STEP, Hall, host_name, open_door, try_all
from headway.launcher.hosts.place import Place, rendezvous_port
from headway.launcher.hosts.restarts import Restarts
from headway.launcher.hosts.shared import Secret
from headway.launcher.hosts.wire import Wire, interfaces
from headway.launcher.run.run_dir import RunDir, flatten
from headway.launcher.spec.spec import Spec

_NAME_S = 3.0  # a name server may fail once; a name that stays unknown is a mistake


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What a host knows once all hosts are connected. `interface`: the network interface towards the other hosts."""

    place: Place
    control: Hub | Link
    env: dict[str, str]
    interface: str | None


def join(
    spec: Spec, run: RunDir, host: int, equal: dict[str, Any], *, env: dict[str, str], restarts: Restarts
) -> Joined:
    """Connect to the other hosts and check that all agree and reach each other, within launch.rendezvous_s.

    `equal`: name -> value that must be the same on all hosts. `env`: values of launch.env, which the first host sends
    to all hosts. `restarts`: the restart budget of the run, which the first host manages. Raises SpecError, or
    HeadwayError that names the hosts that are missing, differ, or cannot reach each other. Every host that can be
    notified raises the same error.
    """
    deadline = time.monotonic() + spec.launch.rendezvous_s
    network = _Network(spec)
    facts = {"name": socket.gethostname(), "equal": {**equal, "spec": flatten(spec.model_dump(mode="json"))}}
    if host == 0:
        return _receive(spec, run, network, facts, env, deadline, restarts)
    return _come(spec, run, network, host, facts, deadline)


class _Network:
    """Addresses and interfaces of this host in the network of the run."""

    def __init__(self, spec: Spec) -> None:
        self._addresses, self._interface = interfaces(), spec.launch.interface
        if self._interface is not None and self._interface not in self._addresses:
            raise SpecError(
                f"launch.interface: this host has no interface {self._interface} with an IPv4 address; use one of "
                f"{', '.join(sorted(self._addresses)) or '(none found)'}, or remove launch.interface from the spec"
            )

    def address(self, used: str) -> str:
        """The address at which other hosts reach this one: that of launch.interface, else `used`, already in use."""
        return self._addresses[self._interface] if self._interface else used

    def interface(self, address: str) -> str | None:
        """The interface that has the address."""
        return next((name for name, at in self._addresses.items() if at == address), None)


def _receive(
    spec: Spec,
    run: RunDir,
    network: _Network,
    facts: dict[str, Any],
    env: dict[str, str],
    deadline: float,
    restarts: Restarts,
) -> Joined:
    """`join` on the first host."""
    launch = spec.launch
    with open_door(spec) as door, Secret.written(run) as secret, socket.socket() as ear:
        address = network.address(door.getsockname()[0])
        port = _listen(ear, address, launch.hosts)
        hall = Hall(spec, secret, {**facts, "address": address, "port": port})
        try:
            hall.admit(door, deadline)
            hall.compare()
            hall.connect_all(limit_s=min(10.0, max(2.0, launch.rendezvous_s / 4)))
        except HeadwayError as e:
            hall.dismiss(e)
            raise
        names = hall.names
        for wire in hall.wires.values():
            wire.send({"go": env, "hub": names[0]})
    place = Place(host=0, hosts=launch.hosts, processes=launch.processes, name=names[0])
    control = Hub(hall.wires, names, restarts, host_lost_s=launch.host_lost_s)
    return Joined(place=place, control=control, env=env, interface=network.interface(address))


def _come(spec: Spec, run: RunDir, network: _Network, host: int, facts: dict[str, Any], deadline: float) -> Joined:
    """`join` on every other host."""
    launch, hub = spec.launch, f"host 0 ({spec.launch.address})"
    wire = _call(spec, deadline)
    address = network.address(wire.own_address)
    with socket.socket() as ear:
        facts = {**facts, "address": address, "port": _listen(ear, address, launch.hosts)}
        hello = _next(wire, "challenge", hub, deadline)
        secret = Secret.read(run, hello["sign"], deadline)
        known = {} if secret is None else {"proof": secret.proof(hello["challenge"], host), "facts": facts}
        wire.send({"host": host, "name": facts["name"], **known})
        # Wait longer than the first host, so that this host receives its message about the missing hosts.
        table = _next(wire, "try", hub, deadline + launch.rendezvous_s)
        ends = {number: [at, port] for number, at, port in table["try"]}
        wire.send({"failed": try_all(host, ends, table["limit_s"])})
        go = _next(wire, "go", hub, deadline + launch.rendezvous_s)
    place = Place(host=host, hosts=launch.hosts, processes=launch.processes, name=host_name(host, facts))
    control = Link(wire, go["hub"], host_lost_s=launch.host_lost_s)
    return Joined(place=place, control=control, env=go["go"], interface=network.interface(address))


def _listen(ear: socket.socket, address: str, hosts: int) -> int:
    """Listen so that other hosts can try to connect; the kernel completes their connections. Returns the port."""
    ear.bind((address, 0))
    ear.listen(hosts)
    return ear.getsockname()[1]


def _call(spec: Spec, deadline: float) -> Wire:
    """Connect to the first host, which may start later than this one."""
    launch, port, why = spec.launch, rendezvous_port(spec) + 1, ""
    assert launch.address is not None
    named_by = min(deadline, time.monotonic() + _NAME_S)
    while (left := deadline - time.monotonic()) > 0:
        try:
            return Wire(socket.create_connection((launch.address, port), timeout=min(left, 5.0)))
        except socket.gaierror as e:
            if time.monotonic() > named_by:
                raise SpecError(
                    f"launch.address: {launch.address} has no address on {socket.gethostname()} ({e.strerror}); use "
                    "the IPv4 address of host 0, or a name that all hosts can resolve"
                ) from e
            why = e.strerror or str(e)
            time.sleep(min(left, 0.2))
        except OSError as e:
            why = e.strerror or str(e)
            time.sleep(min(left, 0.2))
    raise HeadwayError(
        f"host 0 did not answer at {launch.address} port {port} within {launch.rendezvous_s} s ({why}); start the same "
        "command there with --node-rank 0 and read its output, or use another launch.address, launch.interface or "
        "launch.port"
    )


def _next(wire: Wire, key: str, hub: str, deadline: float) -> dict[str, Any]:
    """The next message with `key`. Raises the error that the first host sends instead, or a loss of the connection."""
    while time.monotonic() < deadline:
        if (message := wire.take()) is not None:
            if "end" in message:
                wire.close()
                raise Ended(Fault.from_json(message["end"]))
            if key in message:
                return message
        elif wire.closed:
            raise HeadwayError(f"the launcher on {hub} ended or closed the connection at the start; {NEXT_STEP}")
        time.sleep(0.02)
    raise HeadwayError(f"the launcher on {hub} stopped responding at the start; {NEXT_STEP}")
