"""Two hosts with their own addresses train one model. A disconnected host is reported, and the run resumes later."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

HOST_LOST_S = 4
COMMON = ("train.tokens=7680", "train.validate_every_tokens=null", "tracking.tensorboard=false")
WATCHED = (f"launch.host_lost_s={HOST_LOST_S}", "launch.rendezvous_s=60", "launch.hang_s=60", "launch.port=31700")


def trajectory(run: Path) -> list[tuple]:
    """Records that must be equal bit for bit in two runs of one spec."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [(r["step"], r["loss"], r["grad_norm"], r["batch_hash"]) for r in found if r["kind"] == "train"]
    return train + [(r["step"], r["loss"]) for r in found if r["kind"] == "validation"]


def steps_done(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count('"kind": "train"')
    except OSError:
        return 0


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def rank_pids(run: Path) -> list[int]:
    return [int((run / "logs" / f"rank-{rank}.pid").read_text()) for rank in range(4)]


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
    pids = rank_pids(run)
    start = time.monotonic()
    two_hosts.hosts[1].cable("down")
    (_, said_a), (_, said_b) = a.communicate(timeout=60), b.communicate(timeout=60)
    assert time.monotonic() - start < HOST_LOST_S + 12  # time to detect it and end all processes on a busy machine
    assert (a.returncode, b.returncode) == (70, 70), (said_a, said_b)
    assert "host 1 (" in said_a and f"{two_hosts.hosts[1].address}) is lost: no sign of life" in said_a
    assert "host 0 (" in said_b and f"{two_hosts.hosts[0].address}) is lost: no sign of life" in said_b
    assert not any(alive(pid) for pid in pids)
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
    pids = rank_pids(run)
    start = time.monotonic()
    os.kill(pids[3], signal.SIGKILL)
    for process in (a, b):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 70
        assert f"rank 3 (process {pids[3]}) on host 1 (" in said and f"{two_hosts.hosts[1].address})" in said
        assert "SIGKILL" in said
    assert time.monotonic() - start < 15
    assert not any(alive(pid) for pid in pids)


def test_an_unreachable_host_is_named_at_the_start(two_hosts):
    two_hosts.hosts[1].cable("down")
    quick = [w for w in WATCHED if "rendezvous" not in w]
    a, b = two_hosts.start_both(*quick, "launch.rendezvous_s=3", "run_dir=apart")
    (_, said_a), (_, said_b) = a.communicate(timeout=60), b.communicate(timeout=60)
    assert (a.returncode, b.returncode) == (70, 70)
    assert "host 1 of 2 did not connect within 3 s" in said_a
    assert f"host 0 did not answer at {two_hosts.hosts[0].address} port 31701 within 3 s" in said_b
