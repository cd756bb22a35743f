"""`headway bench peers`: train the same model with Headway and with other libraries, in turns, and compare.

Each size and precision is measured in a child process of its own, in which all engines take turns, step by step, so
that other work on the machine affects all of them. The memory of each engine is that of a further child process that
trains with this engine alone.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.command import die_with_parent
from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.base.spread import spread
from headway.launcher.bench.peers.models import HEADWAY, INSTALL, PEERS, llama_of, why_missing
from headway.launcher.plan.precision import FASTER, bf16_instructions, bf16_ratio
from headway.launcher.run.machine import git_commit, machine, versions
from headway.launcher.run.resolve import resolve
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.spec.encoder_decoder import decoders_only
from headway.launcher.spec.load import load_spec
from headway.launcher.spec.spec import Spec

AS_GIVEN = "spec"
SIZES: dict[str, list[str]] = {
    "1.2M": ["model.width=128", "model.layers=4", "model.ffn_width=352", "attention.head_dim=16"],
    "11M": ["model.width=256", "model.layers=14", "model.ffn_width=704", "attention.head_dim=32"],
    "47M": ["model.width=512", "model.layers=16", "model.ffn_width=1408", "attention.head_dim=64"],
    AS_GIVEN: [],
}
"""Size -> overrides; parameters with 8 query heads, 2 KV heads and a tied vocabulary of 4,096 tokens."""

SAME = (
    *("launch.threads=1", "launch.processes=1", "launch.device=cpu"),
    *("data.document_mask=false", "model.dropout=0", "model.branch_start=as_drawn"),
)
"""Overrides under which all engines train the same model. The others know no documents and no such start."""

ALONE_ROUNDS = 3
"""Counted steps of an engine alone: its memory is largest from the second step on."""

AUTO = "auto"

NEEDS = ("peak_bytes", "peak_bytes_before_steps", "page_faults_per_round", "system_s_per_round")
"""What is recorded of a process with one engine."""


def bench_peers(
    path: Path,
    overrides: Sequence[str],
    *,
    sizes: Sequence[str],
    peers: Sequence[str],
    precision: str,
    rounds: int,
    out: Path | None,
) -> int:
    """Compare Headway with `peers` at `sizes`, on one thread of the CPU.

    precision: fp32, bf16, or auto: fp32, and bf16 too where the CPU is faster in it.

    A peer that is not installed is named and left out. Raises SpecError if none is left, or if the model of the spec is
    no plain Llama; HeadwayError if a measurement fails.
    """
    for option, given, known in (("--sizes", sizes, tuple(SIZES)), ("--peers", peers, PEERS)):
        if wrong := [word for word in given if word not in known] or [w for w in given if given.count(w) > 1]:
            raise SpecError(f"{option}: {wrong[0]} is unknown or named twice; use some of {', '.join(known)}")
    precisions, choice = _precisions(precision)
    specs = {
        (size, kind): _prepared(path, [*SIZES[size], *overrides, *SAME, f"parallel.precision={kind}"], rounds)
        for size in sizes
        for kind in precisions
    }
    missing = {name: why for name in peers if (why := why_missing(name)) is not None}
    for name, why in missing.items():
        console.warn(f"{name} is left out: {why}")
    engines = [HEADWAY, *(name for name in peers if name not in missing)]
    if len(engines) == 1:
        raise SpecError(f"--peers: none of {', '.join(peers)} can be measured; install one of them, or use bare")
    words = ["--sizes", ",".join(sizes), "--peers", ",".join(peers), "--precision", precision]
    result: dict[str, Any] = {
        "kind": "peers",
        "command": shlex.join(["headway", "bench", "peers", str(path), *overrides, *words, "--rounds", str(rounds)]),
        "threads": 1,
        "precision": choice,
        "left_out": missing,
        "load_average_at_start": os.getloadavg(),
        "git_commit": git_commit(),
        "versions": versions() | {name: metadata.version(name) for name in engines if name in INSTALL},
        "machine": machine(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": [],
    }
    with console.progress("measure engines", len(specs) * (1 + len(engines)), "processes", tick=False) as bar:
        for (size, kind), spec in specs.items():
            measure = partial(_in_child, spec, update=bar.update)
            together = measure(engines, rounds=rounds, keep_buffers=True)
            # Only Headway changes the settings of the C library's allocator when it trains.
            alone = {e: measure([e], rounds=ALONE_ROUNDS, keep_buffers=e == HEADWAY) for e in engines}
            result["rows"].append(row_of(size, kind, spec, together, alone))
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                write_json(out, result)
    console.result("\n\n".join(table(row) for row in result["rows"]))
    if out is not None:
        console.say(f"written to {out}")
    return 0


def _precisions(wanted: str) -> tuple[list[str], dict[str, Any]]:
    """(precisions to measure, the reason for them)."""
    if wanted != AUTO:
        return [wanted], {"wanted": wanted}
    names = bf16_instructions()
    ratio = bf16_ratio() if names else None
    fast = ratio is not None and ratio >= FASTER
    return ["fp32", *(["bf16"] if fast else [])], {"wanted": AUTO, "instructions": names, "bf16_ratio": ratio}


def _prepared(path: Path, overrides: Sequence[str], rounds: int) -> Spec:
    """The resolved spec, with tokens for all rounds and random initial weights."""
    from headway.launcher.bench.peers.child import WARM_UP

    spec, _ = resolve(load_spec(path, overrides).spec)
    decoders_only(spec, "headway bench peers")
    tokens = max(spec.train.tokens, (WARM_UP + max(rounds, ALONE_ROUNDS)) * spec.tokens_per_step)
    spec = spec.model_copy(
        update={
            "train": spec.train.model_copy(update={"tokens": tokens}),
            "init": spec.init.without_run().model_copy(update={"weights": None, "sha256": None}),
        }
    )
    llama_of(spec)
    return spec


def _in_child(spec: Spec, engines: Sequence[str], *, rounds: int, keep_buffers: bool, update: Any) -> dict[str, Any]:
    """What `headway.launcher.bench.peers.child` measures. `update` is called at the end."""
    with tempfile.TemporaryDirectory(prefix="headway-peers-") as name:
        folder = Path(name)
        write_json(RunDir(folder).spec, spec.model_dump(mode="json"))
        write_json(folder / "job.json", {"engines": list(engines), "rounds": rounds, "keep_buffers": keep_buffers})
        done = subprocess.run(
            [sys.executable, "-P", "-m", "headway.launcher.bench.peers.child", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=die_with_parent,
        )
        if done.returncode or not (folder / "result.json").exists():
            raise HeadwayError(
                f"the process that measures {', '.join(engines)} ended with {done.returncode}:\n"
                f"{done.stderr[-2000:]}\nLeave an engine out with --peers, or choose smaller --sizes"
            )
        found = json.loads((folder / "result.json").read_text())
    update()
    return found


def row_of(
    size: str, precision: str, spec: Spec, together: Mapping[str, Any], alone: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The comparison of all engines at one size. together: result of the process of all; alone: of one each."""
    ours, tokens = together["step_s"][HEADWAY], spec.tokens_per_step
    engines: dict[str, Any] = {}
    for name, seconds in together["step_s"].items():
        ratios = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
        losses = zip(together["losses"][name], together["losses"][HEADWAY], strict=True)
        engines[name] = {
            "parameters": together["parameters"][name],
            "tokens_per_s": spread([tokens / s for s in seconds]),
            "step_s": spread(seconds),
            "over_headway": spread(ratios),
            "largest_relative_difference_of_losses": max(abs(a - b) / abs(b) for a, b in losses),
            "alone": {key: alone[name][key] for key in NEEDS} | {"step_s": spread(alone[name]["step_s"][name])},
            "raw_step_s": seconds,
            "losses": together["losses"][name],
        }
    counts = {engine["parameters"] for engine in engines.values()}
    return {
        "size": size,
        "precision": precision,
        "tokens_per_step": tokens,
        "equal_parameters": len(counts) == 1,
        "engines": engines,
        "spec": spec.model_dump(mode="json"),
    }


