"""What a user can do wrong, and the exit status each kind of mistake ends the program with.

Every class of mistake carries `exit_code`: 64 spec, 65 data (`headway.data.config.DataError`) and weights
(`headway.model.huggingface.folder.WeightsError`), 66 no input, 70 numeric or our own, 74 input and output
(`headway.parallel.config.CheckpointError`), 75 preempted: start the same command again.
"""

from __future__ import annotations

PREEMPTED = 75
"""The exit status of a run or study that a signal stopped: the same command continues."""


class HeadwayError(Exception):
    """Something went wrong and the message says what to do next; shown without a traceback."""

    exit_code = 70


class SpecError(HeadwayError):
    """A spec, a study or an argument is not what it should be. One problem per line of the message."""

    exit_code = 64


class NoInputError(HeadwayError):
    """A file the user named is not there or cannot be read."""

    exit_code = 66


def exit_code(error: BaseException) -> int | None:
    """The exit status of a mistake that is shown without a traceback; None for an error of our own (a defect)."""
    code = getattr(error, "exit_code", None)
    return code if isinstance(code, int) and not isinstance(code, bool) else None


def format_error(error: BaseException) -> str:
    """`error: <message>`, further lines indented below it; what the command line prints to stderr.

    Whatever a file held that the message quotes, no control character reaches the terminal.
    """
    text = str(error).rstrip() or type(error).__name__
    first, *rest = [printable(line, 4000) for line in text.split("\n")]
    return "\n".join([f"error: {first}", *(f"       {line}" for line in rest)])


def printable(text: str, limit: int = 80) -> str:
    """`text` for a message: no control characters (a spec must not steer the terminal), at most `limit` letters."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
