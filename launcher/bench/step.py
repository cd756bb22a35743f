"""`headway bench step` and `headway bench data`: time training steps, or the data loader alone."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.base.spread import spread
from headway.launcher.hosts.commands import worker_environment
from headway.launcher.run.machine import git_commit, machine, versions
from headway.launcher.run.resolve import resolve
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec

if TYPE_CHECKING:
    from headway.launcher.train.session import Session

WARMUP = 3


def bench_step(
    path: Path, overrides: Sequence[str], *, steps: int, out: Path | None, against: Sequence[str] = ()
) -> int:
    """Time Headway's whole step and a bare PyTorch loop with the same model, optimizer and batches.

    They take turns, step by step, in one process, so that a drifting machine speed affects both. Headway's step
    includes the loader, the engine, the agreement of the ranks, metrics.jsonl and TensorBoard. `against`: overrides of
    a second spec to time as well, for example another mechanism. Raises SpecError for several processes.
    """
    _check_steps(steps)
    spec = _lengthened(resolve(load_spec(path, overrides).spec)[0], steps)
    other = None
    if against:
        # A key in `against` replaces the same key of the overrides. A `type` replaces all keys of its section.
        named = [word.split("=", 1)[0] for word in against]
        sections = tuple(key.removesuffix("type") for key in named if key.endswith(".type"))
        kept = [w for w in overrides if w.split("=", 1)[0] not in named and not (sections and w.startswith(sections))]
        other = _lengthened(resolve(load_spec(path, [*kept, *against]).spec)[0], steps)
    for s in (spec, other):
        if s is not None and s.launch.processes != 1:
            raise SpecError("launch.processes: bench step measures one process; use launch.processes=1")
    os.environ.update(worker_environment(spec))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as folder:
        result = _measure_step(spec, other, Path(folder), steps)
    result["against"] = list(against)
    _report(result, spec, path, overrides, out)
    return 0


def _lengthened(spec: Spec, steps: int) -> Spec:
    tokens = max(spec.train.tokens, (steps + WARMUP) * spec.tokens_per_step)
    train = spec.train.model_copy(update={"tokens": tokens})
    return spec.model_copy(update={"train": train, "init": spec.init.without_run()})


def _measure_step(spec: Spec, other: Spec | None, folder: Path, steps: int) -> dict[str, Any]:
    from headway.launcher.run.run_dir import write_json
    from headway.launcher.train.load import load_session, open_session

    run = RunDir(folder / "ours")
    run.path.mkdir()
    write_json(run.spec, spec.model_dump(mode="json"))
    with open_session(run) as session, contextlib.ExitStack() as stack:
        loops: dict[str, _HeadwayLoop | _BareLoop] = {"headway": _HeadwayLoop(session)}
        if spec.parallel.precision == "fp32" and not spec.model.is_encoder_decoder:
            loops["bare"] = _BareLoop(spec)
        if other is not None:
            second = RunDir(folder / "other")
            second.path.mkdir()
            rival = load_session(second, other, session.layout)
            stack.callback(rival.close)
            loops["against"] = _HeadwayLoop(rival)
        times: dict[str, list[float]] = {name: [] for name in loops}
        parts: list[dict[str, float]] = []
        names = list(loops)
        bar = stack.enter_context(console.progress("measure steps", steps + WARMUP, "steps", tick=False))
        for i in range(steps + WARMUP):
            bar.update()
            # The order rotates, because the second loop of a round finds warmer caches.
            for name in names[i % len(names) :] + names[: i % len(names)]:
                seconds, shares = loops[name].step()
                if i >= WARMUP:
                    times[name].append(seconds)
                    parts += [shares] if name == "headway" else []
    ours = times["headway"]
    result: dict[str, Any] = {
        "kind": "step",
        "tokens_per_step": spec.tokens_per_step,
        "step_s": spread(ours),
        "tokens_per_s": spec.tokens_per_step / statistics.median(ours),
        "share_of_step": {k: statistics.median(p[k] for p in parts) for k in parts[0]},
        "raw_step_s": ours,
    }
    for name in names[1:]:
        ratios = [a / b for a, b in zip(ours, times[name], strict=True)]
        result |= {f"{name}_step_s": spread(times[name]), f"raw_{name}_step_s": times[name]}
        result[f"ratio_to_{name}"] = spread(ratios)
    return result


class _HeadwayLoop:
    """The same step as in the worker of `headway train`."""

    def __init__(self, session: Session) -> None:
        self._s = session

    def step(self) -> tuple[float, dict[str, float]]:
        """(seconds, share of each part) of one step."""
        from headway.launcher.train.loop import train_step

        t0 = time.perf_counter()
        step = train_step(self._s)
        total_s = time.perf_counter() - t0
        stats = step.stats
        parts = {
            "data": step.data_s,
            "forward": stats.forward_s,
            "backward": stats.backward_s,
            "optimizer": stats.optimizer_s,
        }
        parts["rest"] = total_s - sum(parts.values())
        return total_s, {k: v / total_s for k, v in parts.items()}


class _BareLoop:
    """A minimal PyTorch loop: forward, backward, gradient clipping, AdamW."""

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

        # The same sequences as Headway's loop. They are loaded before the clock starts.
        from headway.data.loader import Loader

        train = spec.train
        self._loader = Loader(
            spec.data,
            split="train",
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            dp_rank=0,
            dp_size=1,
        )
        self._step = 0

    def step(self) -> tuple[float, dict[str, float]]:
        """(seconds of one step, no parts). The batch is loaded before the clock starts."""
        import torch

        batch = self._loader.batch(self._step)
        self._step += 1
        t0 = time.perf_counter()
        targets = max(1, batch.targets)
        for micro in batch.micro:
            out = self._model(micro.tokens, micro.labels, micro.segments)
            (out.loss_sum / targets + out.aux_loss / len(batch.micro)).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - t0, {}


def bench_data(path: Path, overrides: Sequence[str], *, steps: int, out: Path | None) -> int:
    """Time the loader alone: the time to open it, and to prepare each batch without prefetching."""
    _check_steps(steps)
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
    with console.progress("measure batches", steps + WARMUP, "batches", tick=False) as bar:
        for step in range(steps + WARMUP):
            t0 = time.perf_counter()
            loader.batch(step)
            if step >= WARMUP:
                times.append(time.perf_counter() - t0)
            bar.update()
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


def _check_steps(steps: int) -> None:
    if steps < 2:
        raise SpecError(f"--steps: {steps} measured step(s) have no spread; use at least 2")


def _report(result: dict[str, Any], spec: Spec, path: Path, overrides: Sequence[str], out: Path | None) -> None:
    result |= {
        "command": shlex.join(
            [
                *["headway", "bench", result["kind"], str(path), *overrides],
                *(word for key in result.get("against", []) for word in ("--against", key)),
                *["--steps", str(result["step_s" if result["kind"] == "step" else "batch_s"]["n"])],
            ]
        ),
        "spec": spec.model_dump(mode="json"),
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    name = "step_s" if result["kind"] == "step" else "batch_s"
    s = result[name]
    console.result(
        f"{result['tokens_per_s']:,.0f} tokens/s ({name} median {1e3 * s['median']:.1f} ms, "
        f"quartiles {1e3 * s['q1']:.1f} to {1e3 * s['q3']:.1f}, n={s['n']})"
    )
    for part, share in result.get("share_of_step", {}).items():
        console.result(f"  {part:<10} {100 * share:5.1f} %")
    for key, what in (
        ("ratio_to_bare", "a bare PyTorch loop"),
        ("ratio_to_against", " ".join(result.get("against", []))),
    ):
        if r := result.get(key):
            quartiles = f"(quartiles {r['q1']:.3f} to {r['q3']:.3f})"
            console.result(f"  step time relative to {what}, pairwise: {r['median']:.3f} {quartiles}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        console.say(f"written to {out}")
