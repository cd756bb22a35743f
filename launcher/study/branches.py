"""How a cell of a smaller budget starts: from a checkpoint of its full run, or, where that is gone, from its start.

Both ways give the same numbers. The way is chosen when the cell is about to be trained, because only then it is known
which checkpoints exist.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from headway.launcher.compare.cell_record import record_file
from headway.launcher.run.run_dir import SHA256, RunDir, changed, read_mapping
from headway.launcher.study.config import FULL
from headway.launcher.study.keeping import stored_record
from headway.launcher.study.plan import Cell, StudyPlan
from headway.parallel.manifest import step_of, steps_on_disk


@dataclass(frozen=True, kw_only=True)
class Way:
    """How to train a cell. `note`: why it is not trained as planned.

    `waits`: what must be trained first, and what is missing of it; empty for nothing.
    """

    cell: Cell
    note: str = ""
    waits: str = ""


def way_of(cell: Cell) -> Way:
    """The way for `cell` with the files that exist now. A cell that was begun continues as it was begun."""
    if cell.after is not None:
        return Way(cell=cell, waits=_why_no_teacher(cell))
    if cell.whole is None or cell.parent is None:
        return Way(cell=cell)
    start = start_of(
        begun=_begun(cell),
        whole_init=cell.whole.spec.init.run,
        parent=cell.parent,
        parent_record=cell.parent_record,
        branch_step=cell.branch_step,
    )
    if start != "whole":
        return Way(cell=cell, waits=no_full_run(cell.branch_step) if start == "waits" else "")
    if isinstance(_begun(cell).get("init"), dict):
        return Way(cell=cell.whole)
    note = (
        f"its full run has no checkpoint of step {cell.branch_step:,}, as it passed this step before the budget was in "
        "the study, or the checkpoint was deleted, or only the record of the run is here; the cell is trained from its "
        f"start instead ({cell.branch_step:,} more steps, the same result)"
    )
    return Way(cell=cell.whole, note=note)


def start_of(
    *, begun: Mapping[str, Any], whole_init: str | None, parent: Path, parent_record: Path | None, branch_step: int
) -> Literal["branch", "whole", "waits"]:
    """How a cell that can continue its full run starts now: from its checkpoint, from its own start, or not yet.

    `begun`: the spec with which the cell was begun. `whole_init`: init.run of the cell trained from its start.
    `parent`, `parent_record`: folder and record of the full run.
    """
    init = begun.get("init")
    if isinstance(init, dict):
        return "branch" if init.get("run") != whole_init else "whole"
    saved = [step_of(path) for path in steps_on_disk(RunDir(parent).checkpoints)]
    if branch_step in saved:
        return "branch"
    complete = RunDir(parent).is_complete() or stored_record(parent_record) is not None
    return "waits" if not complete and max(saved, default=0) < branch_step else "whole"


def no_full_run(branch_step: int) -> str:
    """Why a cell cannot continue its full run."""
    return f"its full run failed, so there is no checkpoint of step {branch_step:,} to continue"


def _why_no_teacher(cell: Cell) -> str:
    """Why the teacher of a cell cannot be converted; empty if it can, or if the cell does not need it any more."""
    own = RunDir(cell.run_dir)
    if own.is_complete() or steps_on_disk(own.checkpoints) or (own.converted / "config.json").is_file():
        return ""
    teacher = RunDir(Path(str(cell.spec.init.weights)))
    if not teacher.is_complete():
        kept = stored_record(cell.record and record_file(cell.record.parents[1], str(cell.after)))
        if kept is not None:
            return (
                f"only the record of its teacher {cell.after} is here, and not the weights in {teacher.path}; copy "
                "that folder here, or delete the record to train the teacher again"
            )
        return f"its teacher {cell.after} is not complete, so there are no weights to convert"
    if not steps_on_disk(teacher.checkpoints):
        return f"its teacher {cell.after} has no checkpoint in {teacher.checkpoints}; restore it from a copy"
    return ""


def _begun(cell: Cell) -> dict[str, Any]:
    """The spec with which a cell was begun, from its run folder or else its record; empty for a new cell."""
    record = stored_record(cell.record, cell.key)
    return read_mapping(cell.run_dir / "spec.json") or ({} if record is None else record.run.spec)


def as_it_stands(plan: StudyPlan) -> tuple[StudyPlan, list[str]]:
    """The plan with every cell as it would be trained with the files that exist now, and the notes about them."""
    ways = [way_of(cell) for cell in plan.cells]
    notes = [f"{way.cell.key}: {way.note}" for way in ways if way.note]
    return replace(plan, cells=tuple(way.cell for way in ways)), notes


def not_run(why: str, before: Mapping[str, Any], log: Path) -> dict[str, Any]:
    """Outcome record of a cell that waits in vain. `why`: `Way.waits`. `before`: the outcome of what it waits for."""
    reason = f"error: {why}; the same command tries both again"
    return {
        "exit_code": before.get("exit_code") or 1,
        "wall_s": 0.0,
        "ended_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "last_lines": [reason],
        "log": str(before.get("log") or log),
    }


def changes(cell: Cell) -> list[tuple[str, Any, Any]]:
    """(key, value in the folder, value now) where the run in the folder of `cell` has another spec or other data.

    Where a smaller budget begins is no change, because it does not change the result.
    """
    there, card = (read_mapping(cell.run_dir / name) for name in ("spec.json", "run.json"))
    return _changes(cell, there, card)


def record_changes(cell: Cell) -> list[tuple[str, Any, Any]]:
    """The same for the record of `cell`. A damaged record has no changes."""
    record = stored_record(cell.record, cell.key)
    return [] if record is None else _changes(cell, record.run.spec, record.run.run)


def _changes(cell: Cell, there: dict[str, Any], card: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    found = changed(cell.resolved(), there) if there else []
    differing = [(key, old, new) for key, new, old in found if cell.budget == FULL or key != SHA256]
    trained_on = card.get("data_fingerprint")
    if cell.data_fingerprint and trained_on and trained_on != cell.data_fingerprint:
        differing.append(("data fingerprint", trained_on, cell.data_fingerprint))
    return differing
