"""Compare the engine for one process with DeepSpeed's ZeRO-1: time in turns, memory, page faults, and time to start.

    python -P tests/parallel/engine_bench.py docs/results/bench/engine.json

It needs the data of yaml/base/quickstart.yaml. Not a test module.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from headway.launcher.base.spread import spread
from headway.launcher.run.machine import git_commit, machine, versions

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "yaml" / "base" / "quickstart.yaml"
ENGINES = ("auto", "deepspeed")
SIZES: dict[str, tuple[list[str], int]] = {
    "1.2M": ([], 60),
    "47M": (["model.width=512", "model.layers=16", "model.ffn_width=1408", "attention.head_dim=64"], 9),
}
"""Name -> overrides and measured steps."""
WARMUP, PROCESSES, ALONE, STARTS, SAVES = 3, 2, 3, 5, 6
PARTS = ("step", "forward", "backward", "optimizer")


class Loop:
    """Steps of one engine on the batches of the spec."""

    def __init__(self, words: list[str], engine: str) -> None:
        import torch

        from headway.data.loader import Loader
        from headway.launcher.run.resolve import resolve
        from headway.launcher.spec.load import load_spec
        from headway.parallel.build import make_engine
        from headway.parallel.layout import Layout

        spec, _ = resolve(load_spec(SPEC, [*words, f"parallel.engine={engine}", "launch.device=cpu"]).spec)
        assert spec.model.vocab_size is not None
        train = spec.train
        self.engine = make_engine(
            spec.model,
            spec.attention,
            vocab_size=spec.model.vocab_size,
            seed=spec.seed,
            seq_len=spec.data.seq_len,
            parallel=spec.parallel,
            optimizer=spec.optimizer,
            layout=Layout(rank=0, local_rank=0, device=torch.device("cpu")),
            micro_batch=train.micro_batch,
            accumulation=train.global_batch // train.micro_batch,
        )
        self.engine._clock = CpuClock()
        sizes: dict[str, Any] = {"global_batch": train.global_batch, "micro_batch": train.micro_batch}
        self._loader = Loader(spec.data, split="train", dp_rank=0, dp_size=1, **sizes)
        self._step, self.losses = 0, list[float]()

    def step(self) -> dict[str, float]:
        """CPU seconds of one step and of its parts, and its seconds by the clock."""
        batch = self._loader.batch(self._step)
        self._step += 1
        wall, cpu = time.perf_counter(), time.process_time()
        stats = self.engine.train_step(batch.micro, targets=batch.targets, lr=1e-3)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        self.losses.append(stats.loss)
        parts = (cpu, stats.forward_s, stats.backward_s, stats.optimizer_s)
        return {"wall": wall} | {name: float(seconds or 0.0) for name, seconds in zip(PARTS, parts, strict=True)}


class CpuClock:
    """A phase clock that counts CPU time of the process: other programs on the machine change it less."""

    def start(self) -> None:
        self._last, self._seconds = time.process_time(), [0.0, 0.0, 0.0]

    def end(self, phase: int) -> None:
        now = time.process_time()
        self._seconds[phase] += now - self._last
        self._last = now

    def read(self) -> tuple[float, float, float]:
        forward, backward, optimizer = self._seconds
        return forward, backward, optimizer


def join_group() -> None:
    """Set this process up as a rank of its own, as the worker does."""
    import torch
    import torch.distributed as dist

    from headway.launcher.train.allocator import keep_buffers

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    keep_buffers()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def turns(size: str) -> dict[str, Any]:
    """Both engines step by step in one process."""
    join_group()
    words, steps = SIZES[size]
    loops = {engine: Loop(words, engine) for engine in ENGINES}
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for turn in range(WARMUP + steps):
        for engine in ENGINES if turn % 2 else ENGINES[::-1]:
            seconds = loops[engine].step()
            if turn >= WARMUP:
                found[engine].append(seconds)
    assert loops["auto"].losses == loops["deepspeed"].losses
    result: dict[str, Any] = {"steps": steps, "equal_losses": True}
    result["parameters"] = sum(p.parameter.numel() for p in loops["auto"].engine.logical)
    for part in (*PARTS, "wall"):
        ours, theirs = ([seconds[part] for seconds in found[engine]] for engine in ENGINES)
        result[part] = {
            "seconds": {engine: spread(times) for engine, times in zip(ENGINES, (ours, theirs), strict=True)},
            "auto_over_deepspeed": spread([a / b for a, b in zip(ours, theirs, strict=True)]),
            "raw": dict(zip(ENGINES, (ours, theirs), strict=True)),
        }
    result["copy_for_a_save"] = copies(loops)
    return result


def copies(loops: dict[str, Loop]) -> dict[str, Any]:
    """CPU seconds of the copy that training waits for when a checkpoint is saved, per GB of the checkpoint."""
    from headway.parallel.config import CheckpointConfig
    from headway.parallel.saver import Saver

    found: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    savers = {
        engine: Saver(Path(), loop.engine, loop.engine.layout, CheckpointConfig(), about={})
        for engine, loop in loops.items()
    }
    for turn in range(1 + SAVES):
        for engine in ENGINES if turn % 2 else ENGINES[::-1]:
            saver = savers[engine]
            began = time.process_time()
            image, _ = saver._copied()
            seconds = time.process_time() - began
            found[engine] += [seconds / image.data.nbytes * 1e9] * (turn > 0)
    ours, theirs = (found[engine] for engine in ENGINES)
    return {
        "seconds_per_gb": {engine: spread(times) for engine, times in found.items()},
        "auto_over_deepspeed": spread([a / b for a, b in zip(ours, theirs, strict=True)]),
        "raw": found,
    }


def alone(size: str, engine: str) -> dict[str, Any]:
    """Peak memory and page faults of a process with one engine."""
    join_group()
    words, _ = SIZES[size]
    loop = Loop(words, engine)
    loop.step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(ALONE):
        loop.step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    faults = (after.ru_minflt - before.ru_minflt) / ALONE
    system = (after.ru_stime - before.ru_stime) / ALONE
    return {"peak_bytes": after.ru_maxrss * 1024, "faults_per_step": faults, "system_s_per_step": system}


def first_step(engine: str) -> dict[str, float]:
    """Seconds from the command `headway train` to the record of its first step, and CPU seconds of the whole run."""
    with tempfile.TemporaryDirectory(prefix="engine-bench-") as folder:
        run = Path(folder) / "run"
        words = ["train.tokens=4096", "schedule.warmup_tokens=1024", "launch.threads=1", f"run_dir={run}"]
        words += [f"parallel.engine={engine}", "train.validate_first=false", "launch.device=cpu"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-P", "-m", "headway.launcher", "train", str(SPEC), *words]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not ((run / "metrics.jsonl").exists() and '"train"' in (run / "metrics.jsonl").read_text()):
            if process.poll() not in (None, 0):
                raise SystemExit(f"headway train failed: {' '.join(command)}")
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        process.wait()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"first_step_s": seconds, "cpu_s": cpu}


def in_child(script: Path, *words: str) -> dict[str, Any]:
    """The result that a script prints, in a process with one thread."""
    command = [sys.executable, "-P", str(script.resolve()), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))


def main() -> None:
    result: dict[str, Any] = {
        "kind": "engine",
        "command": "python -P tests/parallel/engine_bench.py docs/results/bench/engine.json",
        "spec": SPEC.relative_to(ROOT).as_posix(),
        "threads": 1,
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "load_average_at_start": os.getloadavg(),
        "sizes": {},
    }
    for size, (words, _) in SIZES.items():
        found = result["sizes"][size] = {"overrides": words, **in_child(Path(__file__), "turns", size)}
        processes = [
            (engine, in_child(Path(__file__), "alone", size, engine)) for _ in range(PROCESSES) for engine in ENGINES
        ]
        found["alone"] = {engine: [r for e, r in processes if e == engine] for engine in ENGINES}
        print(size, found["step"]["auto_over_deepspeed"], flush=True)
    starts = [(engine, first_step(engine)) for _ in range(STARTS) for engine in ENGINES]
    result["start"] = {
        engine: {
            "raw": [r for e, r in starts if e == engine],
            "least_s": min(r["first_step_s"] for e, r in starts if e == engine),
            "median_cpu_s": statistics.median(r["cpu_s"] for e, r in starts if e == engine),
        }
        for engine in ENGINES
    }
    result["load_average_at_end"] = os.getloadavg()
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] in ("turns", "alone"):
        print("RESULT", json.dumps(turns(sys.argv[2]) if sys.argv[1] == "turns" else alone(*sys.argv[2:])), flush=True)
        os._exit(0)
    main()
