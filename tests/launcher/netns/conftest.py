"""Two hosts on one machine: network namespaces connected by a veth pair, each with its own address.

The namespaces belong to two idle processes and end with them. Requires `ip` (iproute2), `unshare` and `nsenter`
(util-linux), and root or user namespaces. Otherwise the tests are skipped with the reason.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from headway.launcher.base.command import die_with_parent

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "cable0"


class Host:
    """A network namespace."""

    def __init__(self, number: int, enter: list[str]) -> None:
        self.number, self.address, self._enter = number, ADDRESSES[number], enter

    def inside(self, *words: str) -> list[str]:
        """The command that runs `words` on this host."""
        return [*self._enter, "--", *words]

    def run(self, *words: str) -> None:
        subprocess.run(self.inside(*words), check=True, capture_output=True, text=True, timeout=20)

    def cable(self, state: str) -> None:
        """Set this host's end of the veth pair "up" or "down"."""
        self.run("ip", "link", "set", CABLE, state)


class TwoHosts:
    """Starts `headway train` on a host, and ends all processes at the end."""

    def __init__(self, headway, hosts: tuple[Host, Host]) -> None:
        self.headway, self.hosts = headway, hosts
        self._started: list[subprocess.Popen] = []

    def start(self, host: Host, *overrides: str) -> subprocess.Popen:
        words = self.headway.command("train", str(self.headway.spec), *overrides, "--node-rank", str(host.number))
        process = subprocess.Popen(
            host.inside(*words),
            cwd=self.headway.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,  # so that a killed test run leaves no training behind
        )
        self._started.append(process)
        return process

    def start_both(self, *overrides: str) -> tuple[subprocess.Popen, subprocess.Popen]:
        a, b = self.hosts
        common = ("launch.hosts=2", "launch.processes=2", f"launch.address={a.address}", *overrides)
        return self.start(a, *common), self.start(b, *common)

    def end_all(self) -> None:
        for process in self._started:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)  # its ranks end with it
                process.communicate()


def _namespace(words: list[str]) -> subprocess.Popen:
    """An idle process in its own namespace. It ends with this process, because its input is closed."""
    holder = subprocess.Popen([*words, "unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while time.monotonic() < end and holder.poll() is None:
        if Path(f"/proc/{holder.pid}/comm").read_text().strip() == "cat":
            return holder
        time.sleep(0.01)
    holder.kill()
    raise OSError("unshare makes no network namespace here")


@pytest.fixture(scope="module")
def hosts():
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on this machine (Debian: apt-get install iproute2 util-linux)")
    holders = []
    try:
        try:
            own_user = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]
            first = _namespace(own_user)
            holders.append(first)
            flags = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
            enter = ["nsenter", "--target", str(first.pid), *flags]
            second = _namespace(enter if flags else [])
            holders.append(second)
            pair = tuple(
                Host(number, ["nsenter", "--target", str(holder.pid), *flags, "--net"])
                for number, holder in enumerate(holders)
            )
            pair[0].run("ip", "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(second.pid))
            for host in pair:
                host.run("ip", "address", "add", f"{host.address}/24", "dev", CABLE)
                host.run("ip", "link", "set", "lo", "up")
                host.cable("up")
        except (OSError, subprocess.SubprocessError) as e:
            said = getattr(e, "stderr", None) or str(e)
            pytest.skip(f"two network namespaces cannot be made here, which needs root or user namespaces: {said}")
        yield pair
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


@pytest.fixture(scope="module")
def headway_once(headway_once):
    """Without the fork server: ranks forked by a server would live in the server's network namespace."""
    headway_once.server = None
    return headway_once


@pytest.fixture
def two_hosts(headway_once, hosts):
    two = TwoHosts(headway_once, hosts)
    yield two
    two.end_all()
    hosts[1].cable("up")
