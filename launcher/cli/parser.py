"""The argument parser of `headway`, built from the verbs that the packages of launcher declare."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from headway.launcher.base.console import marked
from headway.launcher.base.verbs import GROUPS, Verb
from headway.launcher.cli.words import verb_elsewhere

MAX_WIDTH = 100
"""Maximum width of a help text, in columns."""

_ABOUT = "Headway pretrains language models to find out which attention mechanism is worth its cost."
_OVERRIDES = (
    "Values of the spec can follow the file: headway train spec.yaml optimizer.lr=1e-3 attention.top_k=2\n"
    "headway VERB --help explains a verb and shows examples; --version prints the version."
)


def all_verbs() -> list[Verb]:
    """All verbs of all packages, in the order of the help."""
    launcher = Path(__file__).resolve().parents[1]
    rooms = sorted(file.parent.name for file in launcher.glob("*/verbs.py") if file.parent.name != "base")
    modules = [importlib.import_module(f"headway.launcher.{room}.verbs") for room in rooms]
    return sorted((verb for module in modules for verb in module.VERBS), key=lambda verb: (verb.order, verb.name))


class Parser(argparse.ArgumentParser):
    """Parser that suggests the closest word, and does not report the optional key=value arguments as required.

    `words`: the visible verbs, or actions of a verb, one of which must follow; empty if arguments follow. `about`:
    description in one line.
    """

    def __init__(self, *args: Any, words: Sequence[str] = (), about: str = "", **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=_Formatter, **kwargs)
        self.words = tuple(words)
        self.about = about

    def error(self, message: str) -> NoReturn:
        message = message.removesuffix(", key=value")
        wrong = re.search(r"argument (.*): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong and wrong[1] in ("VERB", "ACTION"):
            message = self._unknown_word(wrong[2])
        elif wrong and (close := difflib.get_close_matches(wrong[2], re.findall(r"[\w-]+", wrong[3]), n=1)):
            message += f". Did you mean {close[0]}?"
        elif message.endswith((": VERB", ": ACTION")):
            message = message.rpartition(" ")[0] + " " + "|".join(self.words)
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {marked(f'error: {message}', sys.stderr)}\n")

    def _unknown_word(self, word: str) -> str:
        close = difflib.get_close_matches(word, self.words, n=1)
        meant = verb_elsewhere(word) if self.prog == "headway" else ""
        hint = f" Did you mean {close[0]}?" if close else f" Did you mean {meant}?" if meant else ""
        return f"{word!r} is not known after {self.prog}.{hint} Choose from {', '.join(self.words)}"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=_width())


class _Version(argparse.Action):
    """--version: determines the version only when the option is given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from headway.launcher.cli.version import version_line

        print(version_line())
        parser.exit()


def make_parser() -> Parser:
    """The parser of the whole command line.

    A parsed namespace has `act`, the function of the verb, and `parser`, the parser of the verb with its usage.
    """
    verbs = all_verbs()
    parser = Parser(
        prog="headway",
        usage="headway [-h] [--version] VERB ...",
        description="\n".join([_ABOUT, *_groups(verbs), "", _OVERRIDES]),
        words=_visible(verbs),
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version, and the commit of a checkout")
    _add(parser, verbs, dest="verb", words=["headway"])
    return parser


def value_options(parser: argparse.ArgumentParser) -> set[str]:
    """Options of a parser and of all its subparsers that take a value."""
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*(value_options(child) for child in action.choices.values()))
        elif action.nargs != 0:
            found.update(action.option_strings)
    return found


def _add(parser: Parser, verbs: Iterable[Verb], *, dest: str, words: list[str]) -> None:
    # the description contains the list of verbs; argparse would print it a second time
    options = {"dest": dest, "metavar": dest.upper(), "required": True, "help": argparse.SUPPRESS}
    children = parser.add_subparsers(prog=" ".join(words), **options)
    for verb in verbs:
        path = [*words, verb.name]
        about = verb.help[:1].upper() + verb.help[1:] + ("" if verb.help.endswith(".") else ".")
        listing = ["", "actions:", *_rows((a.name, a.help) for a in verb.actions)] if verb.actions else []
        child = children.add_parser(
            verb.name,
            usage=f"{' '.join(path)} [-h] ACTION ..." if verb.actions else None,
            description="\n".join([*textwrap.wrap(about, _width()), *listing]),
            epilog=_examples(verb),
            words=_visible(verb.actions),
            about=verb.help,
        )
        child.set_defaults(parser=child)
        verb.arguments(child)
        if verb.actions:
            _add(child, verb.actions, dest="action", words=path)
        else:
            assert verb.run is not None, verb.name
            child.set_defaults(act=verb.run)


def _visible(verbs: Iterable[Verb]) -> list[str]:
    return [verb.name for verb in verbs if not verb.hidden]


def _groups(verbs: Sequence[Verb]) -> Iterator[str]:
    """Lines with the verbs and their actions, under the headings of `GROUPS`."""
    shown = [verb for verb in verbs if not verb.hidden]
    wide = max(len(verb.name) for verb in shown)
    for i, (first, title) in enumerate(GROUPS):
        end = GROUPS[i + 1][0] if i + 1 < len(GROUPS) else None
        inside = [verb for verb in shown if first <= verb.order and (end is None or verb.order < end)]
        if inside:
            yield from ("", f"{title}:")
        for verb in inside:
            yield from _rows([(verb.name, verb.help)], wide)
            if verb.actions:
                yield from _rows([("", "ACTION: " + ", ".join(_visible(verb.actions)))], wide)


def _rows(rows: Iterable[tuple[str, str]], wide: int = 0) -> Iterator[str]:
    """Lines `  name  help`, with the help wrapped and aligned."""
    rows = list(rows)
    wide = wide or max(len(left) for left, _ in rows)
    for left, right in rows:
        lines = textwrap.wrap(right, max(20, _width() - wide - 4)) or [""]
        for i, line in enumerate(lines):
            yield f"  {'' if i else left:<{wide}}  {line}"


def _width() -> int:
    return min(MAX_WIDTH, max(60, shutil.get_terminal_size().columns))


def _examples(verb: Verb) -> str | None:
    examples = [*verb.examples, *(line for action in verb.actions for line in action.examples)]
    return "\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else None
