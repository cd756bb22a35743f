"""`--slurm`: submit the unfinished cells of studies as array jobs, and a last job that goes on when they have ended.

All cells that can start now form one array for each kind of job (hosts, GPUs, time, ...). The last job executes the
same command as a follow-up. It submits what could not start before (the cells of a study after its trials), and in the
end writes the report. Within such a chain of jobs, every cell is submitted once: one that failed waits for its user.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.hosts.commands import forwarded
from headway.launcher.hosts.slurm import (
    ANSWER_S,
    QueueUnknownError,
    array_script,
    follow_up_script,
    no_sbatch,
    sbatch,
)
from headway.launcher.run.run_dir import RunDir, write_text
from headway.launcher.study.cluster.elements import Element, Name, by_shape, elements_of, write_index
from headway.launcher.study.cluster.submitted import JobState, Submitted
from headway.launcher.study.config import Study
from headway.launcher.study.keeping import keep, state_of
from headway.launcher.study.plan import Cell, StudyPlan
from headway.launcher.study.queue import unfinished
from headway.launcher.study.training import Book

METHOD, FOLLOW_UP = "launch.method", "--follow-up"

ARRAY_SIZE = 1001
"""Slurm's default of MaxArraySize: the largest number of elements of an array."""


class QueuedError(Exception):
    """Jobs do the rest. Not an error of the user: it ends a command whose next step needs the results of jobs."""

    def __init__(self, lines: Sequence[str], record: dict[str, Any]) -> None:
        super().__init__("\n".join(lines))
        self.record = record


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """Options of `--slurm`. `limit`: elements of an array that run at once. `follows`: the command is a follow-up."""

    limit: int | None = None
    follows: bool = False


@dataclass(kw_only=True)
class Cluster:
    """How a command with `--slurm` trains. `out`: folder of the whole study. `words`: arguments of the command.

    `follows`: whether this command is a follow-up. `limit`: elements of an array that run at once.
    """

    out: Path
    words: tuple[str, ...]
    follows: bool = False
    limit: int | None = None
    _begun: bool = field(default=False, init=False)

    @classmethod
    def of(
        cls, study: Study, verb: str, path: Path | str, arguments: Sequence[str], arrays: Arrays | None
    ) -> Cluster | None:
        """The cluster of `headway VERB run PATH ARGUMENTS`; None without `--slurm`.

        Raises SpecError if sizes are matched by times of this machine.
        """
        if arrays is None:
            return None
        if study.config.match is not None and study.config.match.quantity == "wall_clock":
            raise SpecError(
                f"{study.place('match.quantity')}: match.quantity: wall_clock is measured where the command runs, "
                "which with --slurm is not where the cells train; use params or flops, or start the study without "
                "--slurm in a job of your own"
            )
        words = (verb, "run", str(path), *arguments, "--slurm")
        words += () if arrays.limit is None else ("--array-limit", str(arrays.limit))
        return cls(out=study.out, words=words, follows=arrays.follows, limit=arrays.limit)

    @property
    def command(self) -> str:
        """The command line of the user."""
        return shlex.join(["headway", *self.words])

    @property
    def status(self) -> str:
        """A command that shows where the cells are."""
        return shlex.join(["headway", "study", "status", self.words[2]]) if self.words[0] == "study" else "squeue --me"

    def check(self, cells: Sequence[Cell], *, dry_run: bool = False) -> None:
        """Raise SpecError or HeadwayError before anything is written if the cells cannot be submitted here."""
        for cell in cells:
            if cell.spec.launch.method != "slurm":
                raise SpecError(
                    f"launch.method: with --slurm every cell runs in a job of Slurm, and {cell.key} sets "
                    f"{cell.spec.launch.method}; leave launch.method out of its variant, or start the study without "
                    "--slurm"
                )
            if not dry_run:
                forwarded(cell.spec, os.environ)
        if not dry_run and shutil.which("sbatch") is None:
            raise no_sbatch("without --slurm, which trains on this machine")

    def submit(self, books: Sequence[Book]) -> int:
        """Submit what can start. Returns 0 if all cells are done, 1 if one failed or is damaged.

        Raises QueuedError if cells are queued or running now, and HeadwayError if Slurm rejects a job.
        """
        folder = RunDir(self.out)
        (self.out / "slurm").mkdir(parents=True, exist_ok=True)
        with folder.locked("slurm/submit.lock", wait_s=60):
            return self._submit(books)

    def _submit(self, books: Sequence[Book]) -> int:
        plans = [book.plan for book in books]
        cells = [cell for plan in plans for cell in plan.cells]
        for note in filter(None, map(keep, cells)):
            console.say(f"note: {note}")
        submitted = Submitted.of(self.out)
        states = self._states(submitted)
        inside = submitted.cells(states)
        if not self._begun and not self.follows:
            submitted.tried = set(inside)
        self._begun = True
        tasks = unfinished(plans, [book.current for book in books], in_order=True)
        closed = set(inside) | (submitted.tried if self.follows else set())
        names = {task: (str(plans[task.number].study.out), task.cell.key) for task in tasks}
        waiting = [task for task in tasks if names[task] not in closed]
        elements = elements_of(waiting, plans, elsewhere=set(inside))
        busy = {name: state for name, state in inside.items() if name in names.values()}
        if not elements and not busy:
            return self._ended(cells, [task.label for task in tasks])
        lines = _running(busy)
        arrays = [str(record["job"]) for record in submitted.alive(states, "array")]
        fresh: list[str] = []
        for shape in by_shape(elements):
            for chunk in _chunks(shape):
                job = self._array(submitted, plans[0], chunk)
                fresh.append(job)
                lines.append(f"submitted job {job}: {_count(chunk)}; log: {submitted.folder / job}_ELEMENT.log")
        last = self._follow_up(submitted, states, plans[0], [*arrays, *fresh])
        lines.append(f"job {last} goes on when they have ended; `{self.status}` shows where they are")
        raise QueuedError(lines, {"submitted": fresh, "running": sorted({s.job for s in busy.values()}), "last": last})

    def _states(self, submitted: Submitted) -> dict[str, str]:
        try:
            return submitted.states(but=os.environ.get("SLURM_JOB_ID") if self.follows else None)
        except QueueUnknownError as e:
            raise HeadwayError(
                f"{submitted.folder}: squeue cannot tell the state of the jobs submitted earlier ({e}), and a second "
                "job must not train the same cell; try again, or, if all have ended, delete jobs.json there"
            ) from e

    def _ended(self, cells: Sequence[Cell], left: Sequence[str]) -> int:
        """Exit status when no job of these cells is queued or running, and none is to be submitted."""
        if left:
            console.alert(
                f"{len(left)} cells are not done, and their jobs have ended: {', '.join(left[:6])}"
                f"{', ...' if len(left) > 6 else ''}; `{self.status}` shows why, and the command of the study tries "
                "them again"
            )
        return int(bool(left) or any(state_of(cell).state == "damaged" for cell in cells))

    def _array(self, submitted: Submitted, plan: StudyPlan, elements: Sequence[Element]) -> str:
        number = 1 + max(
            (int(m[1]) for p in submitted.folder.glob("array-*.json") if (m := _NUMBER.match(p.name))), default=0
        )
        index = submitted.folder / f"array-{number}.json"
        write_index(index, elements)
        limit = "" if self.limit is None else f"%{self.limit}"
        text = array_script(
            elements[0].launch,
            ["array-cell", str(index)],
            parts=max(len(element.parts) for element in elements),
            name=plan.study.config.study,
            log=submitted.folder.resolve() / "%A_%a.log",
            folder=Path.cwd(),
            array=f"0-{len(elements) - 1}{limit}",
        )
        path = index.with_suffix(".sbatch")
        write_text(path, text)
        job = sbatch(path)
        submitted.add_array(job, index, elements)
        return job

    def _follow_up(self, submitted: Submitted, states: dict[str, str], plan: StudyPlan, after: Sequence[str]) -> str:
        """The job that goes on after the arrays `after`: one in the queue, or a new one."""
        for record in submitted.alive(states, "follow-up"):
            if set(after) <= set(record["after"]):
                return str(record["job"])
        text = follow_up_script(
            plan.cells[0].spec.launch,
            [*self.words, FOLLOW_UP],
            after=after,
            name=f"{plan.study.config.study}-next",
            log=submitted.folder.resolve() / "next-%j.log",
            folder=Path.cwd(),
        )
        path = submitted.folder / "next.sbatch"
        write_text(path, text)
        job = sbatch(path)
        submitted.add_follow_up(job, after)
        return job


