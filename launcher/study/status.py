"""Status of a study and main results of its report: as a table, and as records for `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.compare.cell_record import record_file
from headway.launcher.compare.cells import OUTCOMES, cell_state, cells_there
from headway.launcher.run.run_dir import read_mapping
from headway.launcher.study.cluster.elements import Name
from headway.launcher.study.cluster.submitted import JobState
from headway.launcher.study.config import FULL, Study
from headway.launcher.study.plan import cell_key

HEADINGS = ("cell", "state", "tokens", "validation loss", "training-batch loss", "")
"""Both losses are the latest values in nats per token. The training loss is that of a single batch, and noisy."""


Queue = Mapping[Name, JobState]
"""Cells whose jobs are queued or running."""


def status_record(study: Study, queue: Queue | None = None, note: str = "") -> dict[str, Any]:
    """Output of `study status --json`. A loss is null while none is recorded. `note`: why `queue` may lack cells."""
    record = {
        "study": study.config.study,
        "out": str(study.out),
        "cells": list(_cells(study, queue or {})),
        "not_in_study": left(study),
    }
    return {**record, "note": note} if note else record


def status_rows(study: Study, queue: Queue | None = None) -> list[tuple[str, ...]]:
    """The status as a table, headings first."""
    return [HEADINGS, *map(_row, _cells(study, queue or {}))]


def left(study: Study) -> list[str]:
    """Cells in the folder, or with a record, that are no longer part of the study."""
    known = {cell_key(*cell) for cell in _planned(study)}
    return sorted(cells_there(study.out, study.records) - known)


def report_record(out: Path, report: Path) -> dict[str, Any]:
    """Output of `study report --json`: the path of the report, and its main numbers."""
    from headway.launcher.compare.analyse import analyse

    result = analyse(out)
    return {
        "study": result.record["study"],
        "out": str(out),
        "report": str(report),
        "pairing": result.pairing.status,
        "tokens": result.tokens,
        "baseline": result.record["baseline"],
        "variants": [
            {
                "name": v.name,
                "validation_loss": v.loss and asdict(v.loss),
                "difference": v.difference and asdict(v.difference),
                "speed_ratio": v.speed_ratio and asdict(v.speed_ratio),
            }
            for v in result.variants
        ],
    }


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Text in columns. The first column, the state and the last column are left-aligned."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        is_left = [i == 0 or rows[0][i] in ("state", "") for i in range(len(row))]
        cells = [c.ljust(w) if at_left else c.rjust(w) for c, w, at_left in zip(row, widths, is_left, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def coloured(text: str, stream: Any) -> str:
    """A status table with the rows of failed cells in red if `stream` supports colour."""
    lines = [
        console.paint(line, "red", stream) if line.split()[1:2] == ["failed"] else line for line in text.splitlines()
    ]
    return "\n".join(lines)


def _cells(study: Study, queue: Queue) -> Iterable[dict[str, Any]]:
    outcomes = read_mapping(study.out / OUTCOMES)
    for variant, seed, budget in _planned(study):
        key = cell_key(variant, seed, budget)
        record = study.records and record_file(study.records, key)
        state = cell_state(study.out / "cells" / key, outcomes.get(key), record, key=key)
        # A cell of a job that has ended a moment ago may be done while its job still is in the queue.
        job = None if state.state in ("done", "damaged") else queue.get((str(study.out), key))
        yield {
            "cell": key,
            "variant": variant,
            "seed": seed,
            "budget": budget,
            "state": state.state if job is None else job.word,
            "job": job and job.job,
            "from_record": state.record is not None,
            "tokens": state.tokens,
            "validation_loss": state.validation_loss,
            "training_batch_loss": state.loss,
            "detail": state.detail if job is None else "",
        }


def _planned(study: Study) -> Iterator[tuple[str, int, float]]:
    """(variant, seed, budget) of the cells of the study, in the order in which they are trained."""
    config = study.config
    for seed in config.seeds:
        for variant in config.variants:
            for budget in (FULL, *(b for b in config.budgets if b != FULL)):
                yield variant, seed, budget


def _row(cell: dict[str, Any]) -> tuple[str, ...]:
    losses = ["-" if x is None else f"{x:.4f}" for x in (cell["validation_loss"], cell["training_batch_loss"])]
    state = f"{cell['state']} (record)" if cell["from_record"] else cell["state"]
    detail = f"job {cell['job']}" if cell["job"] else cell["detail"]
    return (cell["cell"], state, f"{cell['tokens']:,}", *losses, detail)
