"""Time the training step of every variant of a study alone: all variants take turns, step by step, in one process.

A step is that of `headway train`, with loader, engine, optimizer and records. Variants take turns, so that a machine
whose speed drifts affects all of them.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.command import COMMAND
from headway.launcher.base.errors import PREEMPTED, SpecError
from headway.launcher.compare.timing import FILE, first_specs, read_timing, speed_key, untimed
from headway.launcher.hosts.commands import worker_environment
from headway.launcher.run.machine import git_commit, machine, versions
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json

WARM_UP = 2
LEAST, MOST, ENOUGH_S = 7, 41, 12.0
"""At least LEAST rounds, and at most MOST, are timed; none is begun after ENOUGH_S seconds and LEAST rounds."""

VERB = "time-study"


def needs_timing(out: Path, *, beside: bool) -> bool:
    """Whether the variants of the study in the folder `out` are yet to be timed. `beside`: cells ran beside others.

    Runs of several processes are not timed: the timing part is one process.
    """
    record = read_mapping(out / "study.json")
    specs = first_specs(record) if record else {}
    return (
        beside
        and bool(specs)
        and all((spec["launch"]["processes"], spec["launch"]["hosts"]) == (1, 1) for spec in specs.values())
        and bool(untimed(record, read_timing(out)))
    )


def timing_command(out: Path) -> list[str]:
    """The command that times the variants of the study in the folder `out`."""
    return [*COMMAND, VERB, str(out)]


def time_study(out: Path) -> int:
    """Time all variants of a study and write the result into its folder. Returns 0. Raises SpecError without study."""
    record = read_mapping(out / "study.json")
    if not record:
        raise SpecError(f"{out}: has no readable study.json; run the study, or name the folder it was run in")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # removes the temporary folder
    planned = first_specs(record)
    with tempfile.TemporaryDirectory(prefix="headway-timing-") as folder:
        steps = _measured(planned, Path(folder))
    write_json(
        out / FILE,
        {
            "format": 1,
            "variants": {
                name: {"spec": speed_key(planned[name]), "tokens_per_step": tokens, "step_s": seconds}
                for name, (tokens, seconds) in steps.items()
            },
            "machine": machine(),
            "versions": versions(),
            "git_commit": git_commit(),
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )
    return 0


def _measured(planned: Mapping[str, dict[str, Any]], folder: Path) -> dict[str, tuple[int, list[float]]]:
    """Variant -> (tokens per step, seconds of its step in each round)."""
    from headway.launcher.run.stored_spec import stored_spec
    from headway.launcher.train.allocator import keep_buffers
    from headway.launcher.train.load import load_session, open_session
    from headway.launcher.train.loop import train_step

    runs = {name: _run_of(spec, folder / str(number)) for number, (name, spec) in enumerate(planned.items())}
    first, *others = runs.items()
    os.environ.update(worker_environment(stored_spec(first[1])))
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    keep_buffers()
    quiet = contextlib.redirect_stdout(io.StringIO())  # the console lines of the steps of all variants
    with quiet, open_session(first[1]) as session, contextlib.ExitStack() as stack:
        sessions = {first[0]: session}
        for name, run in others:
            sessions[name] = load_session(run, stored_spec(run), session.layout)
            stack.callback(sessions[name].close)

        def timed(name: str) -> Callable[[], float]:
            def step() -> float:
                start = time.perf_counter()
                train_step(sessions[name])
                return time.perf_counter() - start

            return step

        seconds = in_turns({name: timed(name) for name in sessions})
        return {name: (sessions[name].spec.tokens_per_step, seconds[name]) for name in sessions}


def in_turns(
    steps: Mapping[str, Callable[[], float]], *, clock: Callable[[], float] = time.monotonic
) -> dict[str, list[float]]:
    """Name -> seconds of its step in each round, without the warm-up. `steps` return the seconds of one step.

    The order rotates from round to round, because a step finds the caches that the one before it has left.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begun, rounds = clock(), 0
    with console.progress("time variants alone", unit="rounds", tick=False) as bar:
        while rounds < WARM_UP + LEAST or (rounds < WARM_UP + MOST and clock() - begun < ENOUGH_S):
            for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
                took = steps[name]()
                if rounds >= WARM_UP:
                    seconds[name].append(took)
            rounds += 1
            bar.update()
    return seconds


def _run_of(spec: dict[str, Any], folder: Path) -> RunDir:
    """A run folder for the timing of a spec: new weights, and enough tokens for all rounds."""
    batch = spec["train"]["global_batch"] * spec["data"]["seq_len"]
    train = {**spec["train"], "tokens": max(spec["train"]["tokens"], (WARM_UP + MOST) * batch)}
    run = RunDir(folder)
    run.path.mkdir()
    write_json(run.spec, {**spec, "run_dir": str(folder), "train": train, "init": {}})
    return run
