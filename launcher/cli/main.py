"""Entry point of the `headway` command. Nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Sequence

from headway.launcher.cli.parser import make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. User mistakes end with one message, never a traceback."""
    os.umask(os.umask(0o077) | 0o022)  # what is written here is read back later: nobody else may change it
    parser = make_parser()
    try:
        # argparse does not collect key=value arguments that stand behind an option; they are overrides all the same.
        args, rest = parser.parse_known_args(argv)
        if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in args):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except SystemExit as e:  # argparse says what is wrong; 2 is its own status, ours is 64
        return 64 if e.code else 0
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return _run(args)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of a pipe has gone, as in `headway plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        from headway.launcher.base.errors import exit_code, format_error

        code = exit_code(e)
        if code is None and isinstance(e, OSError) and (e.filename is not None or e.errno in _DISK):
            code, e = 74, _input_output(e)
        if code is None:
            raise
        print(format_error(e), file=sys.stderr)
        return code


def _run(args: argparse.Namespace) -> int:
    args.command = main  # for the fork server, which runs commands itself
    if "spec_kind" in args:
        from headway.launcher.run.folders import refuse_folder
        from headway.launcher.spec.shipped import find_spec

        refuse_folder(args.spec, args.spec_kind)
        args.spec = find_spec(args.spec, args.spec_kind)
    return args.act(args)


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def _input_output(error: OSError) -> OSError:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    return OSError(
        f"{where}{error.strerror or error}; name another place, or mend this one (permissions, free space, a file "
        "where a folder should be), and run the same command again"
    )


if __name__ == "__main__":
    sys.exit(main())
