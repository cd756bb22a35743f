"""Declaration of verbs: a package has a module `verbs` with a tuple `VERBS`, which `headway.launcher.cli` collects.

These modules are imported whenever `headway` starts, so they import the dependencies of a verb only when it is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments, for a verb that has none."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One word of the command line.

    `order`: position in the help in ascending order, below a heading of `GROUPS`. `examples`: complete commands, shown
    below the help; each verb and action that is not hidden needs one. `run` returns the exit status; a verb with
    `actions` has no `run`. A `hidden` verb is not listed in the help.
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
"""Headings of the help. Each contains the verbs whose `order` is at least its number and below the next one."""


def spec_arguments(
    parser: argparse.ArgumentParser, what: str = "spec", *, kind: str | None = None, keys_of: str = "spec"
) -> None:
    """Add SPEC [key=value ...], as `args.spec` (Path) and `args.overrides` (list).

    `what`: name of the file in the help. `kind`: kind of the file (default: `what`): spec, study, probe or corpus. The
    command line also searches for `args.spec` among the shipped files of that kind. `keys_of`: kind of file whose keys
    can be overridden, "spec" or "corpus", for shell completion.
    """
    parser.set_defaults(keys_of=keys_of, spec_kind=kind or what)
    parser.add_argument("spec", type=Path, help=f"YAML file of the {what}, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="value of a dotted key; overrides the file")


def quiet_argument(parser: argparse.ArgumentParser) -> None:
    """Add --quiet, as `args.quiet`; the command line applies it (`headway.launcher.base.console.output`)."""
    parser.add_argument("--quiet", action="store_true", help="print errors and the final result only")


def json_argument(parser: argparse.ArgumentParser) -> None:
    """Add --json, as `args.json`; the command line applies it (`headway.launcher.base.console.output`)."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON, everything else to stderr")


def output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --quiet and --json, for a verb that scripts call."""
    quiet_argument(parser)
    json_argument(parser)


def out_argument(parser: argparse.ArgumentParser) -> None:
    """Add --out FILE, as `args.out` (Path or None)."""
    parser.add_argument("--out", type=Path, default=None, help="file to which the JSON is written")
