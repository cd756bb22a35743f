"""`headway chaos`."""

from __future__ import annotations

import argparse
from pathlib import Path

from headway.launcher.base.numbers import SEEDS, real, whole
from headway.launcher.base.verbs import Verb, quiet_argument


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--faults", default=None, metavar="F1,F8", help="run only these faults (default: F1 to F10)")
    parser.add_argument(
        "--seconds", type=real(most=1e6), default=170, metavar="N", help="start no trial after this time (default 170)"
    )
    parser.add_argument(
        "--seed",
        type=whole(0, SEEDS),
        default=None,
        metavar="N",
        help="seed of ranks, steps and bits (default: random, printed)",
    )
    parser.add_argument(
        "--json", type=Path, default=None, metavar="OUT", help="file for all trials; the table is written beside it"
    )
    quiet_argument(parser)


def _chaos(args: argparse.Namespace) -> int:
    from headway.launcher.chaos.drill import chaos

    faults = None if args.faults is None else args.faults.split(",")
    return chaos(faults=faults, seconds=args.seconds, seed=args.seed, out=args.json)


VERBS = (
    Verb(
        name="chaos",
        help="inject ten kinds of faults into stock DeepSpeed and Headway, and compare",
        examples=("headway chaos", "headway chaos --faults F1,F8 --seed 1"),
        arguments=_arguments,
        run=_chaos,
        order=90,
    ),
)
