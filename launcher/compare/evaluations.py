"""Measures of finished cells beside their loss, compared as losses are: validation sets, and evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from headway.launcher.compare.cell_results import CellResult
from headway.launcher.compare.simultaneous import Simultaneous, compare_paired, compare_unpaired
from headway.launcher.compare.stats import Estimate, estimate
from headway.launcher.run.run_dir import RunDir, read_mapping

FORMAT = 1
_FILE = "evaluation.json"
_KEPT = "evaluations"
"""Folder of evaluations among the records of cells."""


def evaluation_file(run_dir: Path) -> Path:
    """The file of a run with its measures, which `headway eval` writes."""
    return run_dir / _FILE


def kept_evaluation_file(records: Path, key: str) -> Path:
    """The copy of it beside the records of cells."""
    return records / _KEPT / f"{key}.json"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One measure over the variants of a study. `by_variant`: mean over seeds. `differences`: to the baseline;
    intervals are simultaneous for the variants, not for several measures.

    `left_out`: cells without this measure, or that were asked other questions or have another dataset of a set.
    """

    name: str
    unit: str
    better: Literal["lower", "higher"]
    chance: float | None
    questions: int
    by_variant: dict[str, Estimate]
    differences: dict[str, Simultaneous]
    left_out: tuple[str, ...]


def compared_evaluations(
    cells: Iterable[CellResult], baseline: str, records: Path | None, *, paired: bool = True
) -> list[Compared]:
    """Every measure of the finished cells of a study, by name. Cells whose questions differ from those that most cells
    were asked are left out. `paired`: whether the variants read the same data; Welch's intervals otherwise.
    """
    done = [c for c in cells if c.done]
    found: dict[str, dict[str, dict[str, Any]]] = {}  # measure -> key of a cell -> its row
    for cell in done:
        for row in _rows(cell, records):
            found.setdefault(row["name"], {})[cell.key] = row
    return [_compared(name, rows, done, baseline, paired=paired) for name, rows in sorted(found.items())]


def compared_sets(cells: Iterable[CellResult], baseline: str, tokens: int, *, paired: bool = True) -> list[Compared]:
    """The loss of each validation set at `tokens` trained tokens, by name. Cells whose dataset of a set differs from
    that of most cells are left out. `paired`: as for `compared_evaluations`.
    """
    done = [c for c in cells if c.done]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in done:
        at = np.flatnonzero(cell.record.validation.tokens == tokens)
        for name, losses in cell.record.sets.items() if at.size else ():
            if math.isfinite(loss := float(losses[at[-1]])):
                row = {"value": loss, "unit": "nats per token", "better": "lower", "chance": None, "n": 0}
                facts = (cell.record.run.get("validation_sets") or {}).get(name) or {}
                found.setdefault(name, {})[cell.key] = row | {"digest": str(facts.get("fingerprint") or "")}
    return [
        _compared(name, rows, done, baseline, paired=paired, other="has another dataset")
        for name, rows in found.items()
    ]


def _rows(cell: CellResult, records: Path | None) -> list[dict[str, Any]]:
    """The measures of a cell, if they are of the run that it is read from."""
    path = cell.record.path
    run = read_mapping(path).get("run") if cell.from_record else RunDir(path).run_id()
    files = [] if cell.from_record else [evaluation_file(path)]
    if records is not None:
        files.append(kept_evaluation_file(records, cell.key))
    for file in files:
        content = read_mapping(file)
        if content.get("format") == FORMAT and content.get("model", {}).get("run") == run:
            return [row for row in content["measures"] if isinstance(row.get("value"), int | float)]
    return []


def _compared(
    name: str,
    rows: dict[str, dict[str, Any]],
    done: list[CellResult],
    baseline: str,
    *,
    paired: bool,
    other: str = "was asked other questions",
) -> Compared:
    digests = [row["digest"] for row in rows.values()]
    asked = max(sorted(set(digests)), key=digests.count)
    values: dict[str, dict[int, float]] = {}
    left_out = []
    for cell in done:
        row = rows.get(cell.key)
        if row is None or row["digest"] != asked:
            left_out.append(f"{cell.key}: " + ("not measured" if row is None else other))
        else:
            values.setdefault(cell.variant, {})[cell.seed] = float(row["value"])
    first = next(row for row in rows.values() if row["digest"] == asked)
    return Compared(
        name=name,
        unit=first["unit"],
        better=first["better"],
        chance=first["chance"],
        questions=first["n"],
        by_variant={variant: estimate(list(by_seed.values())) for variant, by_seed in values.items()},
        differences=_differences(values, baseline, paired=paired),
        left_out=tuple(left_out),
    )


def _differences(values: dict[str, dict[int, float]], baseline: str, *, paired: bool) -> dict[str, Simultaneous]:
    if paired:
        return compare_paired(values, baseline).differences
    return compare_unpaired({v: list(by_seed.values()) for v, by_seed in values.items()}, baseline).differences
