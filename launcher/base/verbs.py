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


def spec_arguments(parser: argparse.ArgumentParser, what: str = "spec", *, kind: str | None = None) -> None:
    """SPEC [key=value ...], as `args.spec` (Path) and `args.overrides` (list).

    `kind` of the file (default: `what`): spec, study, probe or corpus. The command line looks for `args.spec` among the
    shipped files of that kind as well.
    """
    parser.add_argument("spec", type=Path, help=f"YAML file of the {what}, or the name of a shipped one")
    parser.set_defaults(spec_kind=kind or what)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, override the file")


def json_argument(parser: argparse.ArgumentParser) -> None:
    """--json, as `args.json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def out_argument(parser: argparse.ArgumentParser) -> None:
    """--out FILE, as `args.out` (Path or None)."""
    parser.add_argument("--out", type=Path, default=None, help="where the JSON is written")
