"""`headway study run | status | report`: train every missing cell of a study, say where it stands, write the report."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from headway.launcher.cells import OUTCOMES, PREEMPTED, CellRunner, CellState, Eta, cell_state, failure, step_share
from headway.launcher.errors import SpecError
from headway.launcher.records import read_json
from headway.launcher.run_dir import RunDir, difference, identity, write_json
from headway.launcher.study_config import Study, StudyConfig, load_study
from headway.launcher.study_plan import Cell, StudyPlan, cell_key, matching_rows, plan_study, study_record
from headway.launcher.tracking import duration

__all__ = ["StudyConfig", "report_study", "run_study", "status_study"]


def run_study(path: Path | str, overrides: Sequence[str] = (), *, dry_run: bool = False, fresh: bool = False) -> int:
    """Train the cells that are not done, one after another, then write the report.

    `overrides` (`a.b=c`) change the base of all cells. A failing cell does not stop the others. `fresh` moves an older
    folder of the study aside. Returns 0 when every cell is done, 1 when one failed, 75 when stopped by a signal: the
    same command goes on. Raises SpecError where the folder holds cells of another definition.
    """
    study = load_study(Path(path))
    plan = plan_study(study, overrides)
    record = study_record(plan)
    _print_design(plan, record)
    if dry_run:
        for cell in plan.cells:
            print(shlex.join(cell_command(plan, cell)))
        return 0
    if fresh:
        _move_aside(study.out)
    _refuse_foreign(study.out)
    with RunDir(study.out).locked("study.lock"):
        _refuse_changed(plan)
        write_json(study.out / "study.json", {**record, "command": _command(plan), "written_at": _now()})
        code = _run_cells(plan)
    if code == PREEMPTED:
        print(f"stopped; the same command continues: {_command(plan)}", flush=True)
        return code
    status_study(path)
    print(f"report: {_report(study.out)}", flush=True)
    return code


def status_study(path: Path | str, overrides: Sequence[str] = ()) -> int:
    """Print one line per cell: state, tokens, last training loss. Returns 0.

    `overrides` are accepted so that the arguments of `run` can stay on the line; they change no folder.
    """
    study = load_study(Path(path))
    outcomes = read_json(study.out / OUTCOMES)
    rows = [("cell", "state", "tokens", "loss", "")]
    for seed in study.config.seeds:
        for variant in study.config.variants:
            key = cell_key(variant, seed)
            rows.append(_status_row(key, cell_state(study.out / "cells" / key, outcomes.get(key))))
    _print_table(rows)
    _note_leftovers(study)
    return 0


def report_study(path: Path | str, overrides: Sequence[str] = ()) -> int:
    """Write the report from whatever the cells have recorded so far. Returns 0; SpecError where nothing was started.

    `overrides` are accepted so that the arguments of `run` can stay on the line; they change no folder.
    """
    study = load_study(Path(path))
    if not (study.out / "study.json").exists():
        raise SpecError(
            f"{study.out}: no study was started here; start it with `headway study run {study.path}`, or give the "
            "`out` folder it was run with"
        )
    print(f"report: {_report(study.out)}", flush=True)
    return 0


def cell_command(plan: StudyPlan, cell: Cell) -> list[str]:
    """The command that trains one cell, resuming it if it was begun."""
    # -P: the folder the user stands in must not be able to shadow a module
    return [sys.executable, "-P", "-m", "headway.launcher.cli", "train", str(plan.study.base), *cell.overrides]


def _run_cells(plan: StudyPlan) -> int:
    out = plan.study.out
    todo = [cell for cell in plan.cells if read_json(cell.run_dir / "summary.json").get("complete") is not True]
    if len(todo) < len(plan.cells):
        print(f"{len(plan.cells) - len(todo)} of {len(plan.cells)} cells are done already", flush=True)
    eta, failed = Eta(len(todo)), 0
    with CellRunner() as runner:
        for number, cell in enumerate(todo, 1):
            outcome = _run_cell(plan, cell, runner, eta, f"{number}/{len(todo)} {cell.key}")
            write_json(out / OUTCOMES, {**read_json(out / OUTCOMES), cell.key: outcome})
            if outcome["exit_code"] == PREEMPTED or runner.stopping:
                return PREEMPTED
            eta.end()
            if outcome["exit_code"] != 0:
                failed += 1
                print(f"[{cell.key}] FAILED: {failure(outcome)}; all its output: {outcome['log']}", flush=True)
    return 1 if failed else 0


def _run_cell(plan: StudyPlan, cell: Cell, runner: CellRunner, eta: Eta, label: str) -> dict[str, Any]:
    def show(line: str) -> None:
        share = step_share(line)
        if share is not None:
            eta.step(share)
        print(f"[{label} | study eta {duration(eta.seconds_left())}] {line}", flush=True)

    tokens_planned = cell.spec.steps * cell.spec.tokens_per_step
    eta.begin(min(1.0, cell_state(cell.run_dir, None).tokens / tokens_planned))
    log = plan.study.out / "logs" / f"{cell.variant}.seed-{cell.seed}.log"
    outcome = runner.run(cell_command(plan, cell), log=log, show=show)
    if runner.stopping and outcome["exit_code"] in (-signal.SIGTERM, -signal.SIGKILL):
        outcome["exit_code"] = PREEMPTED  # it was stopped by us before it could save anything: no failure of its own
    summary = read_json(cell.run_dir / "summary.json")
    if outcome["exit_code"] == 0 and summary.get("complete") is not True:
        outcome["exit_code"] = 70
        outcome["last_lines"].append("error: training ended without a complete summary.json")
    return outcome


def _refuse_foreign(out: Path) -> None:
    """Raise SpecError unless the folder is absent, empty or a study's: nothing may be written into other people's."""
    if out.is_dir() and not (out / "study.json").exists():
        foreign = sorted({p.name for p in out.iterdir()} - {"study.lock", "cells", "logs"})
        if foreign:
            raise SpecError(
                f"out: {out} is no study's folder and not empty (it has {foreign[0]}); give the study another `out`"
            )


def _refuse_changed(plan: StudyPlan) -> None:
    """Raise SpecError if a run folder holds a run of another spec or of other data than its cell has now."""
    changed = []
    for cell in plan.cells:
        there = read_json(cell.run_dir / "spec.json")
        if not there:
            continue
        differing = difference(identity(there), identity(cell.resolved()))
        trained_on = read_json(cell.run_dir / "run.json").get("data_fingerprint")
        if cell.data_fingerprint and trained_on and trained_on != cell.data_fingerprint:
            differing.append(("data fingerprint", trained_on, cell.data_fingerprint))
        shown = ", ".join(f"{key}: {old!r} in the folder, {new!r} now" for key, old, new in differing[:4])
        if differing:
            changed.append(f"  {cell.key}: {shown}{', ...' if len(differing) > 4 else ''}")
    if changed:
        raise SpecError(
            f"{plan.study.out}: {len(changed)} of {len(plan.cells)} cells were begun with another definition:\n"
            + "\n".join(changed[:10])
            + "\ngive the study another `out` folder, or run it with --fresh, which moves the old folder aside"
        )


def _move_aside(out: Path) -> None:
    if not out.exists():
        return
    with RunDir(out).locked("study.lock"):
        aside = out.with_name(f"{out.name}.old-{time.strftime('%Y%m%d-%H%M%S')}")
        out.rename(aside)
    print(f"the older study is now in {aside}", flush=True)


def _print_design(plan: StudyPlan, record: dict[str, Any]) -> None:
    config = plan.study.config
    print(
        f"study {config.study}: {len(config.variants)} variants x {len(config.seeds)} seeds = {len(plan.cells)} cells "
        f"in {plan.study.out}"
    )
    _print_table(matching_rows(record))
    for variant in plan.variants:
        for note in variant.notes:
            print(f"note: {variant.name}: {note}")
    sys.stdout.flush()


def _note_leftovers(study: Study) -> None:
    known = {cell_key(v, s) for v in study.config.variants for s in study.config.seeds}
    there = {f"{p.parent.name}/{p.name}" for p in (study.out / "cells").glob("*/seed-*")}
    if left := sorted(there - known):
        print(f"note: in the folder, but not in the study any more: {', '.join(left)}")


def _status_row(key: str, state: CellState) -> tuple[str, ...]:
    loss = "-" if state.loss is None else f"{state.loss:.4f}"
    return (key, state.state, f"{state.tokens:,}", loss, state.detail)


def _print_table(rows: Iterable[tuple[str, ...]]) -> None:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        left = [i == 0 or rows[0][i] in ("state", "") for i in range(len(row))]
        cells = [c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(row, widths, left, strict=True)]
        print("  ".join(cells).rstrip())
    sys.stdout.flush()


def _report(out: Path) -> Path:
    from headway.launcher.report import report  # matplotlib: only when a report is written

    return report(out)


def _command(plan: StudyPlan) -> str:
    return shlex.join(["headway", "study", "run", str(plan.study.path), *plan.arguments])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
