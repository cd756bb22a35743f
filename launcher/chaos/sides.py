"""Stock DeepSpeed and Headway behind one interface: start a training, observe it, stop it, copy it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from headway.launcher.base.command import die_with_parent
from headway.launcher.base.errors import HeadwayError
from headway.launcher.chaos import options as stock
from headway.launcher.chaos.verdict import Seen
from headway.launcher.hosts.forked import Forked, ForkServer
from headway.launcher.hosts.processes import send, state
from headway.parallel.manifest import MANIFEST, step_of, steps_on_disk

STEPS = 12
_QUIET_S = 60.0
_ENDS_S = 90.0

SPEC = f"""
name: chaos
model: {{width: {stock.WIDTH}, layers: {stock.LAYERS}, ffn_width: 96, init_std: 0.05}}
attention: {{type: gqa, heads: {stock.HEADS}, kv_heads: 2, head_dim: 16}}
data:
  seq_len: {stock.SEQUENCE}
  source: {{type: synthetic, task: mqar, vocab_size: {stock.VOCABULARY}, pairs: 4, queries: 4}}
optimizer: {{lr: 1.0e-3}}
train: {{tokens: {8 * stock.SEQUENCE * STEPS}, global_batch: 8, micro_batch: 4, validation_tokens: 512}}
parallel: {{zero: 1, precision: bf16}}
tracking: {{tensorboard: false, log_every_steps: 1}}
launch: {{processes: 2, threads: 1}}
"""
_TOKENS = 8 * stock.SEQUENCE


class Process(Protocol):
    """The started process: Headway's launcher, torchrun, or the fork server's process in its place."""

    pid: int

    def poll(self) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a training, equal for both sides except `die`, which names a side's own point for killing a rank.

    `limit_s`: time without a sign of life after which a rank counts as hung. `keep`: number of checkpoints to keep;
    DeepSpeed keeps all. `restarts`: restart budget of Headway's launcher; torchrun's default is none.
    """

    steps: int = STEPS
    save_every: int = 1
    limit_s: float = 60.0
    seed: int = 1
    keep: int = 1000
    restarts: int = 2
    die: str | None = None


