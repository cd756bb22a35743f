"""`train.micro_batch: auto`: measured on this host before any rank starts, and from then on a number like any other."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import SpecError
from headway.launcher.hosts.commands import forwarded, full_environment
from headway.launcher.plan.micro_batch.plan import by_plan, with_number
from headway.launcher.plan.micro_batch.rank import Rank
from headway.launcher.plan.micro_batch.search import Choice, Trial, ladder, search
from headway.launcher.plan.text import in_gib
from headway.launcher.run.machine import git_commit, machine, versions
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json
from headway.launcher.spec.auto import AUTO, MICRO_BATCH, alternatives
from headway.launcher.spec.layouts import listed, micro_batches, why_not
from headway.launcher.spec.spec import Spec

SECONDS = 60.0
"""No size is tried that is expected to take longer than what is left of this; the first one is tried in any case."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A choice, and what it rests on. `limit_bytes`: what a rank of this host can have of `device`'s memory."""

    spec: Spec
    choice: Choice
    device: str
    on_cpu: bool
    limit_bytes: float

    @property
    def measured(self) -> bool:
        return self.spec.parallel.model_ranks == 1

    def record(self) -> dict[str, Any]:
        """For micro_batch.json and `--out`."""
        return {
            "format": 1,
            "micro_batch": self.choice.micro_batch,
            "why": self.choice.why,
            "measured": self.measured,
            "device": self.device,
            "memory_limit_bytes": self.limit_bytes,
            "trials": [asdict(trial) for trial in self.choice.trials],
            "spec": self.spec.model_dump(mode="json"),
            "git_commit": git_commit(),
            "versions": versions(),
            "machine": machine(),
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def number_of(run: RunDir, spec: Spec) -> Spec | None:
    """`spec` with the number that the run in the folder was started with; None where no run was started there.

    Raises SpecError where the batch does not divide into passes of that number on the processes of `spec`.
    """
    train = read_mapping(run.spec).get("train", {})
    number = train.get("micro_batch")
    if not isinstance(number, int):
        return None
    settled, batch = with_number(spec, number), spec.train.global_batch
    # Another batch is another run, which is refused, in words of its own, when the folder is taken.
    if batch == train.get("global_batch") and why_not(settled) is not None:
        ranks = [n for n in range(1, batch // number + 1) if batch % (n * number) == 0]
        raise SpecError(
            f"{MICRO_BATCH}: {AUTO} is {number} for the run in {run.path}, which was started with it, and {batch} "
            f"sequences a step do not divide into {number} x {spec.data_parallel} data-parallel ranks; continue it "
            f"with {listed(ranks)} of them, or give another run_dir=... to start anew"
        )
    return settled


def check_one_host(spec: Spec, path: Path) -> None:
    """Raises SpecError for several hosts."""
    if spec.launch.hosts > 1:
        raise SpecError(
            f"{MICRO_BATCH}: {AUTO} is for a run on one host: each of the {spec.launch.hosts} hosts would measure by "
            f"itself, and find another number; {alternatives(spec, str(path))}"
        )


def settle(run: RunDir, spec: Spec) -> Spec:
    """`spec`, whose vocabulary is known, with the number of the run in the folder, or else with one that is found now.

    What was measured is printed, and kept in the folder. Raises SpecError where nothing fits.
    """
    there = number_of(run, spec)
    if there is not None:
        return there
    found = find(spec)
    console.say(table(found))
    number = required(found)
    write_json(run.micro_batch, found.record())
    return with_number(spec, number)


def find(spec: Spec) -> Found:
    """Try micro-batches on this host, in a process of its own; `spec` has its vocabulary. Progress goes to stderr."""
    with Rank(spec, full_environment(spec, forwarded(spec, os.environ))) as rank:
        if spec.parallel.model_ranks > 1:
            choice = by_plan(rank.spec, rank.limit_bytes)
        else:
            sizes = micro_batches(spec)
            tried = ", ".join(map(str, ladder(sizes)))
            console.note(f"train.micro_batch: {AUTO}: trying {tried} sequences a pass on {rank.device}")
            end = time.monotonic() + SECONDS
            with console.progress("find micro-batch", len(ladder(sizes)), "sizes") as bar:

                def told(trial: Trial) -> None:
                    _progress(trial)
                    bar.update()

                choice = search(
                    sizes,
                    rank,
                    tokens_per_sequence=spec.data.seq_len,
                    limit_bytes=rank.limit_bytes,
                    seconds_left=lambda: end - time.monotonic(),
                    say=told,
                )
        return Found(
            spec=rank.spec, choice=choice, device=rank.device, on_cpu=rank.on_cpu, limit_bytes=rank.limit_bytes
        )


def table(found: Found) -> str:
    """What was tried, and what was chosen and why."""
    rows = [("micro-batch", "tokens/s", "(quartiles)", "memory", "fits"), *map(_cells, found.choice.trials)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
    limit = f"memory: of a rank, which can have {in_gib(found.limit_bytes)} on {found.device}; "
    if not found.measured:
        limit += "computed by the plan, as one process cannot time the ranks that share a model"
    elif found.on_cpu:
        limit += "computed by the plan"
    else:
        limit += "that of the passes measured, that of optimizer states and exchanges computed by the plan"
    lines.append(limit)
    if found.measured and found.on_cpu and (ranks := found.spec.launch.processes) > 1:
        lines.append(f"tokens/s: of one rank alone; the {ranks} of a run share this host")
    number = found.choice.micro_batch
    chosen = "none fits" if number is None else str(number)
    return "\n".join([*lines, f"{MICRO_BATCH}: {AUTO} -> {chosen}: {found.choice.why}"])


def _cells(trial: Trial) -> tuple[str, str, str, str, str]:
    rate = trial.rate
    return (
        str(trial.micro_batch),
        "-" if rate is None else f"{rate.median:,.0f}",
        "-" if rate is None else f"({rate.q1:,.0f} to {rate.q3:,.0f})",
        "-" if trial.memory_bytes is None else in_gib(trial.memory_bytes),
        "yes" if trial.fits else f"no: {trial.why_not}",
    )


def required(found: Found) -> int:
    """The chosen number. Raises SpecError where nothing fits."""
    number = found.choice.micro_batch
    if number is None:
        raise SpecError(
            f"{MICRO_BATCH}: {AUTO}: not even one sequence a pass fits into the "
            f"{in_gib(found.limit_bytes)} that a rank can have on {found.device}; use parallel.recompute=block, more "
            f"ranks with parallel.zero=3, or a shorter data.seq_len; or write {MICRO_BATCH}: 1 to try it all the same"
        )
    return number


def _progress(trial: Trial) -> None:
    size, rate, quartiles, memory, fits = _cells(trial)
    console.note(f"  {size}: {rate} tokens/s {quartiles}, {memory}, fits: {fits}")
