"""Syntax of other tools: `--key=value`, `--key value`, `+key=value`, other names of verbs and files.

Only unambiguous forms are accepted: an option with a dot in its name, which no verb has, and Hydra's `+`. All other
forms end with a message that shows the right form.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from headway.launcher.base.errors import printable
from headway.launcher.spec.aliases import alias, fold

_DOTTED = re.compile(r"--([A-Za-z_][\w-]*(?:\.[\w-]+)+)(=.*)?", re.DOTALL)
_ADDED = re.compile(r"\+{1,2}([A-Za-z_]\w*(?:\.\w+)*=.*)", re.DOTALL)
FILE_OPTIONS = frozenset(
    ["config", "configfile", "configpath", "configname", "configdir", "cfg", "spec", "yaml", "file", "study", "c", "f"]
)
"""Case-folded names of options that specify the file in other tools."""

VERBS = {
    "train": "fit pretrain start launch run resume continue finetune",
    "study run": "sweep experiment multirun sweep_run",
    "eval": "evaluate lm_eval",
    "bench step": "benchmark profile perf",
    "board": "tensorboard logs metrics dashboard monitor",
    "generate": "sample infer inference chat predict complete",
    "export": "convert_to_hf save push upload",
    "import": "convert_from_hf from_pretrained download",
    "convert": "uptrain mean_pool convert_checkpoint",
    "data build": "prepare prepare_data preprocess tokenize dataset",
    "plan": "estimate memory flops size params dry_run",
    "doctor": "env info check collect_env system",
    "checkpoint": "ckpt checkpoints",
    "ls": "list",
    "chaos": "faults fault drill",
    "--version": "version",
    "--help": "help",
}
"""Verb of Headway -> its names in other tools, separated by spaces."""


def verb_elsewhere(word: str) -> str:
    """The verb of Headway for the name in another tool; empty if none is known."""
    return next((verb for verb, names in VERBS.items() if fold(word) in map(fold, names.split())), "")


def split_dotted(words: Sequence[str], value_options: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Extract `--a.b=v` and `--a.b v` from a command line. Returns the remaining words, and the overrides `a.b=v`.

    Words after `--` are not changed, nor is the word after one of the `value_options`, because it may be its value. An
    option without a value gives the word `--a.b`, which is not an override.
    """
    rest: list[str] = []
    overrides: list[str] = []
    todo = list(words)
    while todo:
        word = todo.pop(0)
        match = _DOTTED.fullmatch(word)
        waits = rest and rest[-1].startswith("--") and any(option.startswith(rest[-1]) for option in value_options)
        if word == "--":
            rest += [word, *todo]
            break
        if match is None or waits or fold(match[1].rpartition(".")[2]) in FILE_OPTIONS:
            rest.append(word)
        elif match[2] is not None:
            overrides.append(match[1].replace("-", "_") + match[2])
        elif todo and not todo[0].startswith("-") and "=" not in todo[0]:
            overrides.append(f"{match[1].replace('-', '_')}={todo.pop(0)}")
        else:
            overrides.append(word)
    return rest, overrides


def plain(override: str) -> str:
    """`key=value` for Hydra's `+key=value` and `++key=value`; other words unchanged."""
    match = _ADDED.fullmatch(override)
    return match[1] if match else override


def misplaced_file(spec: Path, overrides: Sequence[str]) -> str | None:
    """Error message if an override was given in place of the file; None if the first word may be a file."""
    match = re.fullmatch(r"\+{0,2}([A-Za-z_]\w*(?:\.\w+)*)=.*", str(spec), re.DOTALL)
    if match is None or spec.exists():
        return None
    file = next((word for word in overrides if "=" not in word), "FILE")
    return f"the file stands before the values that are set; write {printable(file)} {match[1]}=... in this order"


def unknown_option(rest: Sequence[str], parser: argparse.ArgumentParser, *, takes_overrides: bool) -> str:
    """Error message for words that are neither options nor overrides. `rest`: at least one such word, in order."""
    i = next((i for i, word in enumerate(rest) if word.startswith("-")), None)
    if i is None:
        return f"unrecognized arguments: {printable(' '.join(rest), 200)}"
    name, equals, value = rest[i].partition("=")
    if not equals:
        behind = rest[i + 1] if i + 1 < len(rest) else ""
        value = behind if behind and not behind.startswith("-") and "=" not in behind else "VALUE"
    shown = printable(name)
    options = [option for action in parser._actions for option in action.option_strings]
    bare = name.lstrip("-")
    last = fold(bare.rpartition(".")[2])
    if takes_overrides and last in FILE_OPTIONS:
        return f"unrecognized option {shown}: the file is given without an option, {parser.prog} FILE"
    if close := difflib.get_close_matches(name, options, n=1, cutoff=0.75):
        return f"unrecognized option {shown}. Did you mean {close[0]}?"
    if not takes_overrides or not bare:
        return f"unrecognized arguments: {printable(' '.join(rest), 200)}"
    entry = alias(bare)
    if entry is not None and entry.hint:
        return f"unrecognized option {shown}. {entry.hint} Values are written KEY=VALUE behind the file"
    key = entry.keys[0] if entry is not None else bare.replace("-", "_")
    why = "" if entry is not None else "if it is a value of the spec, "
    return f"unrecognized option {shown}; {why}write {printable(f'{key}={value}')} behind the file, without dashes"