class Side(ABC):
    """One of the two systems. It trains in folders under `folder`. `name`: shown in messages and tables."""

    name: str

    def __init__(self, server: ForkServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        folder.mkdir(parents=True)

    def start(self, run: Path, settings: Settings, *, alone: bool = False) -> Process:
        """Start a training. `alone`: start the programs directly instead of by the fork server."""
        with self.log(run).open("wb") as log:
            return (self._alone if alone else self._forked)(run, settings, log.fileno())

    def log(self, run: Path) -> Path:
        """Log file of a run's newest start."""
        return run.with_suffix(".log")

    @abstractmethod
    def _forked(self, run: Path, settings: Settings, log: int) -> Process: ...

    @abstractmethod
    def _alone(self, run: Path, settings: Settings, log: int) -> Process: ...

    @abstractmethod
    def losses(self, run: Path) -> dict[int, tuple[Any, ...]]:
        """Step -> recorded values, of all steps recorded so far."""

    @abstractmethod
    def begun_from(self, run: Path) -> tuple[int, ...]:
        """The steps from which the newest start of the command continued; several if it restarted its ranks."""

    @abstractmethod
    def saved(self, run: Path) -> list[Path]:
        """Folders of checkpoints, newest first, complete or not."""

    @abstractmethod
    def step_of(self, checkpoint: Path) -> int: ...

    @abstractmethod
    def is_complete(self, run: Path) -> bool: ...

    @abstractmethod
    def rank_file(self, checkpoint: Path, rank: int) -> Path:
        """The file that this rank wrote; the optimizer's file if there are several."""

    @abstractmethod
    def pids(self, run: Path) -> list[int]:
        """Process ids of the newest start's ranks, in order; empty until all ranks have written theirs."""

    @abstractmethod
    def save_failed(self, run: Path) -> bool:
        """Whether a save has failed and training continued."""

    @abstractmethod
    def back_to(self, run: Path, step: int) -> None:
        """Change a finished run to one that ended at the checkpoint of `step`."""

    @abstractmethod
    def last_words(self, run: Path) -> str:
        """Error message of the newest start, in one line; empty if there is none."""

    # ------------------------------------------------------------ common to both sides

    def undisturbed(self, name: str, *, seed: int = 1) -> Path:
        """A training without a fault, done once per `name`. Raises HeadwayError if it fails."""
        run = self.folder / name
        if not self.is_complete(run):
            process = self.start(run, Settings(seed=seed))
            self.ended(process)
            if not self.is_complete(run):
                self.stop(run, process)
                raise HeadwayError(
                    f"{self.name}: the training without a fault failed ({self.last_words(run) or 'no message'}); run "
                    "`headway doctor`, or try again with less load on this machine"
                )
        return run

    def copy(self, run: Path, to: Path) -> Path:
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(run, to)
        return to

    def newest(self, run: Path) -> int:
        """Step of the newest checkpoint folder; 0 if there is none."""
        return max((self.step_of(path) for path in self.saved(run)), default=0)

    def wait_until(self, run: Path, process: Process, step: int) -> bool:
        """Wait until `step` is recorded. False if the process ended before, or after a timeout."""
        end = time.monotonic() + _QUIET_S
        while max(self.losses(run), default=0) < step or not self.pids(run):
            if process.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.003)
        return True

    def ended(self, process: Process, within_s: float = _ENDS_S) -> int | None:
        """Wait for the exit status; None if the process has not ended within `within_s`."""
        end = time.monotonic() + within_s
        while (status := process.poll()) is None and time.monotonic() < end:
            time.sleep(0.005)
        return status

    def stop(self, run: Path, process: Process) -> None:
        """Kill the process and its ranks, and wait until they have ended."""
        pids = [process.pid, *self.pids(run)] if process.poll() is None else self.pids(run)
        for pid in pids:
            send(pid, signal.SIGKILL)
        self.ended(process)
        end = time.monotonic() + 5
        while any(alive(pid) for pid in pids[1:]) and time.monotonic() < end:
            time.sleep(0.005)

    def finish(self, run: Path, settings: Settings, *, had: int, before: Sequence[int] = ()) -> Seen:
        """Start the same command again and wait for its end. `before`: steps from which earlier starts continued."""
        begun, said = tuple(before), ""
        if not self.is_complete(run):
            process = self.start(run, settings)
            if self.ended(process) is None:
                said = f"not ended within {_ENDS_S:.0f} s"
                self.stop(run, process)
            begun += self.begun_from(run)
        complete = self.is_complete(run)
        if not complete and not said:
            said = self.last_words(run)
        return Seen(begun_from=begun, had=had, complete=complete, same_losses=self.is_right(run), said=said)

    def is_right(self, run: Path) -> bool:
        """Whether the losses equal those of the uninterrupted training."""
        return self.losses(run) == self.losses(self.folder / "reference")


