"""Several hosts restart together and stop together."""

import json
import os
import signal
import socket

import pytest
from run_folders import records


@pytest.mark.slow
def test_two_hosts_restart_their_ranks_after_one_died_and_stop_together(headway_alone):
    # F1, F5: the launchers of two hosts, on one machine.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = min(probe.getsockname()[1], 65_000)
    hosts = ("launch.hosts=2", "launch.address=127.0.0.1", f"launch.port={port}", "launch.rendezvous_s=60")
    more = ("run_dir=run", "launch.restarts=1", "train.tokens=25600000", "checkpoint.keep=1")
    first, second = (headway_alone.start(*hosts, *more, "--node-rank", str(n)) for n in (0, 1))
    run = headway_alone.folder / "run"
    headway_alone.wait_for(lambda: (run / "checkpoints" / "step-0000000005").exists(), first)
    os.kill(int((run / "logs" / "rank-1.pid").read_text()), signal.SIGKILL)
    headway_alone.wait_for(lambda: len(records(run, "resume")) == 1, first)
    steps = len(records(run))
    headway_alone.wait_for(lambda: len(records(run)) > steps, first)
    second.send_signal(signal.SIGTERM)
    for process in (first, second):
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 75, stderr
        assert stdout.count("restarting the ranks") == 1 and "rank 1 (process" in stdout and "SIGKILL" in stdout
    (line,) = (run / "logs" / "attempts.jsonl").read_text().splitlines()[:-1]
    assert json.loads(line)["started_again"]
    last = records(run)[-1]["step"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{last:010d}"]
