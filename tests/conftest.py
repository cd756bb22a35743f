"""For every test: the same random numbers, one thread; and runs of the real command in real processes."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from headway.launcher.hosts import forked
from headway.launcher.hosts.forked import Forked, ForkServer

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, whose choice launchers respect

QUICK = Path(__file__).with_name("quick.py")
SHARED = Path(__file__).with_name("shared")
EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "headway-example-mechanism"

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
    """Imports everything once for all tests that start runs. Its processes can import tests/shared."""
    with patch.dict(os.environ, PYTHONPATH=str(SHARED)):
        server = ForkServer()
    with server:
        yield server


@pytest.fixture(scope="session")
def run_ranks(fork_server) -> Callable[..., str]:
    """`run_ranks(processes, script, *arguments)`: what the ranks print. They are forked, with all imports done."""

    def run(processes: int, script: Path, *arguments: object) -> str:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        worker = ["rank_script", str(script), *map(str, arguments)]
        request = {"worker": worker, "processes": processes, "env": env}
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            group = Forked(fork_server.path, request, out.fileno(), err.fileno())
            end = time.monotonic() + 300
            while group.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            if group.returncode is None:
                os.killpg(group.pid, signal.SIGKILL)
            out.seek(0)
            err.seek(0)
            said, errors = out.read().decode(), err.read().decode()
        assert group.returncode == 0, f"{script.name} ended with {group.returncode}: {said[-2000:]}{errors[-6000:]}"
        return said

    return run


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


@pytest.fixture(scope="session")
def example_python(tmp_path_factory) -> str:
    """Python of an environment with the example package of docs/examples besides all that this one has."""
    folder = tmp_path_factory.mktemp("example")
    environment, source = folder / "env", folder / "source"
    venv.create(environment, with_pip=False, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "base.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    shutil.copytree(EXAMPLE, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(site), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(environment / "bin" / "python")


@pytest.fixture
def headway_with_example(tmp_path, example_python):
    """The command of the environment that has the example package, which reads entry points after its fork."""
    with patch.object(forked, "COMMAND", (example_python, *forked.COMMAND[1:])):
        server = forked.ForkServer()
    with server:
        yield from _ended(Headway(tmp_path, server))


@pytest.fixture
def install(tmp_path, monkeypatch) -> Iterator[Callable[..., Path]]:
    """`install(name, source, ...)` registers `module:Config` as an installed package would; returns the module's file.

    The package is importable and in the metadata of this process until the test ends; then it is forgotten.
    """
    from headway.model.attention import external, registry

    modules: list[str] = []

    def forget() -> None:
        external.registered.cache_clear()
        registry.EXTERNALS._loaded.clear()
        registry._validator.cache_clear()
        for module in modules:
            sys.modules.pop(module, None)
        importlib.invalidate_caches()

    def put(
        name: str, source: str, *, package: str = "outside", version: str = "1.0", value: str | None = None
    ) -> Path:
        site, module = tmp_path / "site", package.replace("-", "_")
        info = site / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{external.GROUP}]\n{name} = {value or f'{module}:Config'}\n")
        file = site / f"{module}.py"
        file.write_text(source)
        monkeypatch.syspath_prepend(str(site))
        modules.append(module)
        forget()
        return file

    yield put
    monkeypatch.undo()
    forget()


@pytest.fixture
def mechanism_source() -> Callable[..., str]:
    """`mechanism_source(name, more)`: a module with `Config`, GQA under another name."""

    def make(name: str, more: str = "") -> str:
        return f"""
from typing import Literal
from pydantic import Field
from headway.model.attention.grouped import GroupedConfig


class Config(GroupedConfig):
    type: Literal["{name}"] = "{name}"
    kv_heads: int = Field(ge=1)
    gain: float = 1.0

    @property
    def groups(self) -> int:
        return self.kv_heads


{more}
"""

    return make
