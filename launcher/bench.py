"""`headway bench step` and `headway bench data`: speed with its spread and its baseline, in one run."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.launcher.errors import SpecError
from headway.launcher.launch import resolve, worker_environment
from headway.launcher.load import load_spec
from headway.launcher.machine import git_commit, machine, versions
from headway.launcher.run_dir import RunDir
from headway.launcher.spec import Spec

WARMUP = 3


def bench_step(path: Path, overrides: Sequence[str], *, steps: int, out: Path | None) -> int:
    """Time Headway's whole step beside a bare PyTorch loop with the same model, optimizer and batches.

    The two take turns, step by step, in one process, so that a machine whose speed drifts slows both. Headway's side
    includes the loader, DeepSpeed, the agreement over ranks, metrics.jsonl and TensorBoard. Raises SpecError for more
    than one process.
    """
    spec, _ = resolve(load_spec(path, overrides).spec)
    if spec.launch.processes != 1:
        raise SpecError("launch.processes: bench step measures one process; give launch.processes=1")
    os.environ.update(worker_environment(spec))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if spec.steps < steps + WARMUP:
        tokens = (steps + WARMUP) * spec.tokens_per_step
        spec = spec.model_copy(update={"train": spec.train.model_copy(update={"tokens": tokens})})
    with tempfile.TemporaryDirectory() as folder:
        result = _measure_step(spec, RunDir(Path(folder)), steps)
    _report(result, spec, path, overrides, out)
    return 0


def _measure_step(spec: Spec, run: RunDir, steps: int) -> dict[str, Any]:
    from headway.launcher.run_dir import write_json
    from headway.launcher.session import Session

    write_json(run.spec, spec.model_dump(mode="json"))
    ours: list[float] = []
    bare: list[float] = []
    records: list[dict[str, float]] = []
    with Session.open(run) as s:
        baseline = _BareLoop(spec) if spec.parallel.precision == "fp32" else None
        for i in range(steps + WARMUP):
            t0 = time.perf_counter()
            batch = next(s.loader)
            data_s = time.perf_counter() - t0
            targets, digest, _ = s.agree(batch, False)
            stats = s.engine.train_step(batch.micro, targets=targets, lr=s.lr())
            s.record(stats, digest=digest, data_s=data_s, step_s=time.perf_counter() - t0)
            total_s = time.perf_counter() - t0
            bare_s = baseline.step(batch) if baseline is not None else None
            if i < WARMUP:
                continue
            ours.append(total_s)
            if bare_s is not None:
                bare.append(bare_s)
            records.append(
                {
                    "data": data_s,
                    "forward": stats.forward_s,
                    "backward": stats.backward_s,
                    "optimizer": stats.optimizer_s,
                    "rest": total_s - data_s - stats.forward_s - stats.backward_s - stats.optimizer_s,
                }
            )
    shares = {k: statistics.median(r[k] / t for r, t in zip(records, ours, strict=True)) for k in records[0]}
    result = {
        "kind": "step",
        "tokens_per_step": spec.tokens_per_step,
        "step_s": spread(ours),
        "tokens_per_s": spec.tokens_per_step / statistics.median(ours),
        "share_of_step": shares,
        "raw_step_s": ours,
    }
    if bare:
        ratios = [a / b for a, b in zip(ours, bare, strict=True)]
        result |= {"bare_step_s": spread(bare), "ratio_to_bare": spread(ratios), "raw_bare_step_s": bare}
    return result


class _BareLoop:
    """The loop a person would write by hand: forward, backward, clip, AdamW."""

    def __init__(self, spec: Spec) -> None:
        import torch

        from headway.model.decoder import Decoder
        from headway.parallel.engine import parameter_groups

        assert spec.model.vocab_size is not None
        self._model = Decoder(spec.model, spec.attention, vocab_size=spec.model.vocab_size, seed=spec.seed)
        o = spec.optimizer
        self._clip = o.clip_norm
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self._model, o.weight_decay), lr=o.lr, betas=o.betas, eps=o.eps, fused=True
        )

    def step(self, batch: Any) -> float:
        """Seconds of one step over the same micro batches."""
        import torch

        t0 = time.perf_counter()
        targets = max(1, batch.targets)
        for micro in batch.micro:
            out = self._model(micro.tokens, micro.labels, micro.segments)
            (out.loss_sum / targets + out.aux_loss / len(batch.micro)).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - t0


def bench_data(path: Path, overrides: Sequence[str], *, steps: int, out: Path | None) -> int:
    """Time the loader alone: every batch prepared in line, and how long a consumer that does nothing else waits."""
    spec, _ = resolve(load_spec(path, overrides).spec)
    from headway.data.loader import Loader

    t0 = time.perf_counter()
    loader = Loader(
        spec.data,
        split="train",
        global_batch=spec.train.global_batch,
        micro_batch=spec.train.micro_batch,
        dp_rank=0,
        dp_size=1,
    )
    open_s = time.perf_counter() - t0
    times = []
    for step in range(steps + WARMUP):
        t0 = time.perf_counter()
        loader.batch(step)
        if step >= WARMUP:
            times.append(time.perf_counter() - t0)
    loader.close()
    result = {
        "kind": "data",
        "open_s": open_s,
        "batch_s": spread(times),
        "tokens_per_step": spec.tokens_per_step,
        "tokens_per_s": spec.tokens_per_step / statistics.median(times),
        "raw_batch_s": times,
    }
    _report(result, spec, path, overrides, out)
    return 0


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "max": max(values), "n": len(values)}


def _report(result: dict[str, Any], spec: Spec, path: Path, overrides: Sequence[str], out: Path | None) -> None:
    result |= {
        "command": " ".join(["headway bench", result["kind"], str(path), *overrides]),
        "spec": spec.model_dump(mode="json"),
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    name = "step_s" if result["kind"] == "step" else "batch_s"
    s = result[name]
    print(
        f"{result['tokens_per_s']:,.0f} tokens/s ({name} median {1e3 * s['median']:.1f} ms, "
        f"quartiles {1e3 * s['q1']:.1f} to {1e3 * s['q3']:.1f}, n={s['n']})"
    )
    for part, share in result.get("share_of_step", {}).items():
        print(f"  {part:<10} {100 * share:5.1f} %")
    if "ratio_to_bare" in result:
        r = result["ratio_to_bare"]
        print(f"  over a bare PyTorch loop, pairwise: {r['median']:.3f} x (quartiles {r['q1']:.3f} to {r['q3']:.3f})")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {out}")
