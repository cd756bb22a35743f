"""How a room declares its verbs: a module `verbs` with a tuple `VERBS`, which `headway.launcher.cli` collects.

These modules are imported whenever `headway` starts, so they import what a verb needs only when it is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """For a verb that takes none."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One word of the command line.

    `order`: place in the help, small ones first. `examples`: whole commands, shown below the help. `run` returns the
    exit status; a verb with `actions` has none of its own. A `hidden` verb is not in the help.
    """

    name: str
    help: str
    examples: tuple[str, ...] = ()
    arguments: Callable[[argparse.ArgumentParser], None] = no_arguments
    run: Callable[[argparse.Namespace], int] | None = None
    actions: tuple[Verb, ...] = ()
    order: int = 100
    hidden: bool = False


def spec_arguments(parser: argparse.ArgumentParser, what: str = "spec") -> None:
    """SPEC [key=value ...], as `args.spec` (Path) and `args.overrides` (list)."""
    parser.add_argument("spec", type=Path, help=f"YAML file of the {what}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, override the file")


def quiet_argument(parser: argparse.ArgumentParser) -> None:
    """--quiet, as `args.quiet`; the command line applies it (`headway.launcher.base.console.output`)."""
    parser.add_argument("--quiet", action="store_true", help="print errors and the final result only")


def json_argument(parser: argparse.ArgumentParser) -> None:
    """--json, as `args.json`; the command line applies it (`headway.launcher.base.console.output`)."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON, everything else to stderr")


def output_arguments(parser: argparse.ArgumentParser) -> None:
    """--quiet and --json, for a verb that scripts call."""
    quiet_argument(parser)
    json_argument(parser)


def out_argument(parser: argparse.ArgumentParser) -> None:
    """--out FILE, as `args.out` (Path or None)."""
    parser.add_argument("--out", type=Path, default=None, help="where the JSON is written")
