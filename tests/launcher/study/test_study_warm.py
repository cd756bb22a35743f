"""Warm ranks of a study: real cells whose ranks are forked, what they train, and how they end with their study."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from headway.launcher.hosts.forked import VARIABLE
from headway.launcher.spec.load import load_spec
from headway.launcher.study import jobs, warm
from headway.launcher.study.warm import Warm

STUDY = """
study: warm
base: tiny.yaml
out: out
seeds: [1]
variants:
  cold: {attention.top_k: 1}
  again: {attention.top_k: 1}
  endless: {attention.top_k: 1, train.tokens: 1e9, checkpoint.every_tokens: 1e9, train.validate_every_tokens: 1e9}
"""


def losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ancestors(pid: int) -> dict[int, str]:
    """Process -> command line."""
    found = {}
    while pid > 1:
        found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def wait(condition, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_a_forked_rank_trains_like_a_cold_one_and_saves_when_its_study_is_killed(tmp_path, headway_alone):
    (tmp_path / "study.yaml").write_text(STUDY)
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    run = tmp_path / "out" / "cells" / "endless" / "seed-1"
    study = subprocess.Popen(
        headway_alone.command("study", "run", "study.yaml"), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        wait(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 20, "the last cell does not train")
        rank = int((run / "logs" / "rank-0.pid").read_text())
        above = ancestors(rank)
    finally:
        study.kill()
        study.wait()
    servers = [pid for pid, command in above.items() if "fork-server" in command]
    assert servers, f"the rank was not forked: {above}"
    wait(lambda: not any(alive(pid) for pid in (rank, *servers)), "processes outlive the study")
    saved = [p.name for p in (run / "checkpoints").glob("step-*")]
    assert len(saved) == 1 and int(saved[0].removeprefix("step-")) >= 20  # it was stopped, not killed
    cold = losses(run.parents[1] / "cold" / "seed-1")
    assert losses(run)[:20] == cold[:20]


@pytest.fixture
def spec(headway_alone):
    return load_spec(headway_alone.spec).spec


def started(monkeypatch, *specs) -> bool:
    starts = []
    monkeypatch.setattr(warm, "ForkServer", lambda: starts.append(1))
    Warm(specs)
    return bool(starts)


def test_a_server_is_started_only_for_several_cells_on_the_cpu_of_this_host(monkeypatch, spec):
    def with_launch(**keys):
        return spec.model_copy(update={"launch": spec.launch.model_copy(update=keys)})

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(jobs, "has_nvidia_gpu", lambda: False)
    assert started(monkeypatch, spec, spec)
    assert not started(monkeypatch, spec)
    assert not started(monkeypatch, spec, with_launch(hosts=2))
    assert not started(monkeypatch, spec, with_launch(method="slurm"))
    assert not started(monkeypatch, spec, with_launch(device="cuda"))
    monkeypatch.setattr(jobs, "has_nvidia_gpu", lambda: True)
    assert not started(monkeypatch, spec, spec)
    assert started(monkeypatch, with_launch(device="cpu"), with_launch(device="cpu"))
    monkeypatch.setenv(VARIABLE, "/there/is/one")
    assert not started(monkeypatch, with_launch(device="cpu"), with_launch(device="cpu"))


def test_cells_start_cold_until_the_server_is_ready_and_after_it_has_ended(monkeypatch, spec):
    class Server:
        path, running, ready, closed = Path("socket"), True, False, False

        def is_running(self):
            return self.running

        def is_ready(self):
            return self.running and self.ready

        def close(self):
            self.closed = True

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(warm, "ForkServer", Server)
    monkeypatch.setattr(jobs, "has_nvidia_gpu", lambda: False)
    with Warm([spec, spec]) as found:
        server = found._server
        assert isinstance(server, Server) and found.server is None and found.starts
        server.ready = True
        assert found.server == "socket" and not found.starts
        server.running = False
        assert found.server is None and not found.starts
    assert server.closed
