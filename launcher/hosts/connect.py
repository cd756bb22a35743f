"""Bring the launchers of all hosts together before a model is built: who is there, on what, and who reaches whom.

The first host listens at launch.address, at the port behind that of the rendezvous. Every other host shows that it sees
the run folder by a number that the first host wrote into it, which at the same time keeps strangers out. Then all
compare what must be equal, and each connects to each.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.hosts.control import Hub, Link
from headway.launcher.hosts.faults import Ended, Fault
from headway.launcher.hosts.gather import Hall, host_name, open_door, try_all
from headway.launcher.hosts.place import Place, rendezvous_port
from headway.launcher.hosts.restarts import Restarts
from headway.launcher.hosts.shared import Secret
from headway.launcher.hosts.wire import Wire, interfaces
from headway.launcher.run.run_dir import RunDir, flatten
from headway.launcher.spec.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What a host knows once all are there. `interface`: the network interface that leads to the others."""

    place: Place
    control: Hub | Link
    env: dict[str, str]
    interface: str | None


def join(
    spec: Spec, run: RunDir, host: int, equal: dict[str, Any], *, env: dict[str, str], restarts: Restarts
) -> Joined:
    """Meet the other hosts and check that all agree and reach each other, within launch.rendezvous_s.

    `equal`: name of a thing that must be the same on all hosts -> its value. `env`: values of launch.env, which the
    first host gives to all. `restarts`: the run's budget, of which the first host disposes. Raises SpecError, or
    HeadwayError naming the hosts that are missing, differ, or cannot reach each other; every host that could be told
    raises the same.
    """
    deadline = time.monotonic() + spec.launch.rendezvous_s
    network = _Network(spec)
    facts = {"name": socket.gethostname(), "equal": {**equal, "spec": flatten(spec.model_dump(mode="json"))}}
    if host == 0:
        return _receive(spec, run, network, facts, env, deadline, restarts)
    return _come(spec, run, network, host, facts, deadline)


class _Network:
    """This host in the network of the run."""

    def __init__(self, spec: Spec) -> None:
        self._addresses, self._interface = interfaces(), spec.launch.interface
        if self._interface is not None and self._interface not in self._addresses:
            raise SpecError(
                f"launch.interface: {self._interface} is not on this host, or has no IPv4 address; it has "
                f"{', '.join(sorted(self._addresses)) or 'none'}: use one of them, or leave launch.interface out"
            )

    def address(self, used: str) -> str:
        """Where other hosts find this one: on the chosen interface, or at the address that it already talks from."""
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
        # The first host gives up before this one does, and says for whom it waited.
        table = _next(wire, "try", hub, deadline + launch.rendezvous_s)
        ends = {number: [at, port] for number, at, port in table["try"]}
        wire.send({"failed": try_all(host, ends, table["limit_s"])})
        go = _next(wire, "go", hub, deadline + launch.rendezvous_s)
    place = Place(host=host, hosts=launch.hosts, processes=launch.processes, name=host_name(host, facts))
    control = Link(wire, go["hub"], host_lost_s=launch.host_lost_s)
    return Joined(place=place, control=control, env=go["go"], interface=network.interface(address))


def _listen(ear: socket.socket, address: str, hosts: int) -> int:
    """Let other hosts try to connect; their connections are complete without being accepted. Returns the port."""
    ear.bind((address, 0))
    ear.listen(hosts)
    return ear.getsockname()[1]


def _call(spec: Spec, deadline: float) -> Wire:
    """A wire to the first host, which may come later than this one."""
    launch, port, why = spec.launch, rendezvous_port(spec) + 1, ""
    assert launch.address is not None
    while (left := deadline - time.monotonic()) > 0:
        try:
            return Wire(socket.create_connection((launch.address, port), timeout=min(left, 5.0)))
        except OSError as e:
            why = e.strerror or str(e)
            time.sleep(min(left, 0.2))
    raise HeadwayError(
        f"host 0 did not answer at {launch.address} port {port} within {launch.rendezvous_s} s ({why}); start the same "
        "command there with --node-rank 0 and see what it says, or name another launch.address, launch.interface or "
        "launch.port"
    )


def _next(wire: Wire, key: str, hub: str, deadline: float) -> dict[str, Any]:
    """The next message, which has the key. Raises what the first host says instead, or that it is gone."""
    while time.monotonic() < deadline:
        if (message := wire.take()) is not None:
            if "end" in message:
                wire.close()
                raise Ended(Fault.from_json(message["end"]))
            if key in message:
                return message
        elif wire.closed:
            raise HeadwayError(f"the launcher on {hub} went away during the start; see what it says there")
        time.sleep(0.02)
    raise HeadwayError(f"the launcher on {hub} fell silent during the start; see what it says there")
