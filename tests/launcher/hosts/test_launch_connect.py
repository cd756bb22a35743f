"""Hosts connect, agree, and end together. Here the hosts are threads on the loopback interface (F29)."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.hosts import connect, gather, shared
from headway.launcher.hosts.connect import Joined, join
from headway.launcher.hosts.control import Hub, Link
from headway.launcher.hosts.faults import CAUSE, CONSEQUENCE, STOPPED, Fault
from headway.launcher.hosts.restarts import Restarts
from headway.launcher.hosts.wire import Wire, interfaces
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec

EQUAL = {"torch": "2.13.0", "data": "f00d"}


@pytest.fixture
def load(headway):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = min(probe.getsockname()[1], 65_000)
    usual = {"launch.address": "127.0.0.1", "launch.port": f"{port}", "launch.rendezvous_s": "20"}

    def load(*overrides: str) -> Spec:
        values = {**usual, "train.global_batch": "24", **dict(o.split("=", 1) for o in overrides)}
        return load_spec(headway.spec, [f"{key}={value}" for key, value in values.items()]).spec

    return load


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


def meet(*hosts: tuple[Spec, RunDir, int, dict]) -> list[Joined | HeadwayError]:
    """Result of `join` on each host, called at the same time."""

    def one(host: tuple[Spec, RunDir, int, dict]) -> Joined | HeadwayError:
        try:
            return join(*host, env={"A": "x"} if host[2] == 0 else {}, restarts=Restarts(host[1], 0))
        except HeadwayError as e:
            return e

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, hosts))


def messages(found: list[Joined | HeadwayError]) -> list[str]:
    return [str(f) if isinstance(f, HeadwayError) else "joined" for f in found]


def test_three_hosts_connect_and_get_the_values_of_the_first_host(load, run):
    spec = load("launch.hosts=3")
    found = meet(*((spec, run, host, EQUAL) for host in (2, 0, 1)))
    joined = {f.place.host: f for f in found if isinstance(f, Joined)}
    assert sorted(joined) == [0, 1, 2], messages(found)
    for host, each in joined.items():
        assert each.env == {"A": "x"} and each.interface == "lo"
        assert list(each.place.ranks) == [host]
        assert each.place.name == f"host {host} ({socket.gethostname()}, 127.0.0.1)"
    assert not (run.logs / "hosts.key").exists()


def test_all_hosts_name_the_number_of_a_missing_host(load, run):
    spec = load("launch.hosts=3", "launch.rendezvous_s=1")
    start = time.monotonic()
    found = meet((spec, run, 0, EQUAL), (spec, run, 1, EQUAL))
    assert time.monotonic() - start < 5
    for text in messages(found):
        assert text.startswith(
            "host 2 of 3 did not connect within 1 s; start the same command there with --node-rank 2"
        )


def test_a_first_host_that_does_not_answer_is_named_with_its_address(load, run):
    start = time.monotonic()
    (text,) = messages(meet((load("launch.hosts=2", "launch.rendezvous_s=1"), run, 1, EQUAL)))
    assert time.monotonic() - start < 5
    assert "host 0 did not answer at 127.0.0.1 port" in text and "refused" in text and "--node-rank 0" in text


def test_a_host_with_another_spec_is_named_with_both_values(load, run):
    found = meet((load("launch.hosts=2"), run, 0, EQUAL), (load("launch.hosts=2", "optimizer.lr=0.004"), run, 1, EQUAL))
    for f in found:
        assert isinstance(f, HeadwayError) and f.exit_code == SpecError.exit_code
        assert "host 1 (" in str(f) and "has optimizer.lr = 0.004" in str(f) and "has 0.003" in str(f)


def test_hosts_with_different_numbers_of_hosts_are_named(load, run):
    # F29
    settings = ("launch.rendezvous_s=3",)
    found = meet((load("launch.hosts=2", *settings), run, 0, EQUAL), (load("launch.hosts=3", *settings), run, 1, EQUAL))
    for f in found:
        assert isinstance(f, HeadwayError)
        assert "launch.hosts" in str(f) and "3" in str(f) and "2" in str(f), str(f)


@pytest.mark.parametrize("key", ["torch", "data"])
def test_a_host_with_other_versions_or_data_is_named_with_both_values(load, run, key):
    spec = load("launch.hosts=2")
    for text in messages(meet((spec, run, 0, EQUAL), (spec, run, 1, {**EQUAL, key: "other"}))):
        assert f"has {key} other, host 0 (" in text and f"has {EQUAL[key]}" in text


def test_a_host_that_does_not_see_the_run_folder_is_named(load, run, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "_APPEARS_S", 0.2)
    spec, elsewhere = load("launch.hosts=2"), RunDir(tmp_path / "elsewhere")
    elsewhere.logs.mkdir(parents=True)
    (elsewhere.logs / "hosts.key").write_text(json.dumps("0" * 64))  # from an earlier start
    for text in messages(meet((spec, run, 0, EQUAL), (spec, elsewhere, 1, EQUAL))):
        assert "does not see" in text and "hosts.key" in text and "shar" in text


def test_a_second_host_with_the_same_number_is_refused(load, run):
    spec = load("launch.hosts=3", "launch.rendezvous_s=2")
    texts = messages(meet((spec, run, 0, EQUAL), (spec, run, 1, EQUAL), (spec, run, 1, EQUAL)))
    assert sum("host 1 is already connected" in text for text in texts) == 1
    assert sum("host 2 of 3 did not connect" in text for text in texts) == 2


def test_every_pair_that_cannot_connect_is_named_with_the_port(load, run, monkeypatch):
    real = gather.try_all

    def one_way(own_host, ends, limit_s):
        if own_host == 1:  # a firewall in front of host 2
            return [*real(own_host, {h: e for h, e in ends.items() if h != 2}, limit_s), (2, "timed out after 5 s")]
        return real(own_host, ends, limit_s)

    monkeypatch.setattr(connect, "try_all", one_way)
    monkeypatch.setattr(gather, "try_all", one_way)
    spec = load("launch.hosts=3")
    for text in messages(meet(*((spec, run, host, EQUAL) for host in (0, 1, 2)))):
        first, *rest = text.splitlines()
        assert first.startswith("host 1 (") and "127.0.0.1) cannot reach host 2 (" in first
        assert first.endswith("timed out after 5 s") and " at port " in first
        assert "launch.interface" in rest[0]


def test_a_port_without_a_listener_is_reported():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert gather.try_all(0, {1: ["127.0.0.1", closed.getsockname()[1]]}, 1.0) == [(1, "Connection refused")]


def test_foreign_connections_neither_join_nor_stop_the_hosts(load, run):
    spec = load("launch.hosts=2")
    address = ("127.0.0.1", (spec.launch.port or 0) + 1)
    stop = threading.Event()

    def disturb() -> None:
        texts = [b"GET / HTTP/1.0\r\n\r\n", b'{"host": 1, "proof": "guess", "facts": {}}\n', b'{"host": "x"}\n', b""]
        while not stop.is_set():
            for text in texts:
                try:
                    with socket.create_connection(address, timeout=1) as s:
                        s.sendall(text)
                except OSError:
                    time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(disturb)
        time.sleep(0.1)
        try:
            found = meet((spec, run, 0, EQUAL), (spec, run, 1, EQUAL))
        finally:
            stop.set()
    assert all(isinstance(f, Joined) for f in found), messages(found)


def test_a_missing_interface_is_refused_with_the_existing_ones(load, run):
    with pytest.raises(SpecError, match=r"launch\.interface: this host has no interface nope0 .* lo"):
        join(load("launch.hosts=2", "launch.interface=nope0"), run, 1, EQUAL, env={}, restarts=Restarts(run, 0))
    assert interfaces()["lo"] == "127.0.0.1"


# ---------------------------------------------------------------- ending together


def trio(host_lost_s: float = 1.0) -> tuple[Hub, Link, Link]:
    pairs = [socket.socketpair() for _ in range(2)]
    names = {0: "host 0 (a)", 1: "host 1 (b)", 2: "host 2 (c)"}
    wires = {i + 1: Wire(pair[0]) for i, pair in enumerate(pairs)}
    hub = Hub(wires, names, Restarts(RunDir(Path("nowhere")), 1), host_lost_s=host_lost_s)
    one, two = (Link(Wire(pair[1]), names[0], host_lost_s=host_lost_s) for pair in pairs)
    return hub, one, two


def settle(*ends: tuple[Hub | Link, Fault | None, float]) -> list[Fault | None]:
    """Verdict of each control. Arguments: (control, fault of its host, seconds until its host ends)."""

    def one(end: tuple[Hub | Link, Fault | None, float]) -> Fault | None:
        control, own, after = end
        return control.wait(after) or control.settle(own)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, ends))


RESET = Fault(text="rank 0 lost a peer", weight=CONSEQUENCE)
KILLED = Fault(text="rank 3 on host 1 (b) was killed", weight=CAUSE)


def test_hosts_wait_until_all_hosts_have_ended():
    hub, one, two = trio()
    start = time.monotonic()
    assert settle((hub, None, 0), (one, None, 1.5), (two, None, 0.2)) == [None, None, None]
    assert time.monotonic() - start >= 1.5  # longer than host_lost_s, so signs of life were sent


@pytest.mark.parametrize("late", [0, 1, 2])
def test_all_hosts_name_the_cause_and_not_an_earlier_consequence(late):
    controls = trio()
    start = time.monotonic()
    ends = [(c, KILLED if i == late else RESET, 0.3 if i == late else 0.0) for i, c in enumerate(controls)]
    assert settle(*ends) == [KILLED] * 3
    assert time.monotonic() - start < 1.5


def test_a_host_that_still_runs_is_told_to_end():
    hub, one, two = trio()
    start = time.monotonic()
    assert settle((hub, None, 30), (one, KILLED, 0.2), (two, None, 30)) == [KILLED] * 3
    assert time.monotonic() - start < 2


def test_hosts_stopped_by_a_signal_may_finish_saving():
    stopped = Fault(text="rank 0: stopped after step 5", code=75, weight=STOPPED)
    start = time.monotonic()
    hub, one, two = trio()
    assert settle((hub, stopped, 0), (one, stopped, 0.8), (two, stopped, 0)) == [stopped] * 3
    assert time.monotonic() - start >= 0.8


def test_a_consequence_without_a_cause_is_reported_after_a_timeout():
    hub, one, two = trio(host_lost_s=0.5)
    start = time.monotonic()
    found = settle((hub, RESET, 0), (one, RESET, 0), (two, None, 30))
    assert found == [RESET] * 3 and 2 < time.monotonic() - start < 5


def test_a_silent_host_is_reported_on_both_sides_within_the_limit():
    hub, _, two = trio()
    start = time.monotonic()
    with ThreadPoolExecutor() as pool:  # no thread reads host 1's end of the wire
        results = [pool.submit(c.wait, 30) for c in (hub, two)]
        faults = [r.result() for r in results]
    assert 0.9 < time.monotonic() - start < 4
    for fault in faults:
        assert fault is not None and fault.text.startswith("host 1 (b) is lost: no sign of life for 1 s")
    silent, end = socket.socketpair()
    with silent, end:
        fault = Link(Wire(end), "host 0 (a)", host_lost_s=0.5).wait(10)
    assert fault is not None and fault.text.startswith("host 0 (a) is lost")


def test_a_killed_launcher_is_detected_at_once():
    hub, one, two = trio(host_lost_s=30)
    one._wire.close()
    start = time.monotonic()
    fault = hub.wait(10)
    assert fault is not None and "the launcher on host 1 (b) has ended or closed its connection" in fault.text
    assert two.wait(10) == fault and time.monotonic() - start < 2


def test_a_wire_returns_whole_messages_and_closes_after_an_invalid_one(tmp_path: Path):
    a, b = socket.socketpair()
    wire = Wire(a)
    assert wire.take() is None
    b.sendall(b'{"x": 1}\n{"y"')
    assert wire.take() == {"x": 1} and wire.take() is None and not wire.closed
    b.sendall(b': 2}\n[1]\n{"z": 3}\n')
    assert wire.take() == {"y": 2} and wire.take() is None and wire.closed
