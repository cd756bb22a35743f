"""`headway inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.numbers import whole
from headway.launcher.base.verbs import Verb, output_arguments


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN|EXPORT", help="folder of a run, or of weights")
    parser.add_argument(
        "--text",
        default=None,
        metavar="PATH",
        help="a text, a .jsonl or .parquet file, or a dataset (default: the validation of the run)",
    )
    parser.add_argument(
        "--documents", type=whole(1, 100_000), default=32, help="documents, or pairs, to read (default: 32)"
    )
    parser.add_argument("--tokens", type=whole(4, 1 << 16), default=128, help="first tokens of each (default: 128)")
    parser.add_argument(
        "--step", type=whole(0), default=None, metavar="N", help="step of the checkpoint (default: the newest)"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for the page (default: RUN/inspection)")
    output_arguments(parser)


def _inspect(args: argparse.Namespace) -> int:
    from headway.launcher.evaluate.texts import TextSource
    from headway.launcher.inspect.command import inspect

    return inspect(
        args.path,
        text=None if args.text is None else TextSource.parse(args.text),
        sequences=args.documents,
        length=args.tokens,
        step=args.step,
        out=args.out,
        as_json=args.json,
    )


VERBS = (
    Verb(
        name="inspect",
        help="show what heads attend to, what experts specialise in, and what each is worth",
        examples=("headway inspect runs/first", "headway inspect runs/first --text heldout.txt --out inspection"),
        arguments=_arguments,
        run=_inspect,
        order=63,
    ),
)
