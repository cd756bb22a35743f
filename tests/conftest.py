"""For every test: the same random numbers, one thread; and runs of the real command in real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from headway.launcher.hosts.forked import ForkServer

QUICK = Path(__file__).with_name("quick.py")

TINY = """
name: tiny
model: {width: 32, layers: 2, ffn_width: 48, init_std: 0.05}
attention: {type: rgqa, heads: 4, kv_heads: 2, head_dim: 8, top_k: 1, balance: {f_p: 0, loss_free_rate: 1e-3}}
data:
  seq_len: 32
  source: {type: synthetic, task: mqar, vocab_size: 32, pairs: 4, queries: 4}
optimizer: {lr: 3.0e-3}
schedule: {warmup_tokens: 512}
train: {tokens: 10240, global_batch: 8, micro_batch: 2, validation_tokens: 512, validate_every_tokens: 2560}
checkpoint: {every_tokens: 1280}
launch: {processes: 1, threads: 1, restarts: 0}
"""


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are small: threads that wait for each other on a busy machine cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Headway:
    """Starts `headway` in a folder of its own: real processes, forked by `server` where there is one."""

    def __init__(self, folder: Path, server: ForkServer | None = None) -> None:
        self.folder, self.server = folder, server
        self.spec = folder / "tiny.yaml"
        self.spec.write_text(TINY)
        self.started: list[subprocess.Popen] = []

    def command(self, *args: str) -> list[str]:
        if self.server is not None:
            return [sys.executable, "-S", "-E", str(QUICK), str(self.server.path), *args]
        return [sys.executable, "-P", "-m", "headway.launcher", *args]

    def environment(self) -> dict[str, str]:
        return {**os.environ, **(self.server.environment if self.server is not None else {})}

    def run(self, *args: str, env: dict[str, str] | None = None, **kwargs) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*args),
            cwd=self.folder,
            env=env or self.environment(),
            capture_output=True,
            text=True,
            timeout=240,
            **kwargs,
        )

    def train(self, *overrides: str, **kwargs) -> subprocess.CompletedProcess:
        return self.run("train", str(self.spec), *overrides, **kwargs)

    def start(self, *overrides: str) -> subprocess.Popen:
        process = subprocess.Popen(
            self.command("train", str(self.spec), *overrides),
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def wait_for(self, condition, process: subprocess.Popen, seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, "the run did not get there in time"
            time.sleep(0.005)


@pytest.fixture(scope="session")
def fork_server():
    """Imports everything once for all tests that start runs."""
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="module")
def headway_once(tmp_path_factory, fork_server):
    """For runs that several tests of a file read; they only end by themselves."""
    return Headway(tmp_path_factory.mktemp("headway"), fork_server)


@pytest.fixture
def headway(tmp_path, fork_server):
    yield from _ended(Headway(tmp_path, fork_server))


@pytest.fixture
def headway_alone(tmp_path):
    """As a shell starts it, torchrun and imports included: for what a fork could hide."""
    yield from _ended(Headway(tmp_path))


def _ended(h):
    yield h
    for process in h.started:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
