"""TensorBoard during training: records are written to event files as they are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from headway.launcher.board.events import Drawing
from headway.launcher.board.files import EVENTS, put_in_order
from headway.launcher.board.summaries import without_s3
from headway.launcher.run.run_dir import RunDir

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


def writer_class() -> type[SummaryWriter]:
    """`SummaryWriter`, imported without the client of Amazon S3."""
    with without_s3():
        from torch.utils.tensorboard.writer import SummaryWriter
    return SummaryWriter


class Writer:
    """PyTorch's `SummaryWriter`, which also writes other values. `purge_step`: points from this step on are hidden."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self._writer = writer_class()(folder, purge_step=purge_step)
        self.add_scalar, self.add_image = self._writer.add_scalar, self._writer.add_image
        self.flush, self.close = self._writer.flush, self._writer.close

    def add_value(self, value: Any, global_step: Any = None, walltime: Any = None) -> None:
        """`value`: made by a function of `headway.launcher.board.summaries`."""
        from tensorboard.compat.proto import summary_pb2

        protos: Any = summary_pb2  # generated, so its names are not known to type checkers
        files: Any = self._writer._get_file_writer()  # there is no public function for a value of another kind
        files.add_summary(protos.Summary(value=[value]), global_step, walltime)


class TensorBoard:
    """The event files of a run, as a `headway.launcher.board.trackers.sink.Sink`.

    `start_step`: step after which the run continues. Raises OSError, RuntimeError or ValueError, as all methods do.
    """

    name = "TENSORBOARD"
    mend = "`headway board RUN --rebuild` makes it anew"

    def __init__(self, run: RunDir, *, start_step: int, per_layer: bool) -> None:
        put_in_order(run.tensorboard)
        begun = start_step > 0 and any(run.tensorboard.glob(f"{EVENTS}*"))
        # Also at step 0: a start that was killed before its first checkpoint may have left events.
        self.board = Writer(str(run.tensorboard), purge_step=start_step + 1 if start_step else 0)
        self._drawing = Drawing(self.board, run, per_layer=per_layer)
        if not begun:
            self._drawing.begin()

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            self._drawing.draw(record)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._drawing.end(summary)

    def flush(self) -> None:
        self.board.flush()

    def close(self) -> None:
        self.board.close()
