"""The batches of a run, in order. On a GPU the next one is copied to the device while a step runs."""

from __future__ import annotations

from headway.data.loader import Loader, StepBatch
from headway.parallel.engine import Engine


class Ahead:
    """Batches of `loader`. `fetch` may take the next one early, only if it is ready: it never waits for data."""

    def __init__(self, loader: Loader, engine: Engine) -> None:
        self._loader, self._engine = loader, engine
        self._next: StepBatch | Exception | None = None

    def take(self) -> StepBatch:
        """The next batch. Raises what the loader raises."""
        found, self._next = self._next, None
        if found is None:
            return next(self._loader)
        if isinstance(found, Exception):
            raise found
        return found

    def fetch(self) -> None:
        """Take the next batch if it is ready, and start to copy it. An error is raised by the next `take`, so that the
        step that runs now is recorded.
        """
        if self._next is not None or not self._engine.copies_ahead or not self._loader.is_ready:
            return
        try:
            self._next = next(self._loader)
            self._engine.copy_ahead(self._next.micro)
        except Exception as e:
            self._next = e
