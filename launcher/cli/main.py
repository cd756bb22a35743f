"""Entry point of the `headway` command. Imports slow packages only when a verb needs them."""

from __future__ import annotations

import argparse
import atexit
import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from headway.launcher.base import console
from headway.launcher.base.signals import this_process_ends
from headway.launcher.cli.parser import make_parser, value_options
from headway.launcher.cli.words import misplaced_file, plain, split_dotted, unknown_option


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. A user error ends with one message, never a traceback."""
    os.umask(os.umask(0o077) | 0o022)  # files are read again later: no other user may change them
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as e:  # argparse has printed the error; it uses status 2, Headway uses 64
        return 64 if e.code else 0
    if argv is None:
        this_process_ends()
    try:
        return _run(args)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader closed the pipe, as in `headway plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        from headway.launcher.base.errors import exit_code

        code = exit_code(e)
        if code is None and isinstance(e, OSError) and (e.filename is not None or e.errno in _DISK):
            code, e = 74, _input_output(e)
        if code is None:
            raise
        console.error(e)
        return code


def run() -> NoReturn:
    """The `headway` command of a process of its own: `main`, then the end of the process.

    Python takes half a second to take down a process that has imported torch, module by module. All that has an effect
    is done before: handlers of `atexit` (temporary folders, logs) have run, and output is flushed. A process with other
    threads that Python would wait for ends the usual way.
    """
    code = main()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(code)
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError):
        sys.exit(code)  # Python reports output that could not be written, and exits with 120
    os._exit(code)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words into a command. A wrong command ends with the usage of its verb, printed once, and a message."""
    parser = make_parser()
    words, dotted = split_dotted(argv, value_options(parser))
    args, rest = parser.parse_known_args(words)
    takes_overrides = "overrides" in args
    if not takes_overrides and (rest := [*rest, *dotted]):
        args.parser.error(unknown_option(rest, args.parser, takes_overrides=False))
    if any(word.startswith("-") for word in rest):
        args.parser.error(unknown_option(rest, args.parser, takes_overrides=True))
    if takes_overrides:
        # argparse does not collect key=value arguments after an option. They are also overrides.
        args.overrides = [plain(word) for word in (*args.overrides, *rest, *dotted)]
        if "spec" in args and (wrong := misplaced_file(args.spec, args.overrides)):
            args.parser.error(wrong)
    return args


def _run(args: argparse.Namespace) -> int:
    _check_current_folder()
    args.command = main  # for the fork server, which runs commands itself
    if "spec_kind" in args:
        from headway.launcher.run.folders import kind_of, refuse_folder
        from headway.launcher.spec.shipped import find_spec

        if kind_of(args.spec) not in getattr(args, "folder_kinds", ()):
            refuse_folder(args.spec, args.spec_kind)
            args.spec = find_spec(args.spec, args.spec_kind)
    # `headway chaos --json` takes a file name, so compare with True.
    with console.output(quiet=getattr(args, "quiet", False), json=getattr(args, "json", None) is True):
        return args.act(args)


def _check_current_folder() -> None:
    """Raise NoInputError if the current folder was deleted: relative paths and the libraries of PyTorch need it."""
    try:
        Path.cwd()
    except OSError as e:
        from headway.launcher.base.errors import NoInputError

        raise NoInputError(
            f"the current folder cannot be used ({e.strerror}): it was deleted, moved or unmounted; change to a folder "
            "that exists (`cd`), and run the same command again"
        ) from None


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def _input_output(error: OSError) -> OSError:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    return OSError(
        f"{where}{error.strerror or error}; name another place, or mend this one (permissions, free space, a file "
        "where a folder should be), and run the same command again"
    )


if __name__ == "__main__":
    run()