def table(row: Mapping[str, Any]) -> str:
    """The row as text, one engine a line."""
    engines = row["engines"]
    ours = engines[HEADWAY]
    rounds = ours["step_s"]["n"]
    lines = [
        f"{ours['parameters'] / 1e6:.1f}M parameters ({row['size']}), {row['precision']}, "
        f"{row['tokens_per_step']:,} tokens a step, {rounds} rounds, medians (quartiles)",
        f"  {'engine':<14}{'tokens/s':>24}{'its time / Headway':>28}{'peak memory alone':>20}",
    ]
    for name, engine in engines.items():
        speed, ratio = engine["tokens_per_s"], engine["over_headway"]
        rate = f"{speed['median']:,.0f} ({speed['q1']:,.0f} to {speed['q3']:,.0f})"
        times = "" if name == HEADWAY else f"{ratio['median']:.3f} ({ratio['q1']:.3f} to {ratio['q3']:.3f})"
        lines.append(f"  {name:<14}{rate:>24}{times:>28}{engine['alone']['peak_bytes'] / 1e6:>17,.0f} MB")
    if not row["equal_parameters"]:
        counts = ", ".join(f"{name} {engine['parameters']:,}" for name, engine in engines.items())
        lines.append(f"  the numbers of parameters differ: {counts}")
    largest = max(engine["largest_relative_difference_of_losses"] for engine in engines.values())
    lines.append(f"  losses of all engines agree within {largest:.1e} of their value, over {len(ours['losses'])} steps")
    return "\n".join(lines)
