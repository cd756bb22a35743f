"""Write records to TensorBoard: scalars, pictures of expert loads, the layout of the charts, texts, hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from headway.launcher.board.layout import layout_of
from headway.launcher.board.pages import hparams, report_text, spec_text, started_s
from headway.launcher.board.picture import load_picture
from headway.launcher.board.scalars import KINDS, scalars_of
from headway.launcher.board.summaries import end_value, layout_value, start_value, text_value
from headway.launcher.run.run_dir import RunDir, read_mapping


class Board(Protocol):
    """What is written to: `headway.launcher.board.writer.Writer` or `headway.launcher.board.event_file.EventFile`."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: Any = None, walltime: Any = None) -> Any: ...

    def add_image(
        self, tag: str, img_tensor: Any, global_step: Any = None, walltime: Any = None, dataformats: str = "CHW"
    ) -> Any: ...

    def add_value(self, value: Any, global_step: Any = None, walltime: Any = None) -> Any:
        """`value`: made by a function of `headway.launcher.board.summaries`."""


class Drawing:
    """The records of one run on a board.

    `per_layer`: with the scalars of each layer. Times are wall-clock times in seconds; None: now.
    """

    def __init__(self, board: Board, run: RunDir, *, per_layer: bool) -> None:
        self._board, self._run, self._per_layer = board, run, per_layer
        self._tags: set[str] = set()
        self._layout: Mapping[str, Any] = {}

    def begin(self, wall_s: float | None = None) -> None:
        """Show the spec of the run as a text and as hyperparameters. Nothing is shown without a spec."""
        spec = read_mapping(self._run.spec)
        if not spec:
            return
        self._board.add_value(text_value("run/spec", spec_text(self._run)), 0, wall_s)
        group = str(spec.get("name", self._run.path.name))
        self._board.add_value(start_value(hparams(spec), group, started_s(self._run)), 0, wall_s)

    def draw(self, record: Mapping[str, Any], wall_s: float | None = None) -> None:
        """Show a record of `KINDS`; nothing for others. Raises as `scalars_of` does, before anything is written."""
        if record["kind"] not in KINDS:
            return
        scalars, step = scalars_of(record, per_layer=self._per_layer), record["step"]
        pictures = _pictures(record)
        for tag, value in scalars.items():
            self._board.add_scalar(tag, value, step, wall_s)
        for tag, picture in pictures.items():
            self._board.add_image(tag, picture, step, wall_s, dataformats="HWC")
        if not self._tags.issuperset(scalars):
            self._tags.update(scalars)
            layout = layout_of(self._tags)
            if layout != self._layout:
                self._layout = layout
                self._board.add_value(layout_value(layout), 0, wall_s)

    def end(self, summary: Mapping[str, Any], wall_s: float | None = None) -> None:
        """Show the result of a complete run. `summary`: of summary.json."""
        self._board.add_value(text_value("run/report", report_text(self._run, summary)), summary["steps"], wall_s)
        self._board.add_value(end_value(started_s(self._run) + summary["train_s"]), summary["steps"], wall_s)


def _pictures(record: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> picture of the loads of all layers, for each router of a record."""
    loads: dict[str, dict[str, list[list[float]]]] = {}
    for layer, routers in record.get("router", {}).items():
        for name, figures in routers.items():
            shares = [[len(group) * share for share in group] for group in figures["load"]]
            loads.setdefault(name, {})[layer] = shares
    return {f"router/load_{name}": load_picture(layers) for name, layers in loads.items()}
