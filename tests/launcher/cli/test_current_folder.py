"""A current folder that was deleted ends every verb with one message, before a library is loaded that needs it."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headway.launcher.cli.main import main
from headway.launcher.cli.parser import make_parser


def verbs(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Words of a command for every verb, with any word for each argument that it needs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return [found for name, child in action.choices.items() for found in verbs(child, (*words, name))]
    more: list[str] = []
    for action in parser._actions:
        if action.option_strings:
            more += [action.option_strings[-1], next(iter(action.choices or ["x"]))] if action.required else []
        elif action.nargs in (None, "+"):
            more.append(next(iter(action.choices or ["1"])))
    return [(*words, *more)]


@pytest.fixture
def gone(tmp_path, monkeypatch):
    """The current folder is one that does not exist any more."""
    (tmp_path / "gone").mkdir()
    before = Path.cwd()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    yield
    os.chdir(before)


@pytest.mark.parametrize("words", verbs(make_parser()), ids=" ".join)
def test_every_verb_says_that_the_current_folder_is_gone(words, gone, capsys):
    assert main(list(words)) == 66
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: the current folder cannot be used .*deleted.*`cd`.*\n", said), said


@pytest.mark.parametrize("words", [["doctor"], ["train", "quickstart", "train.tokens=1e3"]], ids=lambda words: words[0])
def test_doctor_and_train_end_before_they_load_libraries(words, tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    command = [sys.executable, "-P", "-m", "headway.launcher", *words]
    text = f'rmdir "{folder}"; exec "$@"'
    done = subprocess.run(["sh", "-c", text, "sh", *command], cwd=folder, capture_output=True, text=True, timeout=100)
    assert done.returncode == 66, done.stderr
    assert done.stderr.startswith("error: the current folder cannot be used") and done.stderr.count("\n") == 1


def test_help_and_version_need_no_folder(gone, capsys):
    assert main(["train", "--help"]) == 0 and "key=value" in capsys.readouterr().out
