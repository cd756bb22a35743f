"""`train.micro_batch: auto`: measure on this host before any rank starts, and replace `auto` by the found number."""

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
"""Time limit of the search. A size is skipped if it is expected to exceed it; the first size is always tried."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A choice with its basis. `limit_bytes`: memory of `device` that is available to a rank of this host."""

    spec: Spec
    choice: Choice
    device: str
    on_cpu: bool
    limit_bytes: float

    @property
    def measured(self) -> bool:
        return self.spec.parallel.model_ranks == 1

    def record(self) -> dict[str, Any]:
        """Content of micro_batch.json and of the file of `--out`."""
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
    """`spec` with the micro-batch of the run in the folder; None if no run was started there.

    Raises SpecError if the global batch does not divide into that micro-batch on the processes of `spec`.
    """
    train = read_mapping(run.spec).get("train", {})
    number = train.get("micro_batch")
    if not isinstance(number, int):
        return None
    settled, batch = with_number(spec, number), spec.train.global_batch
    # A different global batch is a different run. It is refused later, when the folder is opened.
    if batch == train.get("global_batch") and why_not(settled) is not None:
        ranks = [n for n in range(1, batch // number + 1) if batch % (n * number) == 0]
        raise SpecError(
            f"{MICRO_BATCH}: {AUTO} is {number} for the run in {run.path}, because it was started with that number, "
            f"and {batch} sequences per step do not divide into {number} x {spec.data_parallel} data parallel ranks; "
            f"continue with {listed(ranks)} data parallel ranks, or use another run_dir=... to start a new run"
        )
    return settled


def check_one_host(spec: Spec, path: Path) -> None:
    """Raises SpecError for several hosts."""
    if spec.launch.hosts > 1:
        raise SpecError(
            f"{MICRO_BATCH}: {AUTO} requires a run on one host, because each of the {spec.launch.hosts} hosts could "
            f"measure a different number; {alternatives(spec, str(path))}"
        )


def settle(run: RunDir, spec: Spec) -> Spec:
    """`spec` with the micro-batch of the run in the folder, or else with one that is found now.

    The vocabulary size of `spec` must be set. New measurements are printed and stored in the folder. Raises SpecError
    if nothing fits.
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
    """Try micro-batches on this host in a child process. The vocabulary size of `spec` must be set.

    Progress goes to stderr.
    """
    with Rank(spec, full_environment(spec, forwarded(spec, os.environ))) as rank:
        if spec.parallel.model_ranks > 1:
            choice = by_plan(rank.spec, rank.limit_bytes)
        else:
            sizes = micro_batches(spec)
            tried = ", ".join(map(str, ladder(sizes)))
            console.note(f"train.micro_batch: {AUTO}: trying {tried} sequences per pass on {rank.device}")
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
    """The trials as a table, the choice, and its reason."""
    rows = [("micro-batch", "tokens/s", "(quartiles)", "memory", "fits"), *map(_cells, found.choice.trials)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
    limit = f"memory: per rank, of {in_gib(found.limit_bytes)} available on {found.device}; "
    if not found.measured:
        limit += "computed by the plan, because one process cannot time ranks that share a model"
    elif found.on_cpu:
        limit += "computed by the plan"
    else:
        limit += "measured for the passes, computed by the plan for optimizer states and exchanges"
    lines.append(limit)
    if found.measured and found.on_cpu and (ranks := found.spec.launch.processes) > 1:
        lines.append(f"tokens/s: of one rank alone; in a run, {ranks} ranks share this host")
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
    """The chosen number. Raises SpecError if nothing fits."""
    number = found.choice.micro_batch
    if number is None:
        raise SpecError(
            f"{MICRO_BATCH}: {AUTO}: even one sequence per pass does not fit into the {in_gib(found.limit_bytes)} "
            f"available to a rank on {found.device}; use parallel.recompute=block, more ranks with parallel.zero=3, or "
            f"a shorter data.seq_len; or write {MICRO_BATCH}: 1 to try it anyway"
        )
    return number


def _progress(trial: Trial) -> None:
    size, rate, quartiles, memory, fits = _cells(trial)
    console.note(f"  {size}: {rate} tokens/s {quartiles}, {memory}, fits: {fits}")
