"""`headway plan`."""

from __future__ import annotations

import argparse

from headway.launcher.base.numbers import whole
from headway.launcher.base.verbs import Verb, output_arguments, spec_arguments


def _arguments(parser: argparse.ArgumentParser) -> None:
    spec_arguments(parser)
    parser.add_argument(
        "--gpus", type=whole(1, 32_768), default=None, metavar="N", help="search for the best layouts on N GPUs"
    )
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="GPU to plan for (default h100)")
    parser.add_argument("--network", default="ndr", metavar="NAME", help="network between the hosts (default ndr)")
    output_arguments(parser)


def _plan(args: argparse.Namespace) -> int:
    from headway.launcher.plan.planner import plan

    options = {"gpus": args.gpus, "gpu": args.gpu, "network": args.network}
    return plan(args.spec, args.overrides, **options, as_json=args.json)


VERBS = (
    Verb(
        name="plan",
        help="compute parameters, memory, communication and expected speed, without training",
        examples=("headway plan yaml/base/quickstart.yaml", "headway plan yaml/models/3b.yaml --gpus 64"),
        arguments=_arguments,
        run=_plan,
        order=20,
    ),
)
