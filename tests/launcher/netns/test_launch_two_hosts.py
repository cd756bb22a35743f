"""Two hosts with their own addresses train one model. A disconnected host is reported, and the run resumes later."""

import os
import signal
import time

import pytest
from run_folders import alive, pids, steps_done, trajectory

HOST_LOST_S = 4
COMMON = ("train.tokens=7680", "train.validate_every_tokens=null", "tracking.tensorboard=false")
WATCHED = (f"launch.host_lost_s={HOST_LOST_S}", "launch.rendezvous_s=60", "launch.hang_s=60", "launch.port=31700")


@pytest.fixture(scope="module")
def one_host(headway_once) -> list[tuple]:
    """Records of the same training on one host, without a fault."""
    done = headway_once.train(*COMMON, "launch.processes=4", "run_dir=one")
    assert done.returncode == 0, done.stderr
    return trajectory(headway_once.folder / "one")


def test_two_hosts_train_as_one_and_resume_after_one_was_disconnected(two_hosts, one_host):
    a, b = two_hosts.start_both(*COMMON, *WATCHED, "run_dir=two")
    run = two_hosts.headway.folder / "two"
    two_hosts.headway.wait_for(lambda: any((run / "checkpoints").glob("step-*")), a, seconds=240)
    ranks = pids(run, 4)
    start = time.monotonic()
    two_hosts.hosts[1].cable("down")
    (_, said_a), (_, said_b) = a.communicate(timeout=60), b.communicate(timeout=60)
    assert time.monotonic() - start < HOST_LOST_S + 12  # time to detect it and end all processes on a busy machine
    assert (a.returncode, b.returncode) == (70, 70), (said_a, said_b)
    assert "host 1 (" in said_a and f"{two_hosts.hosts[1].address}) is lost: no sign of life" in said_a
    assert "host 0 (" in said_b and f"{two_hosts.hosts[0].address}) is lost: no sign of life" in said_b
    assert not any(alive(pid) for pid in ranks)
    assert 6 <= steps_done(run) < 30

    two_hosts.hosts[1].cable("up")
    a, b = two_hosts.start_both(*COMMON, *WATCHED, "run_dir=two")
    (out_a, said_a), (out_b, said_b) = a.communicate(timeout=240), b.communicate(timeout=240)
    assert (a.returncode, b.returncode) == (0, 0), (said_a, said_b)
    assert "resumed from" in out_a
    assert f"{two_hosts.hosts[1].address}): all 2 hosts are here; ranks 2 to 3 run on this one" in out_b
    assert "step " not in out_b  # only the first host prints steps
    assert trajectory(run) == one_host and steps_done(run) == 30


def test_a_rank_that_dies_on_one_host_is_named_on_both(two_hosts):
    a, b = two_hosts.start_both(*WATCHED, "train.tokens=2560000", "run_dir=dies")
    run = two_hosts.headway.folder / "dies"
    two_hosts.headway.wait_for(lambda: steps_done(run) >= 3, a, seconds=240)
    ranks = pids(run, 4)
    start = time.monotonic()
    os.kill(ranks[3], signal.SIGKILL)
    for process in (a, b):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 70
        assert f"rank 3 (process {ranks[3]}) on host 1 (" in said and f"{two_hosts.hosts[1].address})" in said
        assert "SIGKILL" in said
    assert time.monotonic() - start < 15
    assert not any(alive(pid) for pid in ranks)


def test_an_unreachable_host_is_named_at_the_start(two_hosts):
    two_hosts.hosts[1].cable("down")
    quick = [w for w in WATCHED if "rendezvous" not in w]
    a, b = two_hosts.start_both(*quick, "launch.rendezvous_s=3", "run_dir=apart")
    (_, said_a), (_, said_b) = a.communicate(timeout=60), b.communicate(timeout=60)
    assert (a.returncode, b.returncode) == (70, 70)
    assert "host 1 of 2 did not connect within 3 s" in said_a
    assert f"host 0 did not answer at {two_hosts.hosts[0].address} port 31701 within 3 s" in said_b
