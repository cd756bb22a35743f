"""The cells of a study with their records, and the token count at which their losses are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headway.launcher.compare.cell_record import record_file
from headway.launcher.compare.cells import OUTCOMES, cell_state
from headway.launcher.compare.stats import Speed
from headway.launcher.compare.step_figures import StepFigures, step_figures
from headway.launcher.run.records import RunRecord, read_run
from headway.launcher.run.run_dir import read_mapping

FULL = 1.0
"""The budget of a cell that is trained on all tokens of the spec."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One cell. `key`: such as `gqa/seed-1`, or `gqa/seed-1.budget-0.25`.

    `loss`: the validation loss at the compared token count, for finished cells. `budget`: the share of the tokens of
    the spec after which the learning rate of this cell has decayed. `steps`: figures of its training steps.
    `beside`: most other cells that trained at the same time, whose load is in its speed.
    `from_record`: whether it is read from its record, which lacks the single steps.
    """

    key: str
    variant: str
    seed: int
    budget: float
    state: str
    detail: str
    record: RunRecord
    steps: StepFigures
    from_record: bool
    planned: dict[str, Any]
    loss: float | None
    speed: Speed | None
    beside: int = 0

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def damaged(self) -> bool:
        """Whether the records are not the ones that the run wrote. No number may be computed from them."""
        return self.state == "damaged"


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The token count at which the losses of finished cells are compared.

    `tokens`: the largest at which all of them were validated; None if there is none. `final`: whether it is the end of
    all of them.
    """

    tokens: int | None
    final: bool


def read_cells(
    out: Path, planned: Sequence[dict[str, Any]], records: Path | None = None, *, own_ends: bool = False
) -> list[CellResult]:
    """Read the cells of study.json in the folder `out`. Their losses are those where all cells of a budget ended.

    `records`: folder of the records of finished cells. `own_ends`: the loss of each cell is that at its own end, as
    runs of different lengths are compared.
    """
    outcomes = read_mapping(out / OUTCOMES)
    cells = [_read_cell(out, cell, outcomes, records) for cell in planned]
    if own_ends:
        return [_with_loss(c, c.record.tokens) for c in cells]
    ends = {budget: common_end(cells, budget) for budget in {c.budget for c in cells}}
    return [_with_loss(c, ends[c.budget].tokens) for c in cells]


def common_end(cells: Iterable[CellResult], budget: float, *, own_ends: bool = False) -> Ends:
    """The token count at which the finished cells of a budget are compared. Cells without a validation do not count.

    `own_ends`: that of the longest cell, since each is compared at its own end.
    """
    if own_ends:
        lengths = [c.record.tokens for c in cells if c.done and c.budget == budget and c.loss is not None]
        return Ends(tokens=max(lengths, default=None), final=True)
    done = [c.record for c in cells if c.done and c.budget == budget and len(c.record.validation)]
    if not done:
        return Ends(tokens=None, final=False)
    validated = [{int(t) for t in r.validation.tokens if math.isfinite(t) and t > 0} for r in done]
    common = set.intersection(*validated)
    if not common:
        return Ends(tokens=None, final=False)
    tokens = max(common)
    final = all(tokens == max(own) and tokens == r.tokens for own, r in zip(validated, done, strict=True))
    return Ends(tokens=tokens, final=final)


def _read_cell(out: Path, cell: dict[str, Any], outcomes: dict[str, Any], records: Path | None) -> CellResult:
    run_dir = out / cell["run_dir"]
    key = cell.get("key") or f"{run_dir.parent.name}/{run_dir.name}"
    outcome = outcomes.get(key)
    state = cell_state(run_dir, outcome, records and record_file(records, key), key=key)
    if state.record is not None:
        record, steps = state.record.run, state.record.steps
    else:
        record = read_run(run_dir)
        steps = step_figures(record)
    return CellResult(
        key=key,
        variant=cell["variant"],
        seed=cell["seed"],
        budget=float(cell.get("budget", FULL)),
        state=state.state,
        detail=state.detail,
        record=record,
        steps=steps,
        from_record=state.record is not None,
        planned=cell["spec"],
        loss=None,
        speed=steps.speed if state.state != "damaged" else None,
        beside=state.record.beside if state.record is not None else outcome.get("beside", 0) if outcome else 0,
    )


def _with_loss(cell: CellResult, tokens: int | None) -> CellResult:
    if not cell.done:
        return cell
    loss = None if tokens is None else cell.record.validation.loss_at_tokens(tokens)
    state, detail = cell.state, cell.detail
    if loss is None or not math.isfinite(loss):
        state, detail, loss = "failed", f"trained to its end, but its validation loss is {loss}", None
    return replace(cell, loss=loss, state=state, detail=detail)
