"""`headway board`."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.numbers import whole
from headway.launcher.base.verbs import Verb


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or of a study")
    parser.add_argument("--rebuild", action="store_true", help="first recreate the event files from metrics.jsonl")
    parser.add_argument(
        "--per-layer", action="store_true", help="with --rebuild: show routers and heads of each layer too"
    )
    parser.add_argument(
        "--send", action="store_true", help="send W&B and MLflow the records that they lack of complete runs, and exit"
    )
    parser.add_argument("--no-server", action="store_true", help="exit after --rebuild; do not start the server")
    parser.add_argument(
        "--port",
        type=whole(0, 65_535),
        default=None,
        metavar="N",
        help="0: any free port (default 6006 or the next free port)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="any other address needs --expose (default 127.0.0.1)"
    )
    parser.add_argument(
        "--expose", action="store_true", help="allow other machines to connect; TensorBoard has no password"
    )


def _board(args: argparse.Namespace) -> int:
    from headway.launcher.board.server import board

    options = {"host": args.host, "port": args.port, "expose": args.expose}
    return board(
        args.runs,
        **options,
        rebuild_files=args.rebuild,
        per_layer=args.per_layer or None,
        serve=not (args.no_server or args.send),
        send=args.send,
    )


VERBS = (
    Verb(
        name="board",
        help="serve TensorBoard for runs and studies, on this machine only",
        examples=(
            "headway board runs/quickstart",
            "headway board runs/quickstart --rebuild --no-server",
            "headway board runs/quickstart --send",
        ),
        arguments=_arguments,
        run=_board,
        order=75,
    ),
)
