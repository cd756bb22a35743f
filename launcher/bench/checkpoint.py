"""`headway bench checkpoint`: measure how long a checkpoint blocks training, and how much it slows steps while it is
written.

Each round takes steps without a save, starts a save, takes steps until it is committed, and again takes steps without a
save. The steps during the write are compared with the median of their own round, so that a drifting machine speed
affects both. The cost of a checkpoint is the time that training waits plus the additional time of its steps.

At the end of each round, as many bytes as the checkpoint has are copied from memory to memory that is in use. No save
in which training waits for a copy of its state can take less. Other safety measures of a run are timed there too:
hashing the files (the writer hashes their contents in memory), the signs of life of a step, and hashing the parameters
for the comparison of replicas, without the exchange of the hashes.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.base.spread import spread
from headway.launcher.hosts.commands import worker_environment
from headway.launcher.run.heartbeat import Heartbeat
from headway.launcher.run.machine import git_commit, machine, versions
from headway.launcher.run.resolve import resolve
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec
from headway.parallel.config import CheckpointConfig, CheckpointError, GuardConfig
from headway.parallel.manifest import MANIFEST, file_hash, steps_on_disk

if TYPE_CHECKING:
    from torch import Tensor

    from headway.launcher.train.session import Session
    from headway.parallel.checkpoint import Checkpoint

WARMUP = 1
"""Rounds that are not counted: the first save deletes no older checkpoint, and the first steps fill caches."""
COPY_BLOCK = 1 << 30
"""Bytes of the memory that is copied. A larger checkpoint is copied in several turns."""
QUIET_STEPS = 3
"""Steps without a save before and after each save."""


def bench_checkpoint(path: Path, overrides: Sequence[str], *, rounds: int, out: Path | None) -> int:
    """Measure `rounds` saves of the spec at `path` in one process, on the file system of its `run_dir`.

    Raises SpecError for several processes or too few rounds, CheckpointError if a save fails.
    """
    if rounds < 2:
        raise SpecError(f"--rounds: {rounds} measured save(s) have no spread; use at least 2")
    spec, _ = resolve(load_spec(path, overrides).spec)
    if spec.launch.world_size != 1:
        raise SpecError("launch.processes: bench checkpoint measures one process; use launch.processes=1")
    os.environ.update(worker_environment(spec))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory(dir=_place(spec), prefix="bench-checkpoint-") as folder:
        result = _measure(_prepared(spec), Path(folder), rounds)
    result |= {
        "command": shlex.join(["headway", "bench", "checkpoint", str(path), *overrides, "--rounds", str(rounds)]),
        "spec": spec.model_dump(mode="json"),
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    console.result(summary(result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        console.say(f"written to {out}")
    return 0


def _place(spec: Spec) -> Path:
    """The nearest existing parent of the run folder, which is on the same file system."""
    wanted = Path(spec.run_dir or f"runs/{spec.name}").absolute()
    return next(folder for folder in wanted.parents if folder.is_dir())


def _prepared(spec: Spec) -> Spec:
    """The spec with saves only on request, one checkpoint kept, and enough tokens that the run does not end."""
    settings = {"every_tokens": None, "every_minutes": None, "keep": 1, "keep_every_tokens": None, "keep_best": False}
    settings |= {"keep_at_tokens": ()}
    return spec.model_copy(
        update={
            "init": spec.init.without_run(),
            "checkpoint": spec.checkpoint.model_copy(update={**settings, "max_failures": 1}),
            "train": spec.train.model_copy(update={"tokens": max(spec.train.tokens, 100_000 * spec.tokens_per_step)}),
        }
    )


def _measure(spec: Spec, folder: Path, rounds: int) -> dict[str, Any]:
    from headway.launcher.train.load import open_session

    run = RunDir(folder / "run")
    run.path.mkdir()
    write_json(run.spec, spec.model_dump(mode="json"))
    with open_session(run) as session, console.progress("measure saves", WARMUP + rounds, "saves", tick=False) as bar:
        measured, plain = [], _PlainCopy()
        for _ in range(WARMUP + rounds):
            measured.append(_round(session, run, plain))
            bar.update()
        measured = measured[WARMUP:]
        found = _newest(run)
    quiet = [seconds for r in measured for seconds in r["quiet_s"]]
    ratios = [seconds / statistics.median(r["quiet_s"]) for r in measured for seconds in r["beside_s"]]
    stall, cost = [r["stall_s"] for r in measured], [r["cost_s"] for r in measured]
    gigabytes = found.bytes / 1e9
    minutes, every_steps = CheckpointConfig().every_minutes, GuardConfig().replicas_every_steps
    assert minutes is not None and every_steps is not None
    hash_s, beats_s, replicas_s = (spread([r[name] for r in measured]) for name in ("hash_s", "beats_s", "replicas_s"))
    step_s = statistics.median(quiet)
    return {
        "kind": "checkpoint",
        "bytes": found.bytes,
        "parameters": sum(p.numel() for p in session.engine.module.parameters()),
        "file_system": _file_system(folder),
        "tokens_per_step": spec.tokens_per_step,
        "stall_s": spread(stall),
        "stall_s_per_gb": spread([s / gigabytes for s in stall]),
        "copy_s_per_gb": spread([r["copy_s"] / gigabytes for r in measured]),
        "stall_over_copy": spread([r["stall_s"] / r["copy_s"] for r in measured]),
        "write_s": spread([r["write_s"] for r in measured]),
        "step_s": spread(quiet),
        "step_beside_over_step": spread(ratios),
        "cost_s": spread(cost),
        "default_interval_s": 60 * minutes,
        "stall_share_at_default_interval": statistics.median(stall) / (60 * minutes),
        "cost_share_at_default_interval": statistics.median(cost) / (60 * minutes),
        "hash_s": hash_s,
        "hash_share_at_default_interval": hash_s["median"] / (60 * minutes),
        "beats_s": beats_s,
        "beats_share": beats_s["median"] / step_s,
        "replicas_s": replicas_s,
        "default_replicas_every_steps": every_steps,
        "replicas_share_at_default_interval": replicas_s["median"] / (every_steps * step_s),
        "raw_rounds": measured,
    }


class _PlainCopy:
    """Copies memory to memory. Both are written before, so that the kernel clears no pages while the time is taken."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []

    def seconds(self, size: int) -> float:
        """Seconds that a copy of `size` bytes takes."""
        import torch

        block = min(size, COPY_BLOCK)
        if not self._memory or self._memory[0].numel() < block:
            self._memory = [torch.full((block,), value, dtype=torch.uint8) for value in (1, 2)]
        source, target = self._memory
        whole, rest = divmod(size, block)
        t0 = time.perf_counter()
        for length in [block] * whole + [rest]:
            target[:length].copy_(source[:length])
        return time.perf_counter() - t0