class Stock(Side):
    """DeepSpeed used as in its documentation: `headway.launcher.chaos.stock` under torchrun."""

    name = "stock DeepSpeed"

    def _words(self, run: Path, settings: Settings) -> list[str]:
        options = stock.Options(
            steps=settings.steps,
            save_every=settings.save_every,
            timeout_s=settings.limit_s,
            seed=settings.seed,
            die=settings.die,
        )
        return ["headway.launcher.chaos.stock", str(run), options.words()]

    def _forked(self, run: Path, settings: Settings, log: int) -> Process:
        self._forget(run)
        request = {"worker": self._words(run, settings), "processes": 2, "env": self._environment()}
        return Forked(self.server.path, request, log, log)

    def _alone(self, run: Path, settings: Settings, log: int) -> Process:
        self._forget(run)
        words = ["torch.distributed.run", "--standalone", "--nnodes", "1", "--nproc-per-node", "2"]
        return _shell([*words, "--log-dir", str(run / "torchrun"), "-m", *self._words(run, settings)], log)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1"}

    def _forget(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        for path in run.glob("rank-*.pid"):
            path.unlink()
        with (run / stock.RECORDS).open("a", encoding="utf-8") as f:
            f.write('{"start": true}\n')

    def _records(self, run: Path) -> Iterator[dict[str, Any]]:
        yield from _lines(run / stock.RECORDS)

    def losses(self, run: Path) -> dict[int, tuple[Any, ...]]:
        return {r["step"]: (r["loss"],) for r in self._records(run) if "step" in r}

    def begun_from(self, run: Path) -> tuple[int, ...]:
        begun: list[int] = []
        for record in self._records(run):
            begun = [] if "start" in record else [*begun, record["from"]] if "from" in record else begun
        return tuple(begun)

    def saved(self, run: Path) -> list[Path]:
        return sorted((run / "checkpoints").glob("global_step*"), key=self.step_of, reverse=True)

    def step_of(self, checkpoint: Path) -> int:
        return int(checkpoint.name.removeprefix("global_step"))

    def is_complete(self, run: Path) -> bool:
        return (run / stock.COMPLETE).exists()

    def rank_file(self, checkpoint: Path, rank: int) -> Path:
        return checkpoint / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"

    def pids(self, run: Path) -> list[int]:
        return _pids(run, run / "rank-0.pid", run / "rank-1.pid")

    def save_failed(self, run: Path) -> bool:
        return False  # a failed save raises an exception that ends the training

    def back_to(self, run: Path, step: int) -> None:
        for path in self.saved(run):
            if self.step_of(path) > step:
                shutil.rmtree(path)
        (run / "checkpoints" / "latest").write_text(f"global_step{step}")
        (run / stock.COMPLETE).unlink()

    def last_words(self, run: Path) -> str:
        text = self.log(run).read_text(errors="replace")
        errors = re.findall(r"^(?:\[rank\d\]: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", text, re.MULTILINE)
        return _short(errors[0]) if errors else ""


class Headway(Side):
    """The command `headway train`."""

    name = "Headway"

    def __init__(self, server: ForkServer, folder: Path) -> None:
        super().__init__(server, folder)
        self.spec = folder / "chaos.yaml"
        self.spec.write_text(SPEC)

    def _words(self, run: Path, settings: Settings) -> list[str]:
        return [
            *("train", str(self.spec), f"run_dir={run}", f"train.tokens={_TOKENS * settings.steps}"),
            *(f"seed={settings.seed}", f"checkpoint.every_tokens={_TOKENS * settings.save_every}"),
            *(f"checkpoint.keep={settings.keep}", f"launch.restarts={settings.restarts}"),
            f"launch.hang_s={settings.limit_s}",
        ]

    def _forked(self, run: Path, settings: Settings, log: int) -> Process:
        env = {} if settings.die is None else {"HEADWAY_FAULT": f"{settings.die}:kill"}
        return Forked.headway(self.server, self._words(run, settings), cwd=self.folder, log=log, **env)

    def _alone(self, run: Path, settings: Settings, log: int) -> Process:
        return _shell(["headway.launcher", *self._words(run, settings)], log)

    def losses(self, run: Path) -> dict[int, tuple[Any, ...]]:
        keys = ("loss", "grad_norm", "lr", "batch_hash")
        return {
            r["step"]: tuple(r.get(key) for key in keys)
            for r in _lines(run / "metrics.jsonl")
            if r.get("kind") == "train"
        }

    def begun_from(self, run: Path) -> tuple[int, ...]:
        found = re.findall(r"resumed from .* \(step (\d+)/|^(step) +1/", self._said(run), re.MULTILINE)
        return tuple(int(step or 0) for step, _ in found)

    def saved(self, run: Path) -> list[Path]:
        return steps_on_disk(run / "checkpoints")

    def step_of(self, checkpoint: Path) -> int:
        return step_of(checkpoint)

    def is_complete(self, run: Path) -> bool:
        return (run / "summary.json").exists()

    def rank_file(self, checkpoint: Path, rank: int) -> Path:
        return sorted(path for path in checkpoint.iterdir() if path.name != MANIFEST)[rank]

    def pids(self, run: Path) -> list[int]:
        return _pids(run, run / "logs" / "rank-0.pid", run / "logs" / "rank-1.pid")

    def save_failed(self, run: Path) -> bool:
        return any(r.get("kind") == "checkpoint_failed" for r in _lines(run / "metrics.jsonl"))

    def back_to(self, run: Path, step: int) -> None:
        for path in self.saved(run):
            if self.step_of(path) > step:
                shutil.rmtree(path)
        (run / "summary.json").unlink()

    def last_words(self, run: Path) -> str:
        errors = re.findall(r"^error: (.*)$", self._said(run), re.MULTILINE)
        return _short(errors[-1]) if errors else ""

    def _said(self, run: Path) -> str:
        return self.log(run).read_text(errors="replace")


def _shell(words: list[str], log: int) -> Process:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *words],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Complete records of a file that may still be written."""
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def _pids(run: Path, *paths: Path) -> list[int]:
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.read_text())
            if os.fsencode(run) in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found if len(found) == len(paths) else []


def alive(pid: int) -> bool:
    return state(pid) not in ("", "Z", "X")


def _short(text: str) -> str:
    """Shorten a message and remove paths and error numbers, so that equal errors are counted together."""
    text = re.sub(r"\[Errno \d+\] |\S*/(?=\S)", "", text)
    return text if len(text) <= 72 else text[:69] + "..."
