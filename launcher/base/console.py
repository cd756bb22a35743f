"""Output of a command: lines, errors, colour and progress bars for people, `--quiet` and `--json` for scripts.

Control characters are written to terminals only. A pipe, a file or a terminal of type `dumb` gets plain lines, and a
progress line once a minute during long work. NO_COLOR turns colour off and FORCE_COLOR turns it on; bars need a
terminal.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from headway.launcher.base.errors import format_error
from headway.launcher.base.text import duration, short_number

DELAY_S = 0.5
"""Work that finishes within this time shows no bar."""

REFRESH_S = 0.5
"""Interval at which the elapsed time of a bar is redrawn while no progress is counted."""

LINE_EVERY_S = 60.0
"""Interval at which long work writes a line when bars cannot be drawn."""

_SCALED = ("B", "characters")
"""Units whose counts are large, so that bars show them scaled, such as 1.2M."""

Style = Literal["red", "yellow", "green", "dim"]
_CODES: dict[Style, str] = {"red": "1;31", "yellow": "1;33", "green": "32", "dim": "2"}
_PREFIXES: dict[str, Style] = {"error": "red", "warning": "yellow"}


@dataclass
class _Mode:
    """Output mode of the running command. `held`: text that is written to stdout when the command ends."""

    quiet: bool = False
    json: bool = False
    held: list[str] = field(default_factory=list)

    @property
    def diverted(self) -> bool:
        return self.quiet or self.json


_mode = _Mode()
_bars: list[_Live] = []


@contextlib.contextmanager
def output(*, quiet: bool = False, json: bool = False) -> Iterator[None]:
    """Apply `--quiet` and `--json` to everything in the block, including the processes that it starts.

    With `json`, stdout receives only the arguments of `emit`, and everything else goes to stderr. With `quiet`, stdout
    receives only the results, and stderr receives errors and alerts.
    """
    global _mode
    before, _mode = _mode, _Mode(quiet=quiet, json=json)
    try:
        with _diverted(_mode):
            yield
    finally:
        held, _mode = _mode.held, before
        for text in held:
            print(text, flush=True)


def quiet() -> bool:
    """Whether `--quiet` was given."""
    return _mode.quiet


def wants_json() -> bool:
    """Whether `--json` was given."""
    return _mode.json


def say(text: str) -> None:
    """Print a line on stdout that reports progress or a finding."""
    with _bars_away():
        print(text, flush=True)


def note(text: str) -> None:
    """Print a line on stderr in addition to the output on stdout. Prints nothing with `--quiet`."""
    if not _mode.quiet:
        with _bars_away():
            print(text, file=sys.stderr, flush=True)


def alert(text: str, style: Style = "red") -> None:
    """Print a line that `--quiet` does not drop: on stdout, or on stderr with `--quiet` or `--json`.

    The line is in colour on a terminal.
    """
    stream = sys.stderr if _mode.diverted else sys.stdout
    with _bars_away():
        print(paint(text, style, stream), file=stream, flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr, also with `--quiet`. It is yellow on a terminal."""
    with _bars_away():
        print(paint(text, "yellow", sys.stderr), file=sys.stderr, flush=True)


def error(mistake: BaseException) -> None:
    """Print `error: <message>` on stderr."""
    with _bars_away():
        print(marked(format_error(mistake), sys.stderr), file=sys.stderr, flush=True)


def result(text: str, *, only_quiet: bool = False) -> None:
    """Print the result of a verb on stdout. `only_quiet`: print it only with `--quiet`, since the verb has otherwise
    printed it already.
    """
    if _mode.quiet and not _mode.json:
        _mode.held.append(text)
    elif not only_quiet:
        say(text)


