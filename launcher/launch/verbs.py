"""`headway train`."""

from __future__ import annotations

import argparse

from headway.launcher.base.errors import SpecError
from headway.launcher.base.numbers import whole
from headway.launcher.base.verbs import Verb, output_arguments, spec_arguments


def _arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser)
    parser.add_argument(
        "--extend",
        action="store_true",
        help="train the run of the spec to more train.tokens, as a branch in RUN_DIR-TOKENS",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what each host would execute, and exit")
    parser.add_argument(
        "--node-rank",
        type=whole(0, 4095),
        default=None,
        metavar="N",
        help="number of this host among launch.hosts, from 0",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print every value and where it comes from, and exit"
    )
    output_arguments(parser)


def _train(args: argparse.Namespace) -> int:
    if args.extend:
        from headway.launcher.base import console
        from headway.launcher.run.extending import extension, with_overrides
        from headway.launcher.spec.load import load_spec

        overrides, what = extension(load_spec(args.spec, args.overrides, no_auto=None).spec)
        args.overrides = with_overrides(args.overrides, overrides)
        console.note(what)
    if args.print_config:
        from headway.launcher.base import console
        from headway.launcher.spec.load import format_config, load_spec

        loaded = load_spec(args.spec, args.overrides, no_auto=None)
        if args.json:
            console.emit(loaded.spec.model_dump(mode="json"))
        else:
            console.result(format_config(loaded))
        return 0
    if args.dry_run and args.json:
        raise SpecError("--json: a dry run has no result but its text; leave out --json, or --dry-run")
    from headway.launcher.launch.start import train

    return train(args.spec, args.overrides, node_rank=args.node_rank, dry_run=args.dry_run)


VERBS = (
    Verb(
        name="train",
        help="train one spec; the same command again continues the run",
        examples=(
            "headway train yaml/base/quickstart.yaml",
            "headway train yaml/base/quickstart.yaml optimizer.lr=1e-3 --print-config",
            "headway train yaml/base/quickstart.yaml --dry-run",
            "headway train yaml/base/quickstart.yaml train.tokens=409600 --extend",
        ),
        arguments=_arguments,
        run=_train,
        order=30,
    ),
)
