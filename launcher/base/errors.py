"""Errors that are shown to the user, and the exit status of the program for each.

Every error class has an `exit_code`: 64 spec, 65 data (`headway.data.config.DataError`) and weights
(`headway.model.huggingface.folder.WeightsError`), 66 no input, 70 numeric error or defect of Headway, 74 input and
output (`headway.parallel.config.CheckpointError`), 75 preempted: the same command continues the run.
"""

from __future__ import annotations

PREEMPTED = 75
"""Exit status of a run or study that a signal stopped. The same command continues it."""


class HeadwayError(Exception):
    """An error that is shown without a traceback. Its message explains what to do next."""

    exit_code = 70


class SpecError(HeadwayError):
    """A spec, a study or an argument is invalid. The message has one problem per line."""

    exit_code = 64


class NoInputError(HeadwayError):
    """A file that the user named does not exist or cannot be read."""

    exit_code = 66


def exit_code(error: BaseException) -> int | None:
    """Exit status of an error that is shown without a traceback; None for a defect of Headway."""
    code = getattr(error, "exit_code", None)
    return code if isinstance(code, int) and not isinstance(code, bool) else None


def format_error(error: BaseException) -> str:
    """`error: <message>` with further lines indented below it, as the command line prints it to stderr.

    Control characters are escaped, so that none from a quoted file reaches the terminal.
    """
    text = str(error).rstrip() or type(error).__name__
    first, *rest = [printable(line, 4000) for line in text.split("\n")]
    return "\n".join([f"error: {first}", *(f"       {line}" for line in rest)])


def printable(text: str, limit: int = 80) -> str:
    """`text` for a message: at most `limit` characters, with control characters escaped.

    A spec must not be able to control the terminal.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
