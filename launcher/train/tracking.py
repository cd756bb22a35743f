"""Records of a run: console lines, metrics.jsonl (authoritative), and what shows the same records elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from headway.launcher.base.text import duration
from headway.launcher.board.trackers.sink import Sink
from headway.launcher.board.writer import TensorBoard
from headway.launcher.run.chain import Chain
from headway.launcher.run.lines import LineFile
from headway.launcher.run.run_dir import RunDir


class Tracker:
    """Write records on the main process. On all other processes every method does nothing.

    `total_steps` and `total_tokens`: size of the whole run; `start_step`: step after which the run is resumed.
    `per_layer`: TensorBoard shows the figures of each layer too. `chain`: the end of the existing records; None:
    computed from the file. `sinks`: what else shows the records. They are closed with this tracker.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        main: bool,
        tensorboard: bool,
        log_every_steps: int,
        total_steps: int,
        start_step: int,
        per_layer: bool = False,
        chain: Chain | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._main, self._every, self._total, self._start = main, log_every_steps, total_steps, start_step
        self._file: LineFile | None = None
        self._sinks: list[Sink] = []
        self._chain: Chain | None = None
        self._validation: float | None = None
        if not main:
            return
        self._chain = chain or Chain.of_file(run.metrics, run.tag)
        self._file = LineFile(run.metrics)
        self._sinks += sinks
        if tensorboard:
            try:
                self._sinks.append(TensorBoard(run, start_step=start_step, per_layer=per_layer))
            except (OSError, RuntimeError, ValueError) as e:
                _say_gone(TensorBoard, e)

    def train(self, record: dict[str, Any], *, seconds_left: float | None) -> None:
        """Record one optimizer step."""
        self._write(record)
        step = record["step"]
        if not self._main:
            return
        if step % self._every == 0 or step in (self._start + 1, self._total):
            say(self._line(record, seconds_left))

    def validation(self, record: dict[str, Any]) -> None:
        """Record one validation."""
        self._write(record)
        self._validation = record["loss"]
        if self._main:
            say(
                f"validation after step {record['step']}: loss {record['loss']:.4f} "
                f"accuracy {100 * record['accuracy']:.2f}% over {record['targets']:,} tokens",
            )

    def heads(self, record: dict[str, Any]) -> None:
        """Record the head diversity of every layer that has a pool of heads."""
        self._write(record)

    def event(self, record: dict[str, Any], text: str) -> None:
        """Record an event (such as a resume or a failed checkpoint): one record and one console line."""
        self._write(record)
        if self._main:
            say(text)

    def start(self, record: dict[str, Any]) -> None:
        """Record the initial scale of each residual branch."""
        self._write(record)

    def flush(self) -> None:
        """Flush all records to disk. Called before a checkpoint is committed."""
        if self._file is not None and (error := self._file.sync()) is not None:
            say(f"RECORDS ARE NOT SAFE ON THE DISK: {error.strerror}; a kill now would lose some of metrics.jsonl")
        self._show(lambda sink: sink.flush())

    def end(self) -> dict[str, Any] | None:
        """The end of the records, for a checkpoint or summary.json; None on all other processes."""
        return None if self._chain is None else self._chain.state()

    def require(self) -> None:
        """Raise OSError unless all records are written, which is required before a run is marked as complete."""
        if self._file is not None:
            self._file.require()

    def finish(self, summary: dict[str, Any]) -> None:
        """Show the result of a complete run. `summary`: of summary.json."""
        self._show(lambda sink: sink.finish(summary))

    def close(self) -> None:
        """Close the files. Raises OSError if records remain that could not be written."""
        try:
            if self._file is not None:
                self._file.close()
        finally:
            self._show(lambda sink: sink.close())

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None or self._chain is None:
            return
        if (error := self._file.write(self._chain.line(record))) is not None:
            say(f"RECORDS CANNOT BE WRITTEN: {error.strerror}; they are kept in memory until there is room")
        self._show(lambda sink: sink.write([record]))

    def _show(self, call: Callable[[Sink], object]) -> None:
        """Call a method of every sink. One that fails is left out from then on, and training continues."""
        for sink in tuple(self._sinks):
            try:
                call(sink)
            except (OSError, RuntimeError, ValueError) as e:
                self._sinks.remove(sink)
                _say_gone(sink, e)

    def _line(self, r: dict[str, Any], seconds_left: float | None) -> str:
        width = len(str(self._total))
        validation = "-" if self._validation is None else f"{self._validation:.4f}"
        data = 100 * r["data_s"] / max(1e-9, r["step_s"])
        router = ""
        if r.get("router"):
            stats = [s for layer in r["router"].values() for s in layer.values()]
            entropy = [h for s in stats for h in s["entropy"] if h is not None]
            router = f" router H {sum(entropy) / max(1, len(entropy)):.2f} dead {sum(sum(s['dead']) for s in stats)}"
        return (
            f"step {r['step']:>{width}}/{self._total} {100 * r['step'] / self._total:5.1f}% loss {r['loss']:.4f} "
            f"val {validation} gnorm {r['grad_norm']:.2f} lr {r['lr']:.1e} tok/s {r['tokens_per_s']:,.0f} "
            f"mfu - mem {memory()} data {data:.1f}%{router}{' profiled' if r.get('profiled') else ''} "
            f"eta {duration(seconds_left)}"
        )


def _say_gone(sink: Sink | type[TensorBoard], error: Exception) -> None:
    say(f"{sink.name.upper()} IS NOT WRITTEN ANY MORE: {error}; metrics.jsonl has every record, and {sink.mend}")


def say(text: str) -> None:
    """Print a line. A closed terminal or pipe must not end the training."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def memory() -> str:
    """Peak memory of this process: device memory on CUDA, resident set elsewhere."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}/{total / 2**30:.0f} GiB"
    import resource

    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
