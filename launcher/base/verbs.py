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

    `order`: place in the help, small ones first, below a heading of `GROUPS`. `examples`: whole commands, shown below
    the help; each verb and action that is not hidden needs one. `run` returns the exit status; a verb with `actions`
    has none of its own. A `hidden` verb is not in the help.
    """

    name: str
    help: str
    examples: tuple[str, ...] = ()
    arguments: Callable[[argparse.ArgumentParser], None] = no_arguments
    run: Callable[[argparse.Namespace], int] | None = None
    actions: tuple[Verb, ...] = ()
    order: int = 100
    hidden: bool = False


GROUPS = ((0, "before a run"), (30, "runs and studies"), (50, "speed"), (60, "after a run"), (90, "tools"))
"""Headings of the help: each holds the verbs whose `order` is at least its number, up to the next one."""


def spec_arguments(
    parser: argparse.ArgumentParser, what: str = "spec", *, kind: str | None = None, keys_of: str = "spec"
) -> None:
    """SPEC [key=value ...], as `args.spec` (Path) and `args.overrides` (list).

    `what` the file is, for the help. `kind` of the file (default: `what`): spec, study, probe or corpus. The command
    line looks for `args.spec` among the shipped files of that kind as well. `keys_of`: the kind of file whose keys the
    overrides are, "spec" or "corpus", for completion in shells.
    """
    parser.set_defaults(keys_of=keys_of, spec_kind=kind or what)
    parser.add_argument("spec", type=Path, help=f"YAML file of the {what}, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="value of a dotted key; overrides the file")


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
    parser.add_argument("--out", type=Path, default=None, help="file to which the JSON is written")