def _round(session: Session, run: RunDir, plain: _PlainCopy) -> dict[str, Any]:
    """Seconds of one save, of the steps before, during and after it, of a copy and of the other safety measures."""
    from headway.launcher.train.loop import save
    from headway.parallel.replicas import hashed

    quiet = [_step(session)[0] for _ in range(QUIET_STEPS)]
    t0 = time.perf_counter()
    save(session)
    stall_s, step, beside, written = time.perf_counter() - t0, session.step, [], False
    while not written:
        seconds, written = _step(session)
        beside.append(seconds)
    t0 = time.perf_counter()
    session.saving.settle(session.tracker)
    stall_s += time.perf_counter() - t0
    quiet += [_step(session)[0] for _ in range(QUIET_STEPS)]
    saved = next(r for r in run.read_metrics() if r["kind"] == "checkpoint" and r["step"] == step)
    files = list(steps_on_disk(run.checkpoints)[0].iterdir())
    return {
        "stall_s": stall_s,
        "write_s": saved["write_s"],
        "cost_s": stall_s + sum(beside) - len(beside) * statistics.median(quiet),
        "quiet_s": quiet,
        "beside_s": beside,
        "copy_s": plain.seconds(sum(path.stat().st_size for path in files if path.name != MANIFEST)),
        "hash_s": _seconds(lambda: [file_hash(path) for path in files]),
        "beats_s": _seconds(partial(_beats, Heartbeat(run.path / "beat", 0), step), times=100),
        "replicas_s": _seconds(lambda: [hashed(p.parameter.data) for p in session.engine.logical]),
    }


