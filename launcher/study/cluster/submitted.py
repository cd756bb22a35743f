"""`OUT/slurm/jobs.json`: the jobs of a study that were submitted, and which of them are queued or running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headway.launcher.hosts.slurm import ANSWER_S, QueueUnknownError, queue_states
from headway.launcher.run.run_dir import read_mapping, write_json
from headway.launcher.study.cluster.elements import Element, Name

FOLDER, FILE = "slurm", "jobs.json"

STATUS_S = 10.0
"""Seconds that `study status` waits for squeue."""

QUEUED = frozenset(["PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "SUSPENDED"])
"""States of a job that does not run now but may later."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """Where the job of a cell is. `job`: the number of the job and of its element. `state`: a word of squeue."""

    job: str
    state: str

    @property
    def word(self) -> str:
        return "queued" if self.state in QUEUED else "running"


@dataclass(kw_only=True)
class Submitted:
    """Jobs of a study. `jobs`: one record each, with the cells of every element. `tried`: cells submitted since a user
    started the command, which later jobs of this chain do not submit again.
    """

    out: Path
    jobs: list[dict[str, Any]] = field(default_factory=list)
    tried: set[Name] = field(default_factory=set)

    @classmethod
    def of(cls, out: Path) -> Submitted:
        """Read what is recorded in the folder of a study; empty if nothing is."""
        record = read_mapping(out / FOLDER / FILE)
        tried = {(str(a), str(b)) for a, b in record.get("tried", [])}
        return cls(out=out, jobs=list(record.get("jobs", [])), tried=tried)

    def write(self) -> None:
        record = {"format": 1, "jobs": self.jobs, "tried": sorted(self.tried)}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / FILE, record)

    @property
    def folder(self) -> Path:
        return self.out / FOLDER

    def states(self, *, timeout_s: float = ANSWER_S, but: str | None = None) -> dict[str, str]:
        """Job or element -> state of those that are queued or running, without job `but`.

        Raises QueueUnknownError.
        """
        jobs = [str(record["job"]) for record in self.jobs if record["job"] != but]
        return queue_states(jobs, timeout_s=timeout_s)

    def cells(self, states: Mapping[str, str]) -> dict[Name, JobState]:
        """The cells of elements that are queued or running. `states`: as `states` returns them."""
        found: dict[Name, JobState] = {}
        for record in self.jobs:
            for number, names in enumerate(record.get("cells", [])):
                job = f"{record['job']}_{number}"
                if job in states:
                    found |= {(str(out), str(key)): JobState(job=job, state=states[job]) for out, key in names}
        return found

    def alive(self, states: Mapping[str, str], kind: str) -> list[dict[str, Any]]:
        """Records of the jobs of a kind (array, follow-up) that are queued or running."""
        numbers = {job.partition("_")[0] for job in states}
        return [record for record in self.jobs if record["kind"] == kind and str(record["job"]) in numbers]

    def add_array(self, job: str, index: Path, elements: Sequence[Element]) -> None:
        """Record a submitted array, and write the file."""
        cells = [[list(part.name) for part in element.parts] for element in elements]
        self.jobs.append({"job": job, "kind": "array", "index": index.name, "cells": cells})
        self.tried |= {part.name for element in elements for part in element.parts}
        self.write()

    def add_follow_up(self, job: str, after: Sequence[str]) -> None:
        """Record the job that goes on when the arrays `after` have ended, and write the file."""
        self.jobs.append({"job": job, "kind": "follow-up", "after": list(after)})
        self.write()


def cells_in_queue(out: Path) -> tuple[dict[Name, JobState], str]:
    """The cells of the study in `out` that are queued or running, and a note if that is not known."""
    submitted = Submitted.of(out)
    if not submitted.jobs:
        return {}, ""
    try:
        return submitted.cells(submitted.states(timeout_s=STATUS_S)), ""
    except QueueUnknownError as e:
        return {}, f"squeue cannot tell the state of the jobs of this study ({e}); the states are those of the folders"
