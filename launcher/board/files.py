"""TensorBoard's event files of a run: order them by attempt, and rebuild them from metrics.jsonl."""

from __future__ import annotations

import calendar
import re
import shutil
import time
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headway.launcher.base.errors import NoInputError
from headway.launcher.board.event_file import EventFile
from headway.launcher.board.events import DRAW
from headway.launcher.run.columns.table import Table, gaps_between
from headway.launcher.run.lines import Damage, Lost
from headway.launcher.run.records import kinds_and_steps
from headway.launcher.run.run_dir import RunDir, read_mapping, sync

EVENTS = "events.out.tfevents."
_ORDERED = re.compile(re.escape(EVENTS) + r"0000000000-(\d{6})\.")
_REBUILT = f"{EVENTS}9999999999.rebuilt"  # sorts after all other files, so it hides their points while they exist


def put_in_order(folder: Path) -> None:
    """Rename event files of earlier attempts so that they sort before the next one, even after a clock change.

    Names of event files begin with the time, and TensorBoard reads files in the order of their names.
    """
    found = {path: _ORDERED.match(path.name) for path in folder.glob(f"{EVENTS}*")}
    following = 1 + max((int(match[1]) for match in found.values() if match), default=-1)
    latest = sorted(path for path, match in found.items() if not match)
    for number, path in enumerate(latest, start=following):
        # "-" sorts before every digit, so these names sort before a name with any time.
        path.rename(path.with_name(f"{EVENTS}0000000000-{number:06d}.{path.name.removeprefix(EVENTS)}"))


def rebuild(run: RunDir) -> Lost:
    """Rebuild the event files from metrics.jsonl, atomically: a reader sees either the old or the new files.

    Records contain no wall-clock time, so the time of a point is the first start of the run plus the seconds of
    training. Returns the damage and gaps of metrics.jsonl. Raises NoInputError if there are no records, and SpecError
    while the run is being trained.
    """
    if next(run.read_metrics(), None) is None:
        raise NoInputError(f"{run.metrics}: there is no record to show; name the folder of a run that has started")
    with run.locked(), run.locked("worker.lock"):
        temporary = run.path / ".tensorboard.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        lost = _draw(run, temporary)
        (written,) = temporary.iterdir()
        sync(written)
        run.tensorboard.mkdir(exist_ok=True)
        written.replace(run.tensorboard / _REBUILT)
        sync(run.tensorboard)
        temporary.rmdir()
        for path in run.tensorboard.glob(f"{EVENTS}*"):
            if path.name != _REBUILT:
                path.unlink()
    return lost


def _draw(run: RunDir, folder: Path) -> Lost:
    """Write one event file into a new folder. Returns the damage found in metrics.jsonl."""
    damage, strange, wall_s = Damage(), 0, _started_s(run)
    steps, start_s = array("q"), wall_s
    folder.mkdir()
    with (folder / _REBUILT).open("wb") as file:
        board = EventFile(file, wall_s)
        for kind, record in _last_of_each_step(run, damage):
            trained_s = record.get("train_s")
            if isinstance(trained_s, int | float) and start_s + trained_s > wall_s:
                wall_s = start_s + trained_s
            try:
                DRAW[kind](board, record, wall_s)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                board.drop_record()
                strange += 1  # a line without a checksum that does not have Headway's format
                continue
            board.end_record()
            if kind == "train":
                steps.append(record["step"])
        board.close()
    found = np.unique(np.array(steps, dtype=np.int64))
    lost = Lost.of(damage, gaps_between(found[found > 0]))
    return replace(lost, lines=lost.lines + strange)


def _last_of_each_step(run: RunDir, damage: Damage) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records to write, with their kind; the later one if a step occurs twice. Reads the file twice."""
    tables = {kind: Table(("place",)) for kind in DRAW}
    count = 0
    for count, (kind, step) in enumerate(kinds_and_steps(run), 1):
        if isinstance(kind, str) and kind in tables and type(step) is int and 0 <= step < 1 << 40:
            tables[kind].add(step, [count - 1])
    wanted = np.zeros(count, dtype=bool)
    for table in tables.values():
        wanted[table.column("place", table.kept()).astype(np.int64)] = True
    for place, record in enumerate(run.read_metrics(damage)):
        if place < count and wanted[place]:
            yield record["kind"], record


def _started_s(run: RunDir) -> float:
    """Wall-clock time of the run's first start in seconds; 0 if unknown."""
    card = read_mapping(run.card)
    attempts = card.get("attempts")
    first = attempts[0] if isinstance(attempts, list) and attempts and isinstance(attempts[0], dict) else card
    try:
        return float(calendar.timegm(time.strptime(str(first.get("started_at")), "%Y-%m-%dT%H:%M:%SZ")))
    except (ValueError, OverflowError):
        return 0.0
