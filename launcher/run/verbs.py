"""`headway checkpoint`."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.numbers import whole
from headway.launcher.base.verbs import Verb, output_arguments


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--step", type=whole(0), default=None, help="only the checkpoint of this step")
    output_arguments(parser)


def _list(args: argparse.Namespace) -> int:
    from headway.launcher.run.checkpoints import list_checkpoints

    return list_checkpoints(args.run, step=args.step, as_json=args.json)


def _verify(args: argparse.Namespace) -> int:
    from headway.launcher.run.checkpoints import verify_checkpoints

    return verify_checkpoints(args.run, step=args.step, as_json=args.json)


def _show(args: argparse.Namespace) -> int:
    from headway.launcher.run.checkpoints import show_checkpoint

    return show_checkpoint(args.run, step=args.step, as_json=args.json)


VERBS = (
    Verb(
        name="checkpoint",
        help="list, verify or show the checkpoints of a run",
        order=70,
        actions=(
            Verb(
                name="list",
                help="list step, tokens, loss, size and age of every checkpoint",
                examples=("headway checkpoint list runs/quickstart",),
                arguments=_arguments,
                run=_list,
            ),
            Verb(
                name="verify",
                help="hash every file and name those that changed (exit status 74)",
                examples=("headway checkpoint verify runs/quickstart --step 100",),
                arguments=_arguments,
                run=_verify,
            ),
            Verb(
                name="show",
                help="show the origin, files and tensors of the newest checkpoint",
                examples=("headway checkpoint show runs/quickstart --json",),
                arguments=_arguments,
                run=_show,
            ),
        ),
    ),
)
