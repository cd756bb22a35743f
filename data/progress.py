"""How long work here says how far it is: through a function that the caller gives, so that nothing here prints bars."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol


class Bar(Protocol):
    """Progress of one piece of work."""

    def update(self, n: int = 1) -> object:
        """So much more is done."""
        ...


class Progress(Protocol):
    """Called where a piece of work begins; what it returns is entered for as long as that takes.

    `total` is None where it is not known; `unit` B counts bytes.
    """

    def __call__(self, what: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Bar]: ...


Shown = Progress | Literal[False]
"""How functions here take it; False shows nothing."""


def progress_of(shown: Shown) -> Progress:
    """What to call."""
    return silent if shown is False else shown


class _Nothing:
    def update(self, n: int = 1) -> None:
        pass


@contextlib.contextmanager
def silent(what: str, total: int | None = None, unit: str = "") -> Iterator[Bar]:
    """Progress that nobody sees."""
    yield _Nothing()


Say = Callable[[str], None]
"""Where whole lines for the user go."""


def quiet(message: str) -> None:
    """Say nothing."""


def to_stderr(message: str) -> None:
    """Print a line for whoever looks."""
    print(message, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Reporter:
    """Where long work says what it does (`say`, whole lines) and how far it is."""

    progress: Progress = silent
    say: Say = to_stderr
