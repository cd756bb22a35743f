"""One host needs no name and says when it has no loopback interface; several hosts say which name does not resolve."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time

import pytest
from run_folders import steps_done

from headway.launcher.hosts.commands import command
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec

SHORT = ("train.tokens=1280", "train.validate_every_tokens=null", "tracking.tensorboard=false")
UNKNOWN = "gpu-node-17.cluster.invalid"  # RFC 6761: names below .invalid do not resolve


def unshared(*flags: str) -> list[str]:
    """Words that run a command in namespaces of its own. Skips the test where that is not permitted."""
    own_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    words = ["unshare", *own_user, *flags, "--"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this machine (Debian: apt-get install util-linux)")
    tried = subprocess.run([*words, "true"], capture_output=True, text=True, timeout=20)
    if tried.returncode:
        pytest.skip(f"namespaces cannot be made here, which needs root or user namespaces: {tried.stderr}")
    return words


def in_namespace(headway, flags: list[str], *words: str, first: str = "") -> subprocess.CompletedProcess:
    text = f'{first}; exec "$@"' if first else 'exec "$@"'
    full = [*unshared(*flags), "sh", "-c", text, "sh", *headway.command(*words)]
    return subprocess.run(full, cwd=headway.folder, capture_output=True, text=True, timeout=240)


def test_two_processes_of_one_host_train_under_a_name_that_does_not_resolve(headway_alone):
    words = ("train", str(headway_alone.spec), *SHORT, "launch.processes=2", "run_dir=run")
    done = in_namespace(headway_alone, ["--uts"], *words, first=f"hostname {UNKNOWN}")
    assert done.returncode == 0, done.stderr
    assert steps_done(headway_alone.folder / "run") == 5


@pytest.mark.parametrize("port", ["null", "31900"])
def test_the_processes_of_one_host_meet_at_the_loopback_address(headway, port):
    spec = load_spec(headway.spec, ["launch.processes=2", f"launch.port={port}"]).spec
    words = " ".join(command(spec, RunDir.of(spec)))
    assert "--local-addr 127.0.0.1" in words and "--standalone" not in words
    assert f"--rdzv-endpoint 127.0.0.1:{0 if port == 'null' else port}" in words


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_host_without_loopback_interface_says_so_before_it_starts_anything(headway_alone, processes):
    began = time.monotonic()
    words = ("train", str(headway_alone.spec), *SHORT, f"launch.processes={processes}", "run_dir=run")
    done = in_namespace(headway_alone, ["--net"], *words)
    assert done.returncode == 70 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"cannot connect to each other at 127\.0\.0\.1 .*ip link set lo up", done.stderr), done.stderr
    assert time.monotonic() - began < 60  # most of it imports, on a busy machine; it was silent for 100 s
    assert not (headway_alone.folder / "run").exists()


@pytest.mark.parametrize("host", [0, 1])
def test_several_hosts_say_within_seconds_that_a_name_does_not_resolve(headway, host):
    began = time.monotonic()
    many = ("launch.hosts=2", f"launch.address={UNKNOWN}", "launch.rendezvous_s=200", "--node-rank", str(host))
    done = headway.train(*many, "run_dir=run")
    assert done.returncode == 64, done.stderr
    assert re.search(rf"launch\.address: {re.escape(UNKNOWN)} has no .*address.*; use", done.stderr), done.stderr
    assert time.monotonic() - began < 60
