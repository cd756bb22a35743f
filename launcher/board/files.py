"""TensorBoard's event files of a run: order them by attempt, and rebuild them from metrics.jsonl."""

from __future__ import annotations

import re
import shutil
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headway.launcher.base.errors import NoInputError
from headway.launcher.board.event_file import EventFile
from headway.launcher.board.events import Drawing
from headway.launcher.board.pages import started_s
from headway.launcher.board.scalars import KINDS
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


def rebuild(run: RunDir, *, per_layer: bool | None = None) -> Lost:
    """Rebuild the event files from metrics.jsonl, atomically: a reader sees either the old or the new files.

    `per_layer`: with the scalars of each layer; None: as `tracking.per_layer` of the run says. Records contain no
    wall-clock time, so the time of a point is the first start of the run plus the seconds of training. Returns the
    damage and gaps of metrics.jsonl. Raises NoInputError if there are no records, and SpecError while the run is being
    trained.
    """
    if next(run.read_metrics(), None) is None:
        raise NoInputError(f"{run.metrics}: there is no record to show; name the folder of a run that has started")
    with run.locked(), run.locked("worker.lock"):
        temporary = run.path / ".tensorboard.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        if per_layer is None:
            per_layer = shows_layers(read_mapping(run.spec))
        lost = _draw(run, temporary, per_layer)
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


def shows_layers(spec: Mapping[str, Any]) -> bool:
    """`tracking.per_layer` of the spec of a run; False where it says nothing."""
    tracking = spec.get("tracking")
    return isinstance(tracking, dict) and tracking.get("per_layer") is True


def _draw(run: RunDir, folder: Path, per_layer: bool) -> Lost:
    """Write one event file into a new folder. Returns the damage found in metrics.jsonl."""
    damage, strange, wall_s = Damage(), 0, started_s(run)
    steps, start_s = array("q"), wall_s
    folder.mkdir()
    with (folder / _REBUILT).open("wb") as file:
        board = EventFile(file, wall_s)
        drawing = Drawing(board, run, per_layer=per_layer)
        drawing.begin(wall_s)
        for kind, record in _last_of_each_step(run, damage):
            trained_s = record.get("train_s")
            if isinstance(trained_s, int | float) and start_s + trained_s > wall_s:
                wall_s = start_s + trained_s
            try:
                drawing.draw(record, wall_s)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                board.drop_record()
                strange += 1  # a line without a checksum that does not have Headway's format
                continue
            board.end_record()
            if kind == "train":
                steps.append(record["step"])
        if run.is_complete():
            drawing.end(read_mapping(run.summary), wall_s)
        board.close()
    found = np.unique(np.array(steps, dtype=np.int64))
    lost = Lost.of(damage, gaps_between(found[found > 0]))
    return replace(lost, lines=lost.lines + strange)


def _last_of_each_step(run: RunDir, damage: Damage) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records to write, with their kind; the later one if a step occurs twice. Reads the file twice."""
    tables = {kind: Table(("place",)) for kind in KINDS}
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
