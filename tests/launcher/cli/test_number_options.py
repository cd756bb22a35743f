"""Every number that an option takes has a range: outside of it, the command ends with 64 before it reads a file."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator

import pytest

from headway.launcher.base import numbers
from headway.launcher.cli.main import main
from headway.launcher.cli.parser import make_parser

TRIED = ("0", "-1", "nan", "inf", "-inf", "1e30", "1" + "0" * 30, "0.5", "x", "")
LEGAL = {
    "--array-limit": (),
    "--batches": (),
    "--beams": (),
    "--documents": (),
    "--gpus": (),
    "--jobs": (),
    "--kv-heads": (),
    "--length-penalty": ("0", "0.5"),
    "--lengths": (),
    "--limit": (),
    "--margin": ("0.5",),
    "--max-shard-bytes": (),
    "--minutes": ("0.5",),
    "--new": (),
    "--new-tokens": (),
    "--node-rank": ("0",),
    "--port": ("0",),
    "--power": ("0.5",),
    "--recall": (),
    "--rounds": (),
    "--seconds": ("0.5",),
    "--seed": ("0",),
    "--shots": ("0",),
    "--step": ("0",),
    "--steps": (),
    "--temperature": ("0", "0.5"),
    "--tokens": (),
    "--top-p": ("0.5",),
    "element": ("0",),
    "owner": (),
    "part": ("0",),
}
"""Option -> those of `TRIED` that it takes."""

FILES = {
    "element": "0",
    "part": "0",
    "spec": "absent.yaml",
    "socket": "absent",
    "runs": "absent",
    "run": "absent",
    "folder": "absent",
    "out": "x",
    "path": "absent",
}


def leaves(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """(words, parser) of every verb without actions, hidden ones included."""
    children = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not children:
        yield words, parser
    for action in children:
        for name, child in action.choices.items():
            yield from leaves(child, (*words, name))


def name_of(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else action.dest


def is_number(action: argparse.Action) -> bool:
    default = action.default[0] if isinstance(action.default, list) and action.default else action.default
    ours = getattr(action.type, "__module__", "") == numbers.__name__
    return ours or action.type in (int, float) or (isinstance(default, int | float) and action.nargs != 0)


NUMBERS = [
    (words, parser, action)
    for words, parser in leaves(make_parser())
    for action in parser._actions
    if is_number(action)
]


def test_every_number_has_a_range_and_is_tried() -> None:
    assert {name_of(action) for _, _, action in NUMBERS} == set(LEGAL)
    for words, _, action in NUMBERS:
        assert getattr(action.type, "__module__", "") == numbers.__name__, (words, name_of(action))


def full_command(
    words: tuple[str, ...], parser: argparse.ArgumentParser, tried: argparse.Action, value: str
) -> list[str]:
    """A complete command of the verb, whose other values are legal and whose files do not exist."""
    command = list(words)
    for action in parser._actions:
        if action is tried:
            command += [f"{name_of(action)}={value}"] if action.option_strings else [value]
        elif action.option_strings and action.required:
            command += [name_of(action), str(next(iter(action.choices or ["new"])))]
        elif not action.option_strings and action.nargs in (None, "+"):
            command.append(FILES.get(action.dest, "word"))
    return command


@pytest.mark.parametrize(
    ("words", "parser", "action"), NUMBERS, ids=[" ".join([*w, name_of(a)]) for w, _, a in NUMBERS]
)
def test_numbers_out_of_range_are_refused_before_a_file_is_read(words, parser, action, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # What follows a legal value is not of interest here, and takes minutes in some verbs.
    started: list[argparse.Namespace] = []
    monkeypatch.setattr("headway.launcher.cli.main._run", lambda args: started.append(args) or 0)
    for value in TRIED:
        if value == "-inf" and not action.option_strings:
            continue  # argparse takes it for options
        started.clear()
        code = main(full_command(words, parser, action, value))
        said = capsys.readouterr().err
        if value in LEGAL[name_of(action)]:
            assert (code, len(started)) == (0, 1), (value, said)
            continue
        assert (code, started) == (64, []), (value, said)
        assert f"argument {name_of(action)}" in said and re.search(
            r"use (one|a (whole )?number) (from|above) ", said
        ), said


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (numbers.whole(2, 5), ["2", "5"], ["1", "6", "2.0", "nan", "9" * 5000]),
        (numbers.whole_list(2, 5), ["2,3", "5"], ["", "2,", "2,6", "1"]),
        (numbers.real(most=1), ["1", "1e-300"], ["0", "-0.0", "1.0000001", "nan", "inf"]),
        (numbers.real(least=0, most=1), ["0", "-0.0", "1"], ["-1e-300", "nan", "-inf"]),
        (numbers.real(above=2, most=3), ["2.1", "3"], ["2", "3.1"]),
    ],
)
def test_ranges_include_their_limits_and_nothing_else(kind, right, wrong) -> None:
    for text in right:
        kind(text)
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


# ---------------------------------------------------------------- what a legal number gives


@pytest.mark.parametrize("gpus", ["1", "8", "32768"])
def test_every_legal_number_of_gpus_gives_speeds_above_zero_or_says_why_not(headway, capsys, gpus):
    assert main(["plan", str(headway.spec), "--gpus", gpus, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["search"]
    assert found["best"] or found["illegal"]
    for layout in found["best"]:
        assert 0 < layout["tokens_per_s_estimated"][0] <= layout["tokens_per_s_estimated"][1]
    assert main(["plan", str(headway.spec), "--gpus", gpus]) == 0
    said = capsys.readouterr().out
    assert found["best"] or ("is legal; use fewer GPUs" in said and "not legal: " in said)


def test_a_plan_on_a_cpu_states_no_speed_of_a_gpu(headway, capsys):
    assert main(["plan", str(headway.spec), "launch.device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "tokens/s, estimated" in said and "none on a CPU" in said and "headway bench step" in said
    assert not re.search(r"h100|MFU|whole training|\bdays\b", said), said
    assert main(["plan", str(headway.spec), "launch.device=cpu", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens_per_s_estimated"] is figures["fits"] is figures["gpu"] is None
    assert figures["memory_bytes"]["peak"] > 0 and any("launch.device is cpu" in w for w in figures["warnings"])
    assert main(["plan", str(headway.spec), "launch.device=cpu", "--gpus", "8"]) == 64
    assert "launch.device=cuda" in capsys.readouterr().err


def test_a_short_training_is_planned_in_a_unit_that_fits(headway, capsys):
    assert main(["plan", str(headway.spec), "launch.device=cuda"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "whole training" in line]
    low, high = map(float, re.findall(r"[\d.]+", line)[:2])
    assert 0 < low <= high and "seconds" in line and "e-" not in line
