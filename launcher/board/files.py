"""TensorBoard's event files of a run: a view of metrics.jsonl, in the order of the attempts, and made anew from it."""

from __future__ import annotations

import calendar
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headway.launcher.base.errors import NoInputError
from headway.launcher.board.events import DRAW
from headway.launcher.run.lines import Damage, Lost, gaps
from headway.launcher.run.run_dir import RunDir, read_mapping, sync

EVENTS = "events.out.tfevents."
_ORDERED = re.compile(re.escape(EVENTS) + r"0000000000-(\d{6})\.")
_REBUILT = f"{EVENTS}9999999999.rebuilt"  # behind all others while they are there: it hides what they show


def put_in_order(folder: Path) -> None:
    """Let event files of earlier attempts sort before the next one: their names begin with the time, and TensorBoard
    reads them in the order of their names, whatever the clock did in between.
    """
    found = {path: _ORDERED.match(path.name) for path in folder.glob(f"{EVENTS}*")}
    following = 1 + max((int(match[1]) for match in found.values() if match), default=-1)
    latest = sorted(path for path, match in found.items() if not match)
    for number, path in enumerate(latest, start=following):
        # "-" sorts before every digit, so before a name of any time.
        path.rename(path.with_name(f"{EVENTS}0000000000-{number:06d}.{path.name.removeprefix(EVENTS)}"))


def rebuild(run: RunDir) -> Lost:
    """Make the event files anew from metrics.jsonl, atomically: a reader sees the old view or the new one.

    Points carry the time at which the run first started plus the seconds of training until then: records hold no
    clock. Returns what metrics.jsonl lacks. Raises NoInputError without records, SpecError while the run is trained.
    """
    if next(run.read_metrics(), None) is None:
        raise NoInputError(f"{run.metrics}: there is no record to show; name the folder of a run that has begun")
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
    """Write one event file into a new folder."""
    from torch.utils.tensorboard.writer import SummaryWriter

    damage, strange, wall_s = Damage(), 0, _started_s(run)
    steps: set[int] = set()
    start_s = wall_s
    with SummaryWriter(str(folder), purge_step=0) as board:
        for kind, record in _last_of_each_step(run, damage):
            trained_s = record.get("train_s")
            if isinstance(trained_s, int | float) and start_s + trained_s > wall_s:
                wall_s = start_s + trained_s
            try:
                DRAW[kind](board, record, wall_s)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError):
                strange += 1  # without a checksum, and not as Headway writes it
                continue
            if kind == "train":
                steps.add(record["step"])
    return Lost(lines=len(damage.lines) + strange, gaps=gaps(steps))


def _last_of_each_step(run: RunDir, damage: Damage) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records that are drawn, with their kind; where a step stands twice, the later one. Reads the file twice."""
    places: dict[tuple[str, int], int] = {}
    for place, record in enumerate(run.read_metrics()):
        kind, step = record.get("kind"), record.get("step")
        if isinstance(kind, str) and kind in DRAW and type(step) is int and 0 <= step < 1 << 40:
            places[kind, step] = place
    wanted = {place: kind for (kind, _), place in places.items()}
    for place, record in enumerate(run.read_metrics(damage)):
        if place in wanted:
            yield wanted[place], record


def _started_s(run: RunDir) -> float:
    """When the run first started, in seconds of the clock; 0 where nothing says so."""
    card = read_mapping(run.card)
    attempts = card.get("attempts")
    first = attempts[0] if isinstance(attempts, list) and attempts and isinstance(attempts[0], dict) else card
    try:
        return float(calendar.timegm(time.strptime(str(first.get("started_at")), "%Y-%m-%dT%H:%M:%SZ")))
    except (ValueError, OverflowError):
        return 0.0
