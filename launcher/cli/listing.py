"""`headway ls`: runs and studies with progress and disk usage. Reads only the end of each record file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from headway.launcher.base import console
from headway.launcher.base.errors import PREEMPTED, NoInputError
from headway.launcher.base.text import age, disk_size
from headway.launcher.run.disk import bytes_below
from headway.launcher.run.folders import Kind, cells_of, kind_of, tasks_of
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.launcher.run.state import State, held_by_live_process, run_state

DEFAULT = ("runs", "studies")
LOCKS = ("study.lock", "ladder.lock")
"""Locks of studies and probe tasks, and of what has sizes or trials of its own."""
_DEEPEST = 4  # maximum number of folders between a named folder and a run


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run, study or set of probe tasks. Runs have `step` of `steps`; the others have `cells_done` of `cells`.

    `validation_loss`: the latest validation loss (nats per token), recorded at `validation_step`; never a loss of a
    training batch. `age_s`: seconds since the last record was written.
    """

    name: str
    kind: Kind
    state: State
    step: int | None = None
    steps: int | None = None
    cells_done: int | None = None
    cells: int | None = None
    tokens: int
    validation_loss: float | None = None
    validation_step: int | None = None
    bytes: int
    age_s: float | None


def list_places(folders: Sequence[Path], *, as_json: bool) -> int:
    """Print a row for each run and study in `folders`, and after a study in `folders` a row for each run. Returns 0.

    Default: `runs` and `studies`, or the working directory if neither exists. Raises NoInputError for a folder that
    does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise NoInputError(f"{folder}: no such folder (looked for {folder.absolute()}); name one with runs in it")
    folders = folders or [Path(name) for name in DEFAULT if Path(name).is_dir()] or [Path()]
    rows = [
        row for path in dict.fromkeys(path for folder in folders for path in places(folder)) for row in [_row(path)]
    ]
    if as_json:
        console.emit([asdict(row) for row in rows])
    elif rows:
        console.result(_text(rows))
    else:
        console.result(f"no runs or studies in {', '.join(map(str, folders))}; `headway train SPEC` makes a run")
    return 0


def places(folder: Path) -> Iterator[Path]:
    """Runs, studies and probe tasks in a folder, recursively. Enters a study only if it is `folder` itself."""
    match kind_of(folder):
        case "run":
            yield folder
        case "study":
            yield from [folder, *(cell for cell in cells_of(folder) if kind_of(cell) == "run")]
        case "probe" | "ladder":
            yield from [folder, *(task for task in tasks_of(folder) if kind_of(task) == "study")]
        case None:
            yield from _below(folder, _DEEPEST)


def _below(folder: Path, deepest: int) -> Iterator[Path]:
    try:
        children = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and not p.is_symlink())
    except OSError:
        return
    for child in children:
        if child.is_dir():
            if kind_of(child) is not None:
                yield child
            elif deepest > 1:
                yield from _below(child, deepest - 1)


def _row(path: Path) -> Row:
    kind = kind_of(path)
    if kind == "run":
        found = run_state(RunDir(path))
        return Row(name=str(path), kind=kind, bytes=bytes_below(path), age_s=_age_s([path]), **asdict(found))
    studies = [path] if kind == "study" else tasks_of(path)
    cells = [cell for study in studies for cell in _cells(study)]
    states = [state for _, state, _ in cells]
    running = any(held_by_live_process(path, lock) for lock in LOCKS) or "running" in states
    done = states.count("done")
    state: State = "damaged" if "damaged" in states else "failed" if "failed" in states else "partial"
    return Row(
        name=str(path),
        kind=kind or "study",
        state="running" if running else "done" if cells and done == len(cells) else state,
        cells_done=done,
        cells=len(cells),
        tokens=sum(tokens for *_, tokens in cells),
        bytes=bytes_below(path),
        age_s=_age_s([path, *(cell for cell, *_ in cells)]),
    )


def _cells(study: Path) -> Iterator[tuple[Path, State, int]]:
    """(folder, state, tokens) of every planned cell. A cell that was not started counts as partial."""
    outcomes = read_mapping(study / "outcomes.json")
    records = read_mapping(study / "study.json").get("records")
    for cell in cells_of(study):
        found = run_state(RunDir(cell))
        if isinstance(records, str) and found.state != "done":
            from headway.launcher.compare.cell_record import CellRecord, read_record, record_file

            key = f"{cell.parent.name}/{cell.name}"
            stored = read_record(record_file(study / records, key), key)
            if stored is not None:
                whole = isinstance(stored, CellRecord)
                yield cell, "done" if whole else "damaged", stored.run.tokens if whole else 0
                continue
        outcome = (
            outcomes.get(cell.relative_to(study / "cells").as_posix()) if cell.is_relative_to(study / "cells") else None
        )
        ended_badly = isinstance(outcome, dict) and outcome.get("exit_code") not in (0, PREEMPTED)
        yield cell, "failed" if found.state == "partial" and ended_badly else found.state, found.tokens


def _age_s(folders: Sequence[Path]) -> float | None:
    names = ("metrics.jsonl", "summary.json", "spec.json", "study.json", "outcomes.json", "probe.json")
    times = []
    for file in (folder / name for folder in folders for name in names):
        try:
            times.append(file.stat().st_mtime)
        except OSError:
            continue
    return max(0.0, time.time() - max(times)) if times else None


def _text(rows: Sequence[Row]) -> str:
    table = [("name", "kind", "state", "step", "tokens", "validation loss", "size", "age")]
    for row in rows:
        done = f"{row.step:,}/{'?' if row.steps is None else f'{row.steps:,}'}" if row.kind == "run" else None
        table.append(
            (
                row.name,
                row.kind,
                row.state,
                done or f"{row.cells_done}/{row.cells} runs",
                f"{row.tokens:,}",
                "-" if row.validation_loss is None else f"{row.validation_loss:.4f}",
                disk_size(row.bytes),
                "-" if row.age_s is None else age(row.age_s),
            )
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = []
    for line in table:
        cells = [
            text.ljust(width) if i < 3 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
