"""The fork server of a study: whether there is one, and how forked cells end with their study and go on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from run_folders import records

from headway.launcher.hosts.forked import VARIABLE
from headway.launcher.spec.load import load_spec
from headway.launcher.study import jobs, warm
from headway.launcher.study.warm import Warm

STUDY = """
study: warm
base: tiny.yaml
out: out
seeds: [1, 2]
variants:
  endless: {attention.top_k: 1, train.tokens: 1e9, checkpoint.every_tokens: 1e9, train.validate_every_tokens: 1e9}
"""


def trained(run: Path) -> int:
    """Training steps of a run."""
    return len(records(run, "train")) if (run / "metrics.jsonl").exists() else 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ancestors(pid: int) -> list[int]:
    """The parent of a process, its parent, and so on."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def wait(condition, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_after_kill_9_of_a_study_its_forked_cells_save_and_end_and_the_same_command_goes_on(tmp_path, headway_alone):
    (tmp_path / "study.yaml").write_text(STUDY)
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    runs = [tmp_path / f"out/cells/endless/seed-{seed}" for seed in (1, 2)]
    command = headway_alone.command("study", "run", "study.yaml", "--jobs", "2", "--no-timing")

    def started() -> subprocess.Popen:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        headway_alone.started.append(process)
        return process

    study = started()
    wait(lambda: all(trained(run) > 20 for run in runs), "the cells do not train")
    launchers = [int((run / "run.lock").read_text().split()[0]) for run in runs]
    ranks = [int((run / "logs/rank-0.pid").read_text()) for run in runs]
    (server,) = {ancestors(pid)[0] for pid in launchers}
    assert b"fork-server" in Path(f"/proc/{server}/cmdline").read_bytes()
    assert all(server in ancestors(pid) for pid in ranks)
    study.kill()
    study.wait()
    wait(lambda: not any(map(alive, (*launchers, *ranks, server))), "processes outlive the study")
    saved = [[int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*")] for run in runs]
    assert all(len(steps) == 1 and steps[0] >= 20 for steps in saved), "they were killed, not stopped"
    again = started()
    wait(lambda: all(trained(run) > steps[0] for run, steps in zip(runs, saved, strict=True)), "they do not go on")
    assert [[r["step"] for r in records(run, "resume")] for run in runs] == saved
    again.send_signal(signal.SIGTERM)
    assert again.wait(60) == 75


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
