"""Help and usage: each verb once, in a hundred columns, with an example that the real parser takes."""

from __future__ import annotations

import importlib.metadata
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headway.launcher.base.verbs import GROUPS, Verb
from headway.launcher.cli.main import main
from headway.launcher.cli.parser import MAX_WIDTH, all_verbs, make_parser

ROOT = Path(__file__).resolve().parents[3]
VISIBLE = [verb for verb in all_verbs() if not verb.hidden]
COMMANDS = [[verb.name] for verb in VISIBLE] + [[verb.name, action.name] for verb in VISIBLE for action in verb.actions]


def ends(verbs: list[Verb]) -> Iterator[tuple[str, Verb]]:
    """The verbs and actions that do something, with the words that call them."""
    for verb in verbs:
        for end in verb.actions or (verb,):
            yield f"headway {verb.name}" + (f" {end.name}" if verb.actions else ""), end


ENDS = list(ends(VISIBLE))


def help_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*words, "--help"]) == 0
    return capsys.readouterr().out


def test_the_help_lists_every_verb_once_with_its_actions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = help_of(capsys=capsys).splitlines()
    for verb in VISIBLE:
        assert [line.split()[0] for line in lines if line.startswith("  ")].count(verb.name) == 1, verb.name
        if verb.actions:
            actions = ", ".join(a.name for a in verb.actions)
            assert f"ACTION: {actions} " in " ".join([*" ".join(lines).split(), ""])  # long lists are wrapped
    text = "\n".join(lines)
    assert "positional arguments" not in text and "fork-server" not in text and "complete " not in text
    titles = [f"{title}:" for _, title in GROUPS]
    assert [line for line in lines if line in titles] == titles


def test_every_verb_is_below_one_heading() -> None:
    assert [first for first, _ in GROUPS] == sorted(first for first, _ in GROUPS)
    assert all(verb.order >= GROUPS[0][0] for verb in VISIBLE)


@pytest.mark.parametrize("words", [[], *COMMANDS], ids=" ".join)
def test_no_help_is_wider_than_a_hundred_columns(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = help_of(*words, capsys=capsys)
    assert max(map(len, text.splitlines())) <= MAX_WIDTH == 100
    assert text.count("usage:") == 1
    if words:
        assert "\nexamples:\n  headway " in text


@pytest.mark.parametrize(("command", "verb"), ENDS, ids=[command for command, _ in ENDS])
def test_every_verb_and_action_has_an_example_that_the_parser_takes(command: str, verb: Verb) -> None:
    assert verb.examples, f"{command} has no example"
    for example in verb.examples:
        assert example == command or example.startswith(f"{command} ")
        words = shlex.split(example)[1:]
        ended = next((i for i, word in enumerate(words) if word in (">", "&&")), len(words))
        args, rest = make_parser().parse_known_args(words[:ended])
        assert args.act is verb.run
        assert all("=" in word and not word.startswith("-") for word in rest)
        for word in words:
            if word.startswith("yaml/"):
                assert (ROOT / word).is_file(), f"{example}: no such file"


@pytest.mark.parametrize("words", [["fly"], [], ["study"], ["study", "fly"], ["train"], ["bench", "step", "--fast"]])
def test_a_wrong_command_line_prints_usage_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 64
    out, err = capsys.readouterr()
    assert not out and err.count("usage:") == 1 and err.count("error:") == 1
    assert "VERB" not in err.partition("error:")[2] and "ACTION" not in err.partition("error:")[2]


def test_an_unknown_option_shows_the_usage_of_its_own_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "x.yaml", "--fast"]) == 64
    assert capsys.readouterr().err.startswith("usage: headway bench step [-h]")


def test_an_unknown_verb_does_not_name_the_hidden_ones(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fly"])
    assert "fork-server" not in capsys.readouterr().err


def test_the_version_is_that_of_the_installation_with_the_commit_and_without_torch() -> None:
    code = (
        "import sys; from headway.launcher.cli.main import main; main(['--version']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    version = f"headway {importlib.metadata.version('headway')}"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if (ROOT / ".git").exists() and head.returncode == 0:
        assert done.stdout.rstrip("+)\n") == f"{version} ({head.stdout[:12]}"
    else:
        assert done.stdout == f"{version}\n"
