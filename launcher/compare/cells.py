"""What state each cell of a study is in, read from its run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headway.launcher.run.records import last_progress, read_json
from headway.launcher.run.state import PREEMPTED, held_by_live_process

__all__ = ["OUTCOMES", "PREEMPTED", "CellState", "cell_state", "failure"]

State = Literal["done", "running", "partial", "failed", "missing"]

OUTCOMES = "outcomes.json"
"""File in the study's folder: cell key -> exit code, last lines and times of its latest attempt."""


@dataclass(frozen=True, kw_only=True)
class CellState:
    """`tokens` done, `loss` the last training loss (nats per token), `detail` why a cell failed."""

    state: State
    tokens: int = 0
    loss: float | None = None
    detail: str = ""


def cell_state(run_dir: Path, outcome: dict[str, Any] | None) -> CellState:
    """State of a cell from its run folder and the outcome of its latest attempt."""
    tokens, loss = last_progress(run_dir)
    if read_json(run_dir / "summary.json").get("complete") is True:
        return CellState(state="done", tokens=tokens, loss=loss)
    if held_by_live_process(run_dir):
        return CellState(state="running", tokens=tokens, loss=loss)
    if outcome and outcome.get("exit_code") not in (0, PREEMPTED):
        return CellState(state="failed", tokens=tokens, loss=loss, detail=failure(outcome))
    return CellState(state="partial" if tokens else "missing", tokens=tokens, loss=loss)


def failure(outcome: dict[str, Any]) -> str:
    """One line: exit code or signal, and the line that best says why."""
    code, lines = outcome.get("exit_code"), [str(line).strip() for line in outcome.get("last_lines", [])]
    told = [line for line in lines if "error" in line.lower()] or [line for line in lines if line]
    how = f"signal {-code}" if isinstance(code, int) and code < 0 else f"exit code {code}"
    return f"{how}: {told[-1][:300]}" if told else how