def _seconds(act: Callable[[], Any], *, times: int = 1) -> float:
    """Mean seconds of a call over `times` calls."""
    t0 = time.perf_counter()
    for _ in range(times):
        act()
    return (time.perf_counter() - t0) / times


def _beats(heart: Heartbeat, step: int) -> None:
    """The signs of life that the worker writes in one step."""
    heart.beat("data", step)
    heart.beat("step", step)


def _step(session: Session) -> tuple[float, bool]:
    """Seconds of one step of the worker, and whether the pending save was written when it began."""
    from headway.launcher.train.loop import train_step

    t0 = time.perf_counter()
    step = train_step(session)
    return time.perf_counter() - t0, step.agreed.written


def _newest(run: RunDir) -> Checkpoint:
    from headway.parallel.checkpoint import newest_readable

    damaged: list[str] = []
    found = newest_readable(run.checkpoints, warn=damaged.append, run=run.run_id())
    if damaged:
        raise CheckpointError(f"a measured checkpoint is damaged ({damaged[0]}); check the disk, and measure again")
    return found


def _file_system(folder: Path) -> str:
    """Type of the folder's file system; "unknown" if /proc/self/mounts cannot be read."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    around = [m for m in mounts if folder.resolve().is_relative_to(m[1])]
    return max(around, key=lambda m: len(m[1]))[2] if around else "unknown"


def summary(result: dict[str, Any]) -> str:
    """The measurement in six lines."""

    def ms(name: str) -> str:
        s = result[name]
        return f"{1e3 * s['median']:.1f} ms (quartiles {1e3 * s['q1']:.1f} to {1e3 * s['q3']:.1f}, n={s['n']})"

    def share(name: str) -> str:
        return f"{100 * result[name]:.4f} %"

    ratio, write_s = result["step_beside_over_step"], result["write_s"]["median"]
    rate = result["bytes"] / write_s / 1e6
    per_gb, copy, times = (result[name] for name in ("stall_s_per_gb", "copy_s_per_gb", "stall_over_copy"))
    return "\n".join(
        [
            f"{result['bytes'] / 1e6:,.1f} MB of {result['parameters']:,} parameters on {result['file_system']}",
            f"  training waits {ms('stall_s')}; files are written during training in {write_s:.2f} s "
            f"({rate:,.0f} MB/s)",
            f"  it waits {per_gb['median']:.3f} s per GB, {times['median']:.2f} times as long as a plain copy "
            f"({copy['median']:.3f} s per GB; quartiles {times['q1']:.2f} to {times['q3']:.2f}, n={times['n']})",
            f"  a step takes {ms('step_s')}, and {ratio['median']:.3f} times as long during the write "
            f"(quartiles {ratio['q1']:.3f} to {ratio['q3']:.3f}, n={ratio['n']})",
            f"  with one checkpoint per {result['default_interval_s'] / 60:g} minutes: waiting takes "
            f"{100 * result['stall_share_at_default_interval']:.3f} % of the time, waiting and slower steps "
            f"{100 * result['cost_share_at_default_interval']:.3f} %",
            f"  hashing the files takes {share('hash_share_at_default_interval')} of the time, during training; signs "
            f"of life take {share('beats_share')}; hashes of replicas every "
            f"{result['default_replicas_every_steps']} steps take {share('replicas_share_at_default_interval')}",
        ]
    )
