"""The argument parser of `headway`, made of what the rooms declare."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from headway.launcher.base.console import marked
from headway.launcher.base.verbs import Verb

_ABOUT = "Headway pretrains language models to find out which attention mechanism is worth its cost."
_OVERRIDES = (
    "Any spec value can be set after the file: headway train spec.yaml optimizer.lr=1e-3 attention.top_k=2\n"
    "headway VERB --help explains a verb and shows examples."
)


def all_verbs() -> list[Verb]:
    """Every verb of every room, in the order of the help."""
    launcher = Path(__file__).resolve().parents[1]
    rooms = sorted(file.parent.name for file in launcher.glob("*/verbs.py") if file.parent.name != "base")
    modules = [importlib.import_module(f"headway.launcher.{room}.verbs") for room in rooms]
    return sorted((verb for module in modules for verb in module.VERBS), key=lambda verb: (verb.order, verb.name))


class Parser(argparse.ArgumentParser):
    """Says which word was probably meant, and does not call the optional key=value arguments required."""

    def error(self, message: str) -> NoReturn:
        message = message.removesuffix(", key=value")
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong and (close := difflib.get_close_matches(wrong[1], re.findall(r"[\w-]+", wrong[2]), n=1)):
            message += f". Did you mean {close[0]}?"
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {marked(f'error: {message}', sys.stderr)}\n")


def make_parser() -> Parser:
    """The whole command line. A parsed namespace has `act`, the function of the verb that was named."""
    verbs = all_verbs()
    parser = Parser(
        prog="headway",
        description=_description(verbs),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add(parser, verbs, dest="verb", words=["headway"])
    return parser


def _add(parser: argparse.ArgumentParser, verbs: Iterable[Verb], *, dest: str, words: list[str]) -> None:
    verbs = list(verbs)
    shown = "|".join(verb.name for verb in verbs if not verb.hidden)
    children = parser.add_subparsers(dest=dest, metavar=shown, required=True)
    for verb in verbs:
        about = {} if verb.hidden else {"help": verb.help}
        child = children.add_parser(
            verb.name,
            description=verb.help[:1].upper() + verb.help[1:] + ("" if verb.help.endswith(".") else "."),
            epilog=_examples(verb),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **about,
        )
        verb.arguments(child)
        if verb.actions:
            _add(child, verb.actions, dest="action", words=[*words, verb.name])
        else:
            assert verb.run is not None, verb.name
            child.set_defaults(act=verb.run)


def _description(verbs: Iterable[Verb]) -> str:
    rows = list(_rows(verbs))
    wide = max(len(left) for left, _ in rows)
    return "\n".join([_ABOUT, "", *(f"  {left:<{wide}}  {right}" for left, right in rows), "", _OVERRIDES])


def _rows(verbs: Iterable[Verb]) -> Iterator[tuple[str, str]]:
    for verb in verbs:
        if not verb.hidden:
            actions = " " + "|".join(action.name for action in verb.actions) if verb.actions else ""
            yield f"headway {verb.name}{actions}", verb.help


def _examples(verb: Verb) -> str | None:
    examples = [*verb.examples, *(line for action in verb.actions for line in action.examples)]
    return "\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else None
