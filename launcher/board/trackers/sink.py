"""What shows the records of a run. metrics.jsonl is the only truth: a sink gets the same records, and may fail."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

Record = Mapping[str, Any]
"""A record of metrics.jsonl, without its checksums."""


class Sink(Protocol):
    """Shows the records of one run. Methods raise any Exception if that fails; training goes on without the sink.

    `name`: in messages. `mend`: how what is missing can be shown later, for messages.
    """

    @property
    def name(self) -> str: ...
    @property
    def mend(self) -> str: ...

    def write(self, records: Iterable[Record]) -> None:
        """Show records, in the order of metrics.jsonl. After a resume, steps occur again."""

    def finish(self, summary: Record) -> None:
        """The run is complete. `summary`: of summary.json."""

    def flush(self) -> None:
        """Called before a checkpoint is committed. Must not wait for a network."""

    def close(self) -> None:
        """Called once, after all other methods, also if the run is not complete."""
