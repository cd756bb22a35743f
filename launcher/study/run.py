"""`headway study run | status | report`: train every missing cell of a study, show its status, write the report."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.command import COMMAND
from headway.launcher.base.errors import PREEMPTED, SpecError
from headway.launcher.compare.cells import OUTCOMES, cell_state, failure
from headway.launcher.hosts.device import check_device
from headway.launcher.match.measured import Measurements
from headway.launcher.match.table import matching_rows
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json
from headway.launcher.study.branches import as_it_stands, changes, not_run, record_changes, way_of
from headway.launcher.study.budgets import budget_lines
from headway.launcher.study.cells import CellRunner, Eta, step_share
from headway.launcher.study.config import Study, StudyConfig, load_study
from headway.launcher.study.keeping import keep, keep_design, needs_no_training, restore_design, state_of
from headway.launcher.study.plan import Cell, StudyPlan, cell_key, plan_study, study_record
from headway.launcher.study.status import coloured, left, report_record, status_record, status_rows, table
from headway.launcher.study.warm import WarmRanks

__all__ = ["StudyConfig", "report_study", "run_study", "status_study"]

RECORD = "study.json"
"""The file in the folder of a study that describes the study."""


def run_study(path: Path | str, overrides: Sequence[str] = (), *, dry_run: bool = False, fresh: bool = False) -> int:
    """Train the unfinished cells, one after another, then write the report.

    `overrides` (`a.b=c`) change the base of all cells. A failed cell does not stop the others. `fresh`: rename an
    existing folder of the study first. Returns 0 if every cell is done, 1 if one failed or is damaged, 75 after a stop
    by a signal; the same command then continues. Raises SpecError if the folder contains cells of another definition.
    """
    study = load_study(Path(path))
    measurements = Measurements() if fresh else Measurements.of(study.out)
    plan = plan_study(study, overrides, measurements=measurements)
    refuse_slurm(plan)
    if dry_run:
        plan, notes = (plan, []) if fresh else as_it_stands(plan)
        print_design(plan, commands=True)
        _say_notes(notes)
        if console.wants_json():
            console.emit(design_record(plan))
        return 0
    print_design(plan, commands=False)
    if fresh:
        check_devices(plan, fresh=True)
        move_aside(study)
    command = shlex.join(["headway", "study", "run", str(study.path), *plan.arguments])
    code = train_study(plan, measurements, command=command)
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


def train_study(plan: StudyPlan, measurements: Measurements, *, command: str) -> int:
    """Train the unfinished cells, and record the design, `measurements` and `command` (the command line of the user).

    Exit status as for `run_study`. Raises SpecError if the folder contains cells of another definition.
    """
    out = plan.study.out
    refuse_slurm(plan)
    refuse_foreign(out, RECORD, own=("cells", "logs"), what="a study")
    check_devices(plan)
    with RunDir(out).locked("study.lock"):
        refuse_changed(plan)
        current, notes = as_it_stands(plan)
        _say_notes(notes)
        _record(current, command)
        keep_design(plan.study, study_record(plan))
        measurements.write(out)
        return _run_cells(plan, current, command)


def status_study(path: Path | str, overrides: Sequence[str] = ()) -> int:
    """Print one line per cell: state, tokens, validation loss, loss of the last training batch. Returns 0.

    `overrides` are accepted so that the same arguments as for `run` can be given; they do not change the folder.
    """
    study = load_study(Path(path))
    if console.wants_json():
        console.emit(status_record(study))
    else:
        console.result(_status_text(study))
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


def refuse_slurm(plan: StudyPlan) -> None:
    """Raise SpecError if a cell would be submitted to Slurm: its command ends when it is queued, not trained."""
    for cell in plan.cells:
        if cell.spec.launch.method == "slurm":
            raise SpecError(
                f"launch.method: slurm submits a job and does not wait for it, so a study cannot tell when {cell.key} "
                "is trained; set launch.method=torchrun and start `headway study run` within a job of your own "
                "(sbatch or salloc), or submit each command that `headway study run STUDY --dry-run "
                "launch.method=torchrun` prints with launch.method=slurm added"
            )


def check_devices(plan: StudyPlan, *, fresh: bool = False) -> None:
    """Raise SpecError if this host lacks the CUDA devices that an unfinished cell needs, or with `fresh` any cell."""
    for cell in plan.cells:
        if fresh or not needs_no_training(cell):
            check_device(cell.spec)


def cell_command(plan: StudyPlan, cell: Cell) -> list[str]:
    """The command that trains one cell, or resumes it if it was started before."""
    return [*COMMAND, "train", str(plan.study.base), *cell.overrides]


def _say_notes(notes: Sequence[str]) -> None:
    for note in notes:
        console.say(f"note: {note}")


def _record(plan: StudyPlan, command: str) -> None:
    """Write study.json."""
    write_json(plan.study.out / RECORD, {**study_record(plan), "command": command, "written_at": now()})


def _run_cells(plan: StudyPlan, current: StudyPlan, command: str) -> int:
    """Train the unfinished cells of a plan. `current`: the plan as study.json has it now."""
    out = plan.study.out
    cells = list(current.cells)
    states = [state_of(cell).state for cell in cells]
    todo = [i for i, state in enumerate(states) if state not in ("done", "damaged")]
    _say_notes([note for cell in cells if (note := keep(cell))])
    if len(todo) < len(cells):
        console.say(f"{len(cells) - len(todo)} of {len(cells)} cells are done already")
    # Damaged cells are not trained again, since their folders may be all that is left of them. The report names them.
    failed = states.count("damaged")
    eta = Eta([_tokens(cells[i]) - _trained(cells[i]) for i in todo])
    warm = WarmRanks([cells[i].spec for i in todo])
    with warm, CellRunner() as runner, console.progress("study", len(todo), "cells", lines=False, rate=False) as bar:
        for number, i in enumerate(todo, 1):
            way = way_of(plan.cells[i])
            if way.cell != cells[i]:
                cells[i] = way.cell
                _record(replace(plan, cells=tuple(cells)), command)
                _say_notes([f"{way.cell.key}: {way.note}"] if way.note else [])
            if way.waits:
                full = read_mapping(out / OUTCOMES).get(cell_key(way.cell.variant, way.cell.seed))
                outcome = not_run(way.cell, full or {}, _log(out, way.cell))
            else:
                outcome = _run_cell(plan, way.cell, runner, warm, eta, bar, f"{number}/{len(todo)} {way.cell.key}")
            bar.update()
            write_json(out / OUTCOMES, {**read_mapping(out / OUTCOMES), way.cell.key: outcome})
            if outcome["exit_code"] == PREEMPTED or runner.stopping:
                return PREEMPTED
            eta.end()
            _say_notes([note] if (note := keep(way.cell)) else [])
            if outcome["exit_code"] != 0:
                failed += 1
                console.alert(f"[{way.cell.key}] FAILED: {failure(outcome)}; all its output: {outcome['log']}")
    return 1 if failed else 0


def _tokens(cell: Cell) -> int:
    return cell.spec.steps * cell.spec.tokens_per_step


def _trained(cell: Cell) -> int:
    """Tokens that a cell need not train: those of an earlier start, or of the full run that it continues."""
    done = cell_state(cell.run_dir, None).tokens
    return min(_tokens(cell), max(done, cell.branch_step * cell.spec.tokens_per_step))


def _log(out: Path, cell: Cell) -> Path:
    return out / "logs" / f"{cell.key.replace('/', '.')}.log"


def _run_cell(
    plan: StudyPlan, cell: Cell, runner: CellRunner, warm: WarmRanks, eta: Eta, bar: console.Bar, label: str
) -> dict[str, Any]:
    def show(line: str) -> None:
        share = step_share(line)
        if share is not None:
            eta.step(share * _tokens(cell))
            bar.name(f"study: {cell.key}, eta {eta}")
        console.say(f"[{label} | study eta {eta}] {line}")

    eta.begin(_trained(cell), _tokens(cell))
    bar.name(f"study: {cell.key}, eta {eta}")
    log = _log(plan.study.out, cell)
    outcome = runner.run(cell_command(plan, cell), log=log, show=show, environment=warm.environment)
    if runner.stopping and outcome["exit_code"] in (-signal.SIGTERM, -signal.SIGKILL):
        outcome["exit_code"] = PREEMPTED  # this process stopped the cell before it could save: not a failure
    summary = read_mapping(cell.run_dir / "summary.json")
    if outcome["exit_code"] == 0 and summary.get("complete") is not True:
        outcome["exit_code"] = 70
        outcome["last_lines"].append("error: training ended without a complete summary.json")
    return outcome


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
    say(table(matching_rows(study_record(plan))))
    for variant in plan.variants:
        for note in variant.notes:
            say(f"note: {variant.name}: {note}")
    for line in budget_lines({v.name: (v.spec, v.budgets) for v in plan.variants}, len(config.seeds)):
        say(line)
    for cell in plan.cells if commands else ():
        say(shlex.join(cell_command(plan, cell)))


def design_record(plan: StudyPlan) -> dict[str, Any]:
    """Output of `--dry-run --json`: the design as in `study.json`, and the command of every cell."""
    return {**study_record(plan), "commands": [shlex.join(cell_command(plan, cell)) for cell in plan.cells]}


def _say_status(study: Study) -> None:
    if not console.quiet():
        console.say(_status_text(study))


def _status_text(study: Study) -> str:
    text = coloured(table(status_rows(study)), sys.stdout)
    if gone := left(study):
        text += f"\nnote: in the folder, but not in the study any more: {', '.join(gone)}"
    return text


def _report(out: Path) -> Path:
    from headway.launcher.report.study import report  # matplotlib: only when a report is written

    return report(out)


def now() -> str:
    """Local time with its UTC offset, for records."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
