"""`headway study run | status | report`: train every missing cell of a study, show its status, write the report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.command import COMMAND
from headway.launcher.base.errors import PREEMPTED, SpecError
from headway.launcher.hosts.device import check_device
from headway.launcher.match.bounds import bound_rows
from headway.launcher.match.measured import Measurements
from headway.launcher.match.table import matching_rows
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.study.branches import as_it_stands, changes, record_changes
from headway.launcher.study.budgets import budget_lines
from headway.launcher.study.cluster.submit import Cluster, QueuedError, refuse_in_queue, say_queued
from headway.launcher.study.cluster.submitted import cells_in_queue
from headway.launcher.study.config import Study, StudyConfig, load_study
from headway.launcher.study.jobs import Jobs, jobs_for
from headway.launcher.study.keeping import asked_later, keep_design, needs_no_training, restore_design
from headway.launcher.study.plan import Cell, StudyPlan, plan_study, study_record
from headway.launcher.study.status import Queue, coloured, left, report_record, status_record, status_rows, table
from headway.launcher.study.training import Book, train_cells

__all__ = ["StudyConfig", "report_study", "run_study", "status_study"]

RECORD = "study.json"
"""The file in the folder of a study that describes the study."""

OWN = ("cells", "logs", "tune", "tuning.json", "ladder.lock", "slurm", "outcomes.lock")
"""What the folder of a study may contain before `RECORD` is written."""


def run_study(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    fresh: bool = False,
    jobs: int | None = None,
    timing: bool = True,
    cluster: Cluster | None = None,
) -> int:
    """Train the unfinished cells, `jobs` at once (default: what this host has), then write the report.

    `overrides` (`a.b=c`) change the base of all cells. A failed cell does not stop the others. `fresh`: rename an
    existing folder of the study first. `timing`: if cells trained beside others, time the variants alone at the end.
    `cluster`: submit the cells as jobs instead; the report is then written by the last of them.
    Returns 0 if every cell is done, 1 if one failed or is damaged, 75 after a stop
    by a signal; the same command then continues. Raises SpecError if the folder contains cells of another definition.
    """
    study = load_study(Path(path))
    measurements = Measurements() if fresh else Measurements.of(study.out)
    plan = plan_study(study, overrides, measurements=measurements)
    check_method([plan], cluster, dry_run=dry_run)
    if dry_run:
        plan, notes = (plan, []) if fresh else as_it_stands(plan)
        print_design(plan, commands=True)
        for note in notes:
            console.say(f"note: {note}")
        if console.wants_json():
            console.emit(design_record(plan))
        return 0
    refuse_queued(study.out, cluster, fresh=fresh)
    print_design(plan, commands=False)
    if fresh:
        check_host([plan], jobs, cluster, fresh=True)
        move_aside(study)
    command = cluster.command if cluster else shlex.join(["headway", "study", "run", str(study.path), *plan.arguments])
    try:
        code = train_plans([plan], [measurements], command=command, jobs=jobs, timing=timing, cluster=cluster)
    except QueuedError as queued:
        return say_queued(queued)
    if code == PREEMPTED:
        console.alert(f"stopped; the same command continues: {command}", "yellow")
        if console.wants_json():
            console.emit(status_record(study))
        return code
    _say_status(study)
    report = _report(study.out)
    if console.wants_json():
        console.emit({**status_record(study), **report_record(study.out, report)})
    else:
        console.result(f"report: {report}")
    return code


def train_plans(
    plans: Sequence[StudyPlan],
    measurements: Sequence[Measurements],
    *,
    command: str,
    jobs: int | None = None,
    timing: bool = True,
    in_order: bool = False,
    cluster: Cluster | None = None,
) -> int:
    """Train the unfinished cells of all plans in one queue, `jobs` at once (default: what this host has).

    If cells of a plan trained beside others, its variants are timed alone afterwards, unless `timing` is False.
    `in_order`: all cells of a plan start before those of the next one. `cluster`: submit the cells as jobs instead.
    Records the design of each plan, its `measurements` and `command` (the command line of the user) in its folder.
    Exit status as for `run_study`. Raises SpecError before anything is started if a folder contains cells of another
    definition, or if this host has too few cores, GPUs or memory for `jobs`. With `cluster`, raises QueuedError when
    jobs train cells.
    """
    check_method(plans, cluster)
    for plan in plans:
        refuse_foreign(plan.study.out, RECORD, own=OWN, what="a study")
    found = check_host(plans, jobs, cluster)
    with ExitStack() as locks:
        for plan in plans:
            locks.enter_context(RunDir(plan.study.out).locked("study.lock"))
        for plan in plans:
            refuse_changed(plan)
        books = [Book.open(plan, partial(_record, command=command)) for plan in plans]
        for plan, measured in zip(plans, measurements, strict=True):
            keep_design(plan.study, _design(plan))
            measured.write(plan.study.out)
        if cluster is not None:
            return cluster.submit(books)
        return train_cells(books, found, cell_command, timing=timing, in_order=in_order)


def status_study(path: Path | str, overrides: Sequence[str] = ()) -> int:
    """Print one line per cell: state, tokens, validation loss, loss of the last training batch. Returns 0.

    `overrides` are accepted so that the same arguments as for `run` can be given; they do not change the folder.
    """
    study = load_study(Path(path))
    if console.wants_json():
        console.emit(status_record(study, *cells_in_queue(study.out)))
    else:
        console.result(status_text(study, *cells_in_queue(study.out)))
    return 0


def report_study(path: Path | str, overrides: Sequence[str] = ()) -> int:
    """Write the report from the current records of the cells. Returns 0. Raises SpecError if no cell was started.

    `path`: the study file, or the folder of a study, such as one that was merged. `overrides` are accepted so that the
    same arguments as for `run` can be given; they do not change the folder.
    """
    out = Path(path)
    if not (out / RECORD).is_file():
        study = load_study(out)
        out = study.out
        if not restore_design(study):
            raise SpecError(
                f"{out}: no study was started here; start it with `headway study run {study.path}`, or give the `out` "
                "folder it was run with"
            )
    report = _report(out)
    if console.wants_json():
        console.emit(report_record(out, report))
    else:
        console.result(f"report: {report}")
    return 0


def check_method(plans: Sequence[StudyPlan], cluster: Cluster | None, *, dry_run: bool = False) -> None:
    """Raise SpecError if `launch.method` of a cell does not fit the command, with or without `--slurm`.

    Without it, the command of a cell would end when it is queued, not trained. With it, also raise HeadwayError if no
    job can be submitted here, unless it is a `dry_run`.
    """
    cells = [cell for plan in plans for cell in plan.cells]
    if cluster is not None:
        cluster.check(cells, dry_run=dry_run)
        return
    for cell in cells:
        if cell.spec.launch.method == "slurm":
            raise SpecError(
                f"launch.method: slurm submits a job and does not wait for it, so a study cannot tell when {cell.key} "
                "is trained; add --slurm, which submits all cells as array jobs and goes on when they have ended, or "
                "set launch.method=torchrun and start `headway study run` within a job of your own (sbatch or salloc)"
            )


def check_host(plans: Sequence[StudyPlan], jobs: int | None, cluster: Cluster | None, *, fresh: bool = False) -> Jobs:
    """How many unfinished cells train at once on this host; one without `cluster`, which trains none here.

    Raises SpecError if this host lacks CUDA devices that an unfinished cell needs, or cores, GPUs or memory for `jobs`.
    `fresh`: no cell is finished.
    """
    if cluster is not None:
        return Jobs(count=1)
    cells = [cell for plan in plans for cell in plan.cells if fresh or not needs_no_training(cell)]
    for cell in cells:
        check_device(cell.spec)
    return jobs_for(cells, jobs)


def refuse_queued(out: Path, cluster: Cluster | None, *, fresh: bool) -> None:
    """Raise HeadwayError if jobs of the study in `out` are queued or running, and this command would disturb them."""
    if fresh:
        refuse_in_queue(out, "--fresh would move the folder they write to")
    elif cluster is None:
        refuse_in_queue(out, "without --slurm this command would train the same cells here")


def cell_command(plan: StudyPlan, cell: Cell) -> list[str]:
    """The command that trains one cell, or resumes it if it was started before."""
    return [*COMMAND, "train", str(plan.study.base), *cell.overrides]


def _record(plan: StudyPlan, *, command: str) -> None:
    """Write study.json."""
    write_json(plan.study.out / RECORD, {**_design(plan), "command": command, "written_at": now()})


def _design(plan: StudyPlan) -> dict[str, Any]:
    """The design, with the questions that were stated after the first run."""
    later = asked_later(plan.study, plan.cells)
    return {**study_record(plan), **({"asked_later": later} if later else {})}


def refuse_foreign(out: Path, record: str, *, own: Collection[str] = (), what: str) -> None:
    """Raise SpecError if the folder exists, is not empty and is not one of `what`: other folders are not written to.

    `record`: the file that identifies such a folder. `own`: entries that may exist before `record` is written.
    """
    if out.is_dir() and not (out / record).exists():
        foreign = sorted({p.name for p in out.iterdir()} - {"study.lock", *own})
        if foreign:
            raise SpecError(
                f"out: {out} is not the folder of {what} and not empty (it has {foreign[0]}); give another `out`, or "
                "move that folder away"
            )


def refuse_changed(plan: StudyPlan) -> None:
    """Raise SpecError if a run folder or a record is of a run with another spec or other data than its cell has now."""
    lines = []
    for cell in plan.cells:
        for where, differing in (("the folder", changes(cell)), ("its record", record_changes(cell))):
            shown = ", ".join(f"{key}: {old!r} in {where}, {new!r} now" for key, old, new in differing[:4])
            if differing:
                lines.append(f"  {cell.key}: {shown}{', ...' if len(differing) > 4 else ''}")
    if lines:
        raise SpecError(
            f"{plan.study.out}: {len(lines)} of {len(plan.cells)} cells were begun with another definition:\n"
            + "\n".join(lines[:10])
            + "\ngive the study another `out` folder, or run it with --fresh, which moves the old folder aside"
        )


def move_aside(study: Study) -> None:
    """Rename the folder of a study, and that of its records, which are no longer needed. Nothing is deleted."""
    if study.out.exists():
        with RunDir(study.out).locked("study.lock"):
            _rename(study.out, "the older study is")
    if study.records is not None and study.records.exists():
        _rename(study.records, "its records are")


def _rename(folder: Path, what: str) -> None:
    aside = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.rename(aside)
    console.say(f"{what} now in {aside}")


def print_design(plan: StudyPlan, *, commands: bool) -> None:
    """Print variants, seeds and matched sizes, and with `commands` the command of each cell."""
    config, say = plan.study.config, console.result if commands else console.say
    factors = [f"{len(config.variants)} variants", f"{len(config.seeds)} seeds"]
    if len(config.budgets) > 1:
        factors.append(f"{len(config.budgets)} budgets")
    say(f"study {config.study}: {' x '.join(factors)} = {len(plan.cells)} cells in {plan.study.out}")
    record = study_record(plan)
    say(table(matching_rows(record)))
    if plan.bounds is not None:
        say(table(bound_rows(plan.bounds, record["match"])))
    noted: dict[str, list[str]] = {}
    for variant in plan.variants:
        for note in variant.notes:
            noted.setdefault(note, []).append(variant.name)
    for note, names in noted.items():
        say(f"note: {', '.join(names)}: {note}")
    for line in budget_lines({v.name: (v.spec, v.budgets) for v in plan.variants}, len(config.seeds)):
        say(line)
    for cell in plan.cells if commands else ():
        say(shlex.join(cell_command(plan, cell)))


def design_record(plan: StudyPlan) -> dict[str, Any]:
    """Output of `--dry-run --json`: the design as in `study.json`, and the command of every cell."""
    return {**study_record(plan), "commands": [shlex.join(cell_command(plan, cell)) for cell in plan.cells]}


def _say_status(study: Study) -> None:
    if not console.quiet():
        console.say(status_text(study))


def status_text(study: Study, queue: Queue | None = None, note: str = "") -> str:
    """The status as a table, with notes below it."""
    text = coloured(table(status_rows(study, queue)), sys.stdout)
    text += f"\nnote: {note}" if note else ""
    if gone := left(study):
        text += f"\nnote: in the folder, but not in the study any more: {', '.join(gone)}"
    return text


def _report(out: Path) -> Path:
    from headway.launcher.report.study import report  # matplotlib: only when a report is written

    return report(out)


def now() -> str:
    """Local time with its UTC offset, for records."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