_NUMBER = re.compile(r"array-([0-9]+)\.json$")


def with_method(arguments: Sequence[str]) -> list[str]:
    """Arguments of a study with launch.method=slurm, unless they set the method."""
    named = any(argument.partition("=")[0] == METHOD for argument in arguments)
    return [*arguments] if named else [*arguments, f"{METHOD}=slurm"]


def say_queued(queued: QueuedError) -> int:
    """Print what jobs do now. Returns 0."""
    if console.wants_json():
        console.emit(queued.record)
    else:
        console.result(str(queued))
    return 0


def refuse_in_queue(out: Path, what: str) -> None:
    """Raise HeadwayError if cells of the study in `out` are queued or running. `what`: what must not be done then."""
    submitted = Submitted.of(out)
    try:
        states = submitted.states()
    except QueueUnknownError as e:
        console.alert(f"note: {submitted.folder}: jobs were submitted, and squeue cannot tell their states ({e})")
        return
    jobs = sorted({job.partition("_")[0] for job in states})
    if jobs:
        raise HeadwayError(
            f"{out}: jobs of this study are queued or running ({', '.join(jobs)}); {what}: wait for them, or end them "
            f"with `scancel {' '.join(jobs)}`"
        )


def largest_array() -> int:
    """MaxArraySize of this cluster, or Slurm's default where scontrol does not tell."""
    try:
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return ARRAY_SIZE
    found = re.search(r"^MaxArraySize\s*=\s*([0-9]+)\s*$", done.stdout, re.MULTILINE)
    return max(1, int(found[1])) if found else ARRAY_SIZE


def _chunks(elements: Sequence[Element]) -> list[Sequence[Element]]:
    size = largest_array()
    return [elements[i : i + size] for i in range(0, len(elements), size)]


def _running(busy: dict[Name, JobState]) -> list[str]:
    """One line about cells that jobs train already."""
    words = [state.word for state in busy.values()]
    counts = [f"{words.count(word)} {word}" for word in ("queued", "running") if word in words]
    jobs = sorted({state.job.partition("_")[0] for state in busy.values()})
    return [f"in the queue already: {', '.join(counts)} (job {', '.join(jobs)})"] if busy else []


def _count(elements: Sequence[Element]) -> str:
    cells = sum(len(element.parts) for element in elements)
    return f"{cells} cell{'s' if cells > 1 else ''} in {len(elements)} element{'s' if len(elements) > 1 else ''}"
