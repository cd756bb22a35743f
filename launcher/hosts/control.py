"""Let the launchers of several hosts end together: the first host is the hub, every other host has a link to it.

Each launcher sends a sign of life every few seconds. A host that ends reports why. Ranks that lose a peer end soon
after the rank that is the cause, so the hub selects the fault with the highest weight and sends it to all hosts.
Nothing here needs torch.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Mapping
from typing import Any

from headway.launcher.hosts.faults import CAUSE, CONSEQUENCE, CONTINUES, Fault
from headway.launcher.hosts.restarts import Restarts
from headway.launcher.hosts.wire import Wire, hang_up

_SIGNS = 4  # signs of life within host_lost_s
_STEP_S = 0.1


class Hub:
    """Control on the first host. `wires` and `names` are keyed by host number; `names` includes this host."""

    def __init__(
        self, wires: dict[int, Wire], names: Mapping[int, str], restarts: Restarts, *, host_lost_s: float
    ) -> None:
        self._restarts = restarts
        self._wires, self._names, self._lost_s = wires, names, host_lost_s
        self._ended: dict[int, Fault | None] = {}
        self._doubt_s: float | None = None  # time of the first fault, which may be only a consequence
        self._sign_s = 0.0
        self._decided, self._verdict = False, None
        for wire in wires.values():
            wire.heard_s = time.monotonic()

    def wait(self, seconds: float) -> Fault | None:
        end = time.monotonic() + seconds
        while not self._decided and (left := end - time.monotonic()) > 0:
            _poll(self._wires.values(), left)
            self._listen()
            self._decide()
        return self._verdict

    def settle(self, own: Fault | None) -> Fault | None:
        if not self._decided:
            self._note(0, own)
            self._decide()
        while not self._decided:
            self.wait(_STEP_S)
        hang_up(self._wires.values())
        return self._verdict

    def _note(self, host: int, fault: Fault | None) -> None:
        if host in self._ended:
            return
        self._ended[host] = fault
        if fault is not None and self._doubt_s is None:
            self._doubt_s = time.monotonic()

    def _listen(self) -> None:
        now = time.monotonic()
        if now - self._sign_s > self._lost_s / _SIGNS:
            self._sign_s = now
            self._tell({"alive": True})
        for host, wire in self._wires.items():
            while (message := wire.take()) is not None:
                if "ended" in message:
                    fault = message["ended"]
                    self._note(host, fault and Fault.from_json(fault))
            if host in self._ended:
                continue
            if wire.closed:
                self._note(host, Fault(text=_lost(self._names[host])))
            elif now - wire.heard_s > self._lost_s:
                self._note(host, Fault(text=_silent(self._names[host], self._lost_s)))

    def _decide(self) -> None:
        faults = [fault for fault in self._ended.values() if fault is not None]
        best = max(faults, key=lambda f: f.weight, default=None)
        everybody = len(self._ended) == len(self._wires) + 1
        # If another host knows the cause, it reports it within the time in which a lost host is detected.
        waited = self._doubt_s is not None and time.monotonic() - self._doubt_s > self._lost_s + 2
        if everybody or waited or (best is not None and best.weight == CAUSE):
            self._decided, self._verdict = True, self._restarts.grant(best)
            best = self._verdict
            self._tell({"end": best and best.as_json()})

    def _tell(self, message: dict[str, Any]) -> None:
        for wire in self._wires.values():
            wire.send(message)


class Link:
    """Control on every other host. `hub`: the name of the first host in messages."""

    def __init__(self, wire: Wire, hub: str, *, host_lost_s: float) -> None:
        self._wire, self._hub, self._lost_s = wire, hub, host_lost_s
        self._sign_s = 0.0
        self._decided, self._verdict = False, None
        wire.heard_s = time.monotonic()

    def wait(self, seconds: float) -> Fault | None:
        end = time.monotonic() + seconds
        while not self._decided and (left := end - time.monotonic()) > 0:
            _poll([self._wire], left)
            self._listen()
        return self._verdict

    def settle(self, own: Fault | None) -> Fault | None:
        if not self._decided:
            self._wire.send({"ended": own and own.as_json()})
        while not self._decided:
            self.wait(_STEP_S)
        alone = self._verdict is not None and self._verdict.weight == CONSEQUENCE
        return own if alone and own is not None and own.weight == CAUSE else self._verdict

    def _listen(self) -> None:
        now = time.monotonic()
        if now - self._sign_s > self._lost_s / _SIGNS:
            self._sign_s = now
            self._wire.send({"alive": True})
        while (message := self._wire.take()) is not None:
            if "end" in message:
                self._decided, self._verdict = True, message["end"] and Fault.from_json(message["end"])
                self._wire.close()
                return
        if self._wire.closed:
            text = _lost(self._hub)
        elif now - self._wire.heard_s > self._lost_s:
            text = _silent(self._hub, self._lost_s)
        else:
            return
        self._decided, self._verdict = True, Fault(text=text, weight=CONSEQUENCE)
        self._wire.close()


def _lost(name: str) -> str:
    return f"the launcher on {name} has ended or closed its connection; read its output there; {CONTINUES}"


def _silent(name: str, seconds: float) -> str:
    return (
        f"{name} is lost: no sign of life for {seconds:g} s (launch.host_lost_s); check the host, its network and its "
        f"launcher; {CONTINUES}"
    )


def _poll(wires: Any, seconds: float) -> None:
    """Wait until a wire has something to read, at most `seconds` and at most _STEP_S, so signs of life are not late."""
    with selectors.DefaultSelector() as selector:
        for wire in wires:
            if not wire.closed:
                selector.register(wire, selectors.EVENT_READ)
        if selector.get_map():
            selector.select(min(seconds, _STEP_S))
        else:
            time.sleep(min(seconds, _STEP_S))
