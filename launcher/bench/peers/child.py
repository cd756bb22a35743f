"""`python -m headway.launcher.bench.peers.child FOLDER`: train some engines in turns, step by step, in this process.

FOLDER has the spec as `spec.json` and `job.json`: {"engines": [...], "rounds": n, "keep_buffers": true or false}. The
result is written to `result.json`. With one engine, the process shows the memory that this engine needs.

All engines see the same batches, with the same initial weights, learning rates, AdamW settings and clipping. Headway's
step is that of `headway train`, which also reads the batch and writes the records of the run. The others get a batch
that was read before their clock starts, and record nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from headway.data.loader import Loader, StepBatch
from headway.launcher.bench.peers.models import HEADWAY, make_peer, parameters
from headway.launcher.hosts.commands import worker_environment
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.run.stored_spec import stored_spec
from headway.launcher.spec.spec import Spec
from headway.launcher.train.allocator import keep_buffers
from headway.model.decoder import Decoder
from headway.parallel.engine import parameter_groups
from headway.parallel.schedule import learning_rate

if TYPE_CHECKING:
    from headway.launcher.train.session import Session

B = TypeVar("B")

WARM_UP = 2
"""Rounds that are not counted: they fill caches, and make the state of the optimizer."""


class Timed(NamedTuple):
    """Seconds of one step, and its loss in nats per target."""

    seconds: float
    loss: float


class HeadwayLoop:
    """The step of `headway train`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.parameters = sum(p.parameter.numel() for p in session.engine.logical)

    def step(self, batch: StepBatch) -> Timed:
        """One step. `batch` is not used: the session reads the same one itself."""
        from headway.launcher.train.loop import train_step

        start = time.perf_counter()
        stats = train_step(self._session).stats
        return Timed(time.perf_counter() - start, stats.loss)


class PeerLoop:
    """A training loop around the model of another library: forward, backward, clipping, fused AdamW.

    In bf16, the weights stay in fp32 and the passes run under `torch.autocast`.
    """

    def __init__(self, name: str, spec: Spec) -> None:
        assert spec.model.vocab_size is not None
        decoder = Decoder(spec.model, spec.attention, vocab_size=spec.model.vocab_size, seed=spec.seed)
        self._peer, self._spec = make_peer(name, spec, decoder.state_dict()), spec
        self.parameters = parameters(self._peer.module)
        options = spec.optimizer
        self._adamw = torch.optim.AdamW(
            parameter_groups(self._peer.module, options.weight_decay),
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            fused=True,
        )

    def step(self, batch: StepBatch) -> Timed:
        """One step with the learning rate that Headway has at this batch."""
        lr = rate(self._spec, batch.step)
        start = time.perf_counter()
        for group in self._adamw.param_groups:
            group["lr"] = lr
        total = torch.zeros(())
        for micro in batch.micro:
            with torch.autocast("cpu", torch.bfloat16, enabled=self._spec.parallel.precision == "bf16"):
                loss = self._peer.loss(micro.tokens, micro.labels, batch.targets)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._peer.module.parameters(), self._spec.optimizer.clip_norm)
        self._adamw.step()
        self._adamw.zero_grad()
        value = total.item()
        return Timed(time.perf_counter() - start, value)


def rate(spec: Spec, step: int) -> float:
    """Learning rate of a step, from 0."""
    tokens, total = spec.tokens_per_step, spec.steps * spec.tokens_per_step
    return learning_rate(
        spec.optimizer,
        spec.schedule,
        tokens_before=step * tokens,
        tokens_after=(step + 1) * tokens,
        total_tokens=total,
    )


def measure(run: RunDir, engines: Sequence[str], *, rounds: int) -> dict[str, Any]:
    """Train the spec of `run` with all engines, a step each in every round. Uses the environment of a worker.

    The order rotates from round to round, because a step finds the caches that the one before it has left. Returns
    seconds and losses of each engine's steps (losses with those of the warm-up), its parameters, and what this process
    needed: page faults, system time, and memory before the first step (imports, weights) and in total.
    """
    spec = stored_spec(run)
    with contextlib.ExitStack() as stack:
        loops: dict[str, HeadwayLoop | PeerLoop] = {}
        if HEADWAY in engines:
            from headway.launcher.train.load import (
                open_session,  # not in a process without it, whose memory is measured
            )

            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # the console lines of its steps
            loops[HEADWAY] = HeadwayLoop(stack.enter_context(open_session(run)))
        loops |= {name: PeerLoop(name, spec) for name in engines if name != HEADWAY}
        loader = Loader(
            spec.data,
            split="train",
            global_batch=spec.train.global_batch,
            micro_batch=spec.train.micro_batch,
            dp_rank=0,
            dp_size=1,
        )
        stack.callback(loader.close)
        steps = {name: loop.step for name, loop in loops.items()}
        before = peak_bytes()
        seconds, losses, used = in_turns(steps, loader.batch, rounds=rounds)
        counts = {name: loop.parameters for name, loop in loops.items()}
    memory = {"peak_bytes_before_steps": before, "peak_bytes": peak_bytes()}
    return {"step_s": seconds, "losses": losses, "parameters": counts, **used, **memory}


def in_turns(
    steps: Mapping[str, Callable[[B], Timed]], batch_of: Callable[[int], B], *, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """(seconds without warm-up, losses, page faults and system time of this process in a round).

    steps: engine -> its step on a batch. batch_of: the batch of a round, made before any engine's clock starts.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, list[float]] = {name: [] for name in names}
    before = resource.getrusage(resource.RUSAGE_SELF)
    for turn in range(WARM_UP + rounds):
        if turn == WARM_UP:
            before = resource.getrusage(resource.RUSAGE_SELF)
        batch = batch_of(turn)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            timed = steps[name](batch)
            losses[name].append(timed.loss)
            if turn >= WARM_UP:
                seconds[name].append(timed.seconds)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return (
        seconds,
        losses,
        {
            "page_faults_per_round": (after.ru_minflt - before.ru_minflt) / rounds,
            "system_s_per_round": (after.ru_stime - before.ru_stime) / rounds,
        },
    )


def peak_bytes() -> int:
    """Largest resident memory of this process so far.

    Read from /proc, since `getrusage` also counts the memory of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


def main() -> int:
    folder = Path(sys.argv[1])
    run, job = RunDir(folder), json.loads((folder / "job.json").read_text())
    os.environ.update(worker_environment(stored_spec(run)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if job["keep_buffers"]:
        keep_buffers()
    result = measure(run, job["engines"], rounds=job["rounds"])
    write_json(folder / "result.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
