"""State of each cell of a study, read from its run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headway.launcher.base.errors import PREEMPTED
from headway.launcher.compare.cell_record import CellRecord, DamagedRecord, read_record
from headway.launcher.run.record_check import check_records
from headway.launcher.run.records import last_progress, last_validation
from headway.launcher.run.run_dir import read_mapping
from headway.launcher.run.state import held_by_live_process

State = Literal["done", "running", "partial", "failed", "damaged", "missing"]

OUTCOMES = "outcomes.json"
"""File in the folder of a study: cell key -> exit code, last lines and times of its latest attempt."""


MEND = "restore its folder from a copy, or delete it and run the study again"
"""Next step for the user of a damaged cell."""

MEND_RECORD = "restore it from git or another copy, or delete it and run the study again"
"""The same for a damaged record."""


@dataclass(frozen=True, kw_only=True)
class CellState:
    """State of a cell. `tokens`: trained tokens. `detail`: the reason of a failure or damage, or a note on the records
    of a finished cell. Losses are in nats per token; that of a damaged cell is not known.

    `loss`: that of the last training batch. `validation_loss`: that of the last validation. `record`: the record by
    which the cell is done without a finished run folder; None for a cell that is what its folder is.
    """

    state: State
    tokens: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    detail: str = ""
    record: CellRecord | None = None


def cell_state(
    run_dir: Path, outcome: dict[str, Any] | None, record: Path | None = None, *, key: str | None = None
) -> CellState:
    """State of a cell from its run folder, the outcome of its latest attempt, and its record, if it may have one.

    A finished and undamaged folder counts; otherwise the record, if there is one. `key`: name of the cell.
    """
    found = _folder_state(run_dir, outcome)
    if record is None or found.state == "done":
        return found
    stored = read_record(record, key)
    if isinstance(stored, DamagedRecord):
        return CellState(state="damaged", detail=f"its record {record} {stored.why}; {MEND_RECORD}")
    if stored is None:
        return found
    final = stored.run.summary.get("final_validation_loss")
    return CellState(
        state="done",
        tokens=stored.run.tokens,
        loss=stored.steps.last_loss,
        validation_loss=float(final) if isinstance(final, int | float) else None,
        detail=stored.note,
        record=stored,
    )


def _folder_state(run_dir: Path, outcome: dict[str, Any] | None) -> CellState:
    tokens, loss = last_progress(run_dir)
    state, detail = _state(run_dir, outcome, tokens)
    loss = None if state == "damaged" else loss
    return CellState(
        state=state, tokens=tokens, loss=loss, validation_loss=_validation_loss(run_dir, state), detail=detail
    )


def _state(run_dir: Path, outcome: dict[str, Any] | None, tokens: int) -> tuple[State, str]:
    if read_mapping(run_dir / "summary.json").get("complete") is True:
        check = check_records(run_dir)
        if check.damage:
            return "damaged", f"{check.damage}; {MEND}"
        return "done", check.note
    if held_by_live_process(run_dir):
        return "running", ""
    if outcome and outcome.get("exit_code") not in (0, PREEMPTED):
        return "failed", failure(outcome)
    return ("partial" if tokens else "missing"), ""


def _validation_loss(run_dir: Path, state: State) -> float | None:
    """Validation loss: the value in the summary of a finished run, else the last recorded value."""
    if state == "damaged":
        return None
    stated = read_mapping(run_dir / "summary.json").get("final_validation_loss") if state == "done" else None
    return float(stated) if isinstance(stated, int | float) else last_validation(run_dir)


def records_of(out: Path, study: dict[str, Any]) -> Path | None:
    """The folder of records that the study.json in `out` names; None if it names none."""
    named = study.get("records")
    return out / named if isinstance(named, str) else None


def cells_there(out: Path, records: Path | None) -> set[str]:
    """Keys of all cells that have a run folder in the folder of a study, or a record."""
    found = {f"{p.parent.name}/{p.name}" for p in (out / "cells").glob("*/seed-*")}
    files = () if records is None else records.glob("*/seed-*.json")
    return found | {f"{p.parent.name}/{p.name.removesuffix('.json')}" for p in files}


def failure(outcome: dict[str, Any]) -> str:
    """One line: exit code or signal, and the output line that best explains the failure."""
    code, lines = outcome.get("exit_code"), [str(line).strip() for line in outcome.get("last_lines", [])]
    told = [line for line in lines if "error" in line.lower()] or [line for line in lines if line]
    how = f"signal {-code}" if isinstance(code, int) and code < 0 else f"exit code {code}"
    return f"{how}: {told[-1][:300]}" if told else how
