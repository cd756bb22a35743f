"""Records of finished cells (`records` of a study): when they are written, and how a plan reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from headway.launcher.compare.cell_record import (
    CellRecord,
    NoRecordError,
    lines_of_json,
    read_record,
    write_record,
)
from headway.launcher.compare.cells import OUTCOMES, CellState, cell_state
from headway.launcher.compare.timing import FILE as TIMING
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json, write_text
from headway.launcher.study.config import Study
from headway.launcher.study.plan import Cell

STUDY = "study.json"
"""The file that describes a study, in its folder and among its records."""


def state_of(cell: Cell, outcome: dict[str, Any] | None = None) -> CellState:
    """State of a planned cell from its run folder and its record."""
    return cell_state(cell.run_dir, outcome, cell.record, key=cell.key)


def needs_no_training(cell: Kept) -> bool:
    """Whether a cell is complete or has a record. Whether either is damaged is not checked."""
    return RunDir(cell.run_dir).is_complete() or (cell.record is not None and cell.record.exists())


def stored_record(path: Path | None, key: str | None = None) -> CellRecord | None:
    """The undamaged record of a cell; None if there is none."""
    found = None if path is None else read_record(path, key)
    return found if isinstance(found, CellRecord) else None


class Kept(Protocol):
    """A cell as `keep` needs it: a planned one, or one that an index file of an array job names."""

    @property
    def key(self) -> str: ...
    @property
    def variant(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def budget(self) -> float: ...
    @property
    def run_dir(self) -> Path: ...
    @property
    def record(self) -> Path | None: ...


def conclude(out: Path, key: str, outcome: Mapping[str, Any]) -> None:
    """Record the outcome of a cell of the study in `out`. Jobs on several hosts do so at once."""
    with RunDir(out).locked("outcomes.lock", wait_s=60):
        write_json(out / OUTCOMES, {**read_mapping(out / OUTCOMES), key: outcome})


def keep(cell: Kept) -> str | None:
    """Write the record of a cell whose run folder is complete, unless it has one. Returns a note if it cannot.

    A damaged record of an undamaged folder is written anew. Raises OSError.
    """
    run = RunDir(cell.run_dir)
    if cell.record is None or not run.is_complete():
        return None
    there = stored_record(cell.record, cell.key)
    if there is not None and there.run_id == run.run_id():
        return None
    if there is not None:
        return (
            f"{cell.key}: its record {cell.record} is of another run of the same cell; the report reads the run "
            f"folder {cell.run_dir}: delete one of them"
        )
    outcome = read_mapping(cell.run_dir.parents[2] / OUTCOMES).get(cell.key) or {}
    what = {"key": cell.key, "variant": cell.variant, "seed": cell.seed, "budget": cell.budget}
    try:
        write_record(cell.run_dir, cell.record, **what, beside=int(outcome.get("beside", 0)))
    except NoRecordError as e:
        return f"{cell.key}: no record is kept: {e}"
    return None


def keep_design(study: Study, record: dict[str, Any]) -> None:
    """Write the design of a study among its records, which need it to be read alone.

    `record`: the content of its study.json. What depends on the place where the study is run is left out, so that the
    file is the same on every machine.
    """
    if study.records is None:
        return
    cells = [{**cell, "overrides": []} for cell in record["cells"]]
    design = {**record, "path": study.path.name, "base": study.config.base, "records": ".", "cells": cells}
    text, file = lines_of_json(design), study.records / STUDY
    if not file.exists() or file.read_text(encoding="utf-8", errors="replace") != text:
        study.records.mkdir(parents=True, exist_ok=True)
        write_text(file, text)


def asked_later(study: Study, cells: Sequence[Kept]) -> dict[str, int]:
    """Question (`asks`) -> finished runs of the study when it was first recorded, if there were any.

    `cells`: all of the study. The last recorded design is that of the folder, or that of the records where the study
    was not started in this folder. Without any, all questions are new: a new study may take records of another one.
    A question that was left out for a while counts as a new one.
    """
    folders = [study.out] if study.records is None else [study.out, study.records]
    earlier = next((found for folder in folders if (found := read_mapping(folder / STUDY))), {})
    known, later = earlier.get("asks") or [], earlier.get("asked_later") or {}
    new = [text for text in study.config.asks if text not in known]
    finished = sum(map(needs_no_training, cells)) if new else 0
    found = {text: later[text] for text in study.config.asks if text in known and text in later}
    return found | (dict.fromkeys(new, finished) if finished else {})


def keep_file(out: Path, records: Path | None, name: str) -> None:
    """Copy a JSON file of the folder of a study to its records."""
    if records is not None and (content := read_mapping(out / name)):
        records.mkdir(parents=True, exist_ok=True)
        write_text(records / name, lines_of_json(content))


def restore_file(out: Path, records: Path | None, name: str) -> bool:
    """Whether the folder of a study has a JSON file, after it was taken from the records if only they have it."""
    if records is not None and not (out / name).exists() and (content := read_mapping(records / name)):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / name, content)
    return (out / name).exists()


def restore_design(study: Study) -> bool:
    """Whether the folder of a study has its study.json, after it was taken from the records if only they have it."""
    if (study.out / STUDY).exists() or study.records is None:
        return (study.out / STUDY).exists()
    kept = read_mapping(study.records / STUDY)
    if kept:
        here = {"path": str(study.path), "base": str(study.base), "records": os.path.relpath(study.records, study.out)}
        study.out.mkdir(parents=True, exist_ok=True)
        restore_file(study.out, study.records, TIMING)
        write_json(study.out / STUDY, {**kept, **here})
    return bool(kept)
