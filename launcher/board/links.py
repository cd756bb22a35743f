"""The folder that TensorBoard serves: one link for each run, so that runs have the names of variants and seeds."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from headway.launcher.base.errors import NoInputError
from headway.launcher.board.event_file import EventFile
from headway.launcher.board.files import EVENTS
from headway.launcher.board.pages import differing, hparams
from headway.launcher.board.summaries import experiment_value, text_value
from headway.launcher.run.run_dir import RunDir, flatten, read_mapping

EVERY_S = 5.0
"""From one look for new runs to the next."""

_DEEPEST = 4  # maximum depth of a run below the named folder: probes/TASK/cells/VARIANT/seed-N
_RESULTS = {
    "val/loss": "validation loss",
    "train/loss": "loss of the last batch",
    "perf/tokens_per_s": "tokens per second",
}
_PICTURE = re.compile(r"!\[[^]]*\]\([^)]*\)")


def runs_below(path: Path) -> list[RunDir]:
    """The run in a folder, or the runs below it (of a study or probes). Raises NoInputError if there is none."""
    if _is_run(path):
        return [RunDir(path)]
    for depth in range(1, _DEEPEST + 1):
        if found := sorted({p.parent for p in path.glob("*/" * depth + "metrics.jsonl") if _is_run(p.parent)}):
            return [RunDir(p) for p in found]
    raise NoInputError(
        f"{path}: no run in this folder or below it; name the folder with metrics.jsonl, or the folder of a study"
    )


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file() or (path / "tensorboard").is_dir()


class Links:
    """Links in `folder` to the event files of all runs at or below `paths`, and the reports of studies as texts."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self._folder, self._paths = folder, paths
        self._runs: dict[Path, str] = {}
        self._reports: dict[Path, int] = {}

    def update(self) -> None:
        """Add the runs that have event files by now. Raises OSError."""
        for path in self._paths:
            with suppress(NoInputError):
                for run in runs_below(path):
                    self._link(path, run)
            self._show_report(path)

    def _link(self, path: Path, run: RunDir) -> None:
        if run.path in self._runs or not run.tensorboard.is_dir():
            return
        # Folders named `cells` say nothing; a run that is named itself has the name of its folder.
        parts = [part for part in run.path.relative_to(path).parts if part != "cells"]
        if len(self._paths) > 1 or not parts:
            parts = [path.resolve().name, *parts]
        wanted = "/".join(parts)
        taken, number = set(self._runs.values()), 1
        name = wanted
        while name in taken:
            number += 1
            name = f"{wanted}-{number}"
        self._runs[run.path] = name
        link = self._folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(run.tensorboard.resolve())

    def _show_report(self, path: Path) -> None:
        """Write report.md of a study into an event file of its own, again when it has changed."""
        report = path / "report.md"
        try:
            text, changed_ns = report.read_text(encoding="utf-8"), report.stat().st_mtime_ns
        except OSError:
            return
        if self._reports.get(path) == changed_ns:
            return
        self._reports[path] = changed_ns
        name = "report" if len(self._paths) == 1 else f"{path.resolve().name}/report"
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in folder.iterdir())
        # Its pictures are files beside it, which TensorBoard does not serve.
        _write(folder / f"{EVENTS}{number:010d}", text_value("study/report", _PICTURE.sub("", text)), changed_ns / 1e9)

    def compare(self) -> None:
        """Limit the tab HParams to losses, speed, and what differs between the runs. Raises OSError.

        Of studies these are the keys that their variants set, of other runs those that all of them have.
        """
        found = [hparams(spec) for path in self._paths for spec in _specs_below(path)]
        varied = {key for path in self._paths for key in _varied(path)}
        wanted = varied or set.intersection(*(set(one) for one in found))
        kinds = {key: kind for key, kind in differing(found).items() if key in wanted}
        if kinds:
            folder = self._folder / "report"
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / f"{EVENTS}{0:010d}.columns", experiment_value(kinds, _RESULTS), 0.0)


def _specs_below(path: Path) -> Iterator[dict[str, Any]]:
    """Specs of the runs below a folder, with those of a study that have not begun."""
    cells = read_mapping(path / "study.json").get("cells")
    if isinstance(cells, list):
        yield from (cell["spec"] for cell in cells if isinstance(cell, dict) and isinstance(cell.get("spec"), dict))
    else:
        yield from (read_mapping(run.spec) for run in runs_below(path))


def _varied(path: Path) -> Iterator[str]:
    """Dotted keys in which the cells of a study differ by its design; none for other folders."""
    variants = read_mapping(path / "study.json").get("variants")
    for variant in variants if isinstance(variants, list) else ():
        if isinstance(variant, dict):
            yield from ("seed", "train.tokens")
            yield from flatten(variant["keys"]) if isinstance(variant.get("keys"), dict) else ()
            matched = variant.get("matched")
            yield from [str(matched.get("free"))] if isinstance(matched, dict) else []


def _write(path: Path, value: Any, wall_s: float) -> None:
    with path.open("wb") as file:
        board = EventFile(file, wall_s)
        board.add_value(value, 0, wall_s)
        board.close()


@contextmanager
def log_folder(paths: Sequence[Path]) -> Iterator[Path]:
    """A temporary folder with the links, which gets those of later runs too."""
    with tempfile.TemporaryDirectory(prefix="headway-board-") as temporary:
        links, stop = Links(Path(temporary), paths), threading.Event()
        links.update()
        links.compare()
        looker = threading.Thread(target=_look, args=(links, stop), name="board: new runs", daemon=True)
        looker.start()
        try:
            yield Path(temporary)
        finally:
            stop.set()
            looker.join()


def _look(links: Links, stop: threading.Event) -> None:
    while not stop.wait(EVERY_S):
        with suppress(OSError):  # a folder that is being deleted
            links.update()