def emit(value: Any, *, indent: int = 1) -> None:
    """Print `value` as JSON on stdout. Numbers that are not finite become null."""
    text = json.dumps(_finite(value), indent=indent, allow_nan=False)
    if _mode.diverted:
        _mode.held.append(text)
    else:
        print(text, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- colour


def colour(stream: TextIO) -> bool:
    """Whether text on `stream` is coloured: https://no-color.org and https://force-color.org."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return _terminal(stream)


def paint(text: str, style: Style, stream: TextIO) -> str:
    """`text` in colour if `stream` shows colour, else unchanged."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if text and colour(stream) else text


def marked(text: str, stream: TextIO) -> str:
    """`text` with a leading `error:` or `warning:` in colour."""
    word, colon, rest = text.partition(":")
    style = _PREFIXES.get(word)
    return text if style is None else f"{paint(word + colon, style, stream)}{rest}"


def plain_environment() -> dict[str, str]:
    """Environment for a child process whose output goes to a log: colour is disabled."""
    return {**{key: value for key, value in os.environ.items() if key != "FORCE_COLOR"}, "NO_COLOR": "1"}


def _terminal(stream: TextIO) -> bool:
    if os.environ.get("TERM") == "dumb":
        return False
    with contextlib.suppress(ValueError, AttributeError):  # closed, or replaced by an object that is not a stream
        return stream.isatty()
    return False


# ---------------------------------------------------------------- progress


class Bar(Protocol):
    """Progress of one piece of work."""

    def update(self, n: int = 1) -> None:
        """Add `n` to the completed amount."""
        ...

    def name(self, what: str) -> None:
        """Set the description of the current work."""
        ...


@contextlib.contextmanager
def progress(
    what: str,
    total: int | None = None,
    unit: str = "",
    *,
    tick: bool = True,
    lines: bool = True,
    rate: bool = True,
) -> Iterator[Bar]:
    """Show a bar on stderr while the block runs. `update` counts up to `total`, if it is known.

    `unit` B counts bytes. Without `tick` the bar is drawn only in `update`: use this for measurements, during which no
    other thread may run. Without `lines` nothing is written if stderr is not a terminal. Without `rate` the bar shows
    neither speed nor time left: use this for work that has a better estimate.
    """
    if _mode.quiet:
        yield _Silent()
    elif _terminal(sys.stderr):
        bar = _Live(what, total, unit, tick=tick, rate=rate)
        _bars.append(bar)
        try:
            yield bar
        finally:
            _bars.remove(bar)
            bar.close()
    else:
        yield _Lines(what, total, unit) if lines else _Silent()


class _Silent:
    def update(self, n: int = 1) -> None:
        pass

    def name(self, what: str) -> None:
        pass


class _Lines:
    """Plain lines for a log: none in the first minute, then one per minute."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._begin = 0, time.monotonic()
        self._last = self._begin

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_S:
            self._last = now
            done = f"{short_number(self._done)} {self._unit}".rstrip()
            if self._total:
                done = f"{100 * self._done / self._total:.0f} % of {short_number(self._total)} {self._unit}".rstrip()
            print(f"{self._what}: {done} after {duration(now - self._begin)}", file=sys.stderr, flush=True)

    def name(self, what: str) -> None:
        self._what = what


class _Live:
    """A tqdm bar on a terminal. A thread updates its elapsed time during long pieces of work."""

    def __init__(self, what: str, total: int | None, unit: str, *, tick: bool, rate: bool) -> None:
        from tqdm import tqdm

        class Quiet(tqdm):
            monitor_interval = 0  # tqdm must not start a monitor thread

        self._lock, self._ended = threading.Lock(), threading.Event()
        self._bar = Quiet(
            total=total,
            desc=what,
            unit=unit if unit == "B" else f" {unit}".rstrip(),
            unit_scale=unit in _SCALED,
            file=sys.stderr,
            dynamic_ncols=True,
            leave=False,
            delay=DELAY_S,
            miniters=0,
            bar_format=None if rate else "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}]",
        )
        self._thread = threading.Thread(target=self._tick, daemon=True) if tick else None
        if self._thread is not None:
            self._thread.start()

    def update(self, n: int = 1) -> None:
        with self._lock:
            self._bar.update(n)

    def name(self, what: str) -> None:
        with self._lock:
            self._bar.set_description(what, refresh=False)

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._bar.close()

    def _tick(self) -> None:
        while not self._ended.wait(REFRESH_S):
            self.update(0)


@contextlib.contextmanager
def _bars_away() -> Iterator[None]:
    """Remove live bars from the terminal while other output is written."""
    if not _bars:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        yield


@contextlib.contextmanager
def _diverted(mode: _Mode) -> Iterator[None]:
    """Redirect stdout to stderr or to the null device, for this process and the processes that it starts."""
    if not mode.diverted:
        yield
        return
    sys.stdout.flush()
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        with contextlib.suppress(OSError):  # a process without stdout
            kept = os.dup(1)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 1)
            os.dup2(nowhere.fileno() if mode.quiet else 2, 1)
        stack.enter_context(contextlib.redirect_stdout(nowhere if mode.quiet else sys.stderr))
        yield
