"""`headway board`."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.verbs import Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or of a study")
    parser.add_argument("--rebuild", action="store_true", help="make the event files anew from metrics.jsonl first")
    parser.add_argument("--no-server", action="store_true", help="stop after --rebuild")
    parser.add_argument("--port", type=int, default=None, metavar="N", help="default 6006 or the next; 0: any")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="beyond this machine it needs --expose")
    parser.add_argument("--expose", action="store_true", help="others may read it: it asks nobody for a password")


def _board(args: argparse.Namespace) -> int:
    from headway.launcher.board.server import board

    options = {"host": args.host, "port": args.port, "expose": args.expose}
    return board(args.runs, **options, rebuild_files=args.rebuild, serve=not args.no_server)


VERBS = (
    Verb(
        name="board",
        help="TensorBoard over runs and studies, on this machine alone",
        examples=("headway board runs/quickstart", "headway board runs/quickstart --rebuild --no-server"),
        arguments=_arguments,
        run=_board,
        order=75,
    ),
)
