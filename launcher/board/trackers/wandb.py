"""Weights & Biases (https://docs.wandb.ai), through its package `wandb`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from headway.launcher.board.pages import public_values
from headway.launcher.board.scalars import scalars_of
from headway.launcher.board.trackers.sink import Record
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json
from headway.launcher.spec.tracking import WandbConfig


class Wandb:
    """A run of W&B, whose id is that of the run folder, so that a resume continues it. Its files are in `RUN/wandb`.

    Raises exceptions of `wandb`.
    """

    name = WandbConfig.name
    mend = "`wandb sync` sends the files of the run folder"

    def __init__(self, run: RunDir, config: WandbConfig, *, per_layer: bool) -> None:
        wandb: Any = import_module("wandb")  # of an extra, so type checkers may not find it
        spec, run_id = read_mapping(run.spec), run.run_id()
        online = config.mode == "online"
        started = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            name=str(spec.get("name", run.path.name)),
            id=run_id,
            resume="allow" if online else None,  # offline, `wandb sync` joins the files of one id
            mode=config.mode,
            dir=str(run.path.resolve()),
            config=public_values(spec),
            # Nothing of the host but its load: no console, sources, or addresses of git remotes, which may have keys.
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, save_code=False),
        )
        self._run: Any = started
        self._per_layer = per_layer
        self._file = run.path / "wandb.json"
        self._about = {"id": run_id, "project": config.project, "url": self._run.url if online else None}
        # W&B takes only later steps than those it has, so a repeated step keeps its first point.
        stored = read_mapping(self._file)
        last = self._run.step - 1 if online else stored.get("step", -1) if stored.get("id") == run_id else -1
        self.shown = last if isinstance(last, int) else -1
        self._at, self._complete = self.shown, False
        self._store()

    def _store(self) -> None:
        """Write id and last step, for people and for the next start without a network."""
        write_json(self._file, self._about | {"step": self._at})

    def write(self, records: Iterable[Record]) -> None:
        for record in records:
            scalars = scalars_of(record, per_layer=self._per_layer)
            if scalars and record["step"] > self.shown:
                self._at = max(self._at, record["step"])  # a save that ended is recorded after later steps
                self._run.log(scalars, step=self._at)
        self._store()

    def finish(self, summary: Record) -> None:
        self._run.summary.update({key: value for key, value in summary.items() if isinstance(value, int | float)})
        self._complete = True

    def flush(self) -> None:
        return

    def close(self) -> None:
        if not self._complete:
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if self._complete else 1)
