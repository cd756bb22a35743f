"""`headway probe run | status | report`: train the same variants on several synthetic tasks, with one table of all.

Every task is a study in its own folder (`OUT/TASK`), with all features of a study: matched sizes, paired seeds,
resuming, a report. `probe.json` in `OUT` lists the tasks.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from headway.data.config import SyntheticSource
from headway.launcher.base import console
from headway.launcher.base.errors import PREEMPTED, SpecError
from headway.launcher.match.measured import Measurements
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.study.cluster.submit import Arrays, Cluster, QueuedError, say_queued, with_method
from headway.launcher.study.cluster.submitted import cells_in_queue
from headway.launcher.study.plan import StudyPlan, check_arguments, plan_study, variant_spec
from headway.launcher.study.probe_config import Probe, load_probe
from headway.launcher.study.run import (
    check_host,
    check_method,
    design_record,
    move_aside,
    now,
    print_design,
    refuse_changed,
    refuse_foreign,
    refuse_queued,
    status_text,
    train_plans,
)
from headway.launcher.study.sizes import overlap
from headway.launcher.study.status import status_record

RECORD = "probe.json"


def run_probe(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    fresh: bool = False,
    jobs: int | None = None,
    arrays: Arrays | None = None,
) -> int:
    """Train the unfinished cells of all tasks in one queue, then write the table.

    Arguments and exit status are those of `headway.launcher.study.run.run_study`: `overrides` change the base of all
    tasks; `arrays` submits the cells as array jobs. Variants are not timed, because the table is about accuracy. Raises
    SpecError before any training if the folder of a task contains cells of another definition.
    """
    probe = load_probe(Path(path))
    out = probe.whole.out
    cluster = Cluster.of(probe.whole, "probe", path, overrides, arrays)
    overrides = overrides if cluster is None else with_method(overrides)
    held = {task: Measurements() if fresh else Measurements.of(study.out) for task, study in probe.tasks.items()}
    plans = plan_probe(probe, overrides, held)
    for number, (task, plan) in enumerate(plans.items(), 1):
        console.say(f"task {number}/{len(plans)}: {task}")
        print_design(plan, commands=dry_run)
    check_method(list(plans.values()), cluster, dry_run=dry_run)
    if dry_run:
        if console.wants_json():
            console.emit({"out": str(out), "tasks": {task: design_record(plan) for task, plan in plans.items()}})
        return 0
    refuse_queued(out, cluster, fresh=fresh)
    if fresh:
        check_host(list(plans.values()), jobs, cluster, fresh=True)
        move_aside(probe.whole)
    refuse_foreign(out, RECORD, what="probe tasks")
    for plan in plans.values():
        refuse_changed(plan)
    check_host(list(plans.values()), jobs, cluster)
    command = cluster.command if cluster else shlex.join(["headway", "probe", "run", str(path), *overrides])
    try:
        with RunDir(out).locked("study.lock"):
            record = {"format": 1, "probe": probe.config.study, "path": str(path), "tasks": list(plans)}
            write_json(out / RECORD, {**record, "command": command, "written_at": now()})
            code = train_plans(
                list(plans.values()),
                list(held.values()),
                command=command,
                jobs=jobs,
                timing=False,
                cluster=cluster,
            )
    except QueuedError as queued:
        return say_queued(queued)
    if code == PREEMPTED:
        console.alert(f"stopped; the same command continues: {command}", "yellow")
        _emit(probe, out, None)
        return code
    _conclude(probe, out)
    return code


def status_probe(path: Path | str, overrides: Sequence[str] = ()) -> int:
    """Print one line for each cell of every task. Arguments and exit status as for `study.run.status_study`."""
    probe = load_probe(Path(path))
    queue, note = cells_in_queue(probe.whole.out)
    if console.wants_json():
        tasks = {task: status_record(study, queue) for task, study in probe.tasks.items()}
        console.emit({"out": str(probe.whole.out), "tasks": tasks, **({"note": note} if note else {})})
        return 0
    for task, study in probe.tasks.items():
        console.result(f"task {task}\n{status_text(study, queue)}")
    if note:
        console.result(f"note: {note}")
    return 0


def report_probe(path: Path | str, overrides: Sequence[str] = ()) -> int:
    """Write the table and the report of each task from the current records of the cells. Returns 0.

    `overrides` are accepted so that the same arguments as for `run` can be given; they do not change the folder. Raises
    SpecError if no cell was started.
    """
    probe = load_probe(Path(path))
    out = probe.whole.out
    if not (out / RECORD).exists():
        raise SpecError(
            f"{out}: no probe tasks were started here; start them with `headway probe run {path}`, or give the `out` "
            "folder they were run with"
        )
    _conclude(probe, out)
    return 0


def plan_probe(
    probe: Probe, arguments: Sequence[str] = (), measurements: dict[str, Measurements] | None = None
) -> dict[str, StudyPlan]:
    """Resolve and match the study of every task. Raises SpecError if a task reads data that is not synthetic."""
    check_arguments(probe.whole, arguments)
    for argument in arguments:
        _refuse_argument(probe, argument)
    for task, study in probe.tasks.items():
        source = variant_spec(study, arguments, study.config.baseline_name).data.source
        if not isinstance(source, SyntheticSource):
            raise SpecError(
                f"{study.place('base')}: base: task {task} would read `{source.type}` data from {study.base}, but what "
                "a model can do is known of synthetic tasks alone; use a base whose data.source.type is synthetic, or "
                f"set data.source in tasks.{task}"
            )
    held = measurements or {}
    return {task: plan_study(study, arguments, measurements=held.get(task)) for task, study in probe.tasks.items()}


def _refuse_argument(probe: Probe, argument: str) -> None:
    key = argument.partition("=")[0]
    for task, keys in probe.config.tasks.items():
        if own := next((own for own in keys if overlap(key, own)), None):
            raise SpecError(
                f"argument '{argument}': task {task} sets {own}; change it in {probe.whole.path}, or give an argument "
                "that concerns all tasks, such as optimizer.lr=1e-3"
            )


def _conclude(probe: Probe, out: Path) -> None:
    table = _report(out)
    console.result(f"table: {table}")
    _emit(probe, out, table)


def _emit(probe: Probe, out: Path, table: Path | None) -> None:
    """For --json: the path of the table, and the status of every task."""
    if console.wants_json():
        tasks = {task: status_record(study) for task, study in probe.tasks.items()}
        console.emit({"out": str(out), "table": table and str(table), "tasks": tasks})


def _report(out: Path) -> Path:
    from headway.launcher.report.probe import probe_report  # matplotlib: only when a report is written

    return probe_report(out)
