"""Measure an older checkout and this one in turns: start-up, cells, builds, records, saves and decoding.

    PYTHONPATH=tests/speed python -P tests/speed/before_after.py --before FOLDER --out docs/results/bench/rows

FOLDER is a checkout of an older commit with its own environment in `.venv`, for example

    git worktree add FOLDER 55af983 && python3 -m venv FOLDER/.venv && FOLDER/.venv/bin/pip install -e FOLDER

Each round runs both checkouts; the order alternates. Writes OUT.json (every value) and OUT.md (the table). Subjects
that OUT.json holds already are kept unless they are named. Not a test module.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import Build, Cells, Decode, Faults, HuggingFace, Saves, Start, Step, Subject, Verify
from tree import Tree

from headway.launcher.base.spread import spread
from headway.launcher.run.machine import git_commit, machine, versions

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two sides of a comparison. `newer`: both run in the newer checkout and differ in a key."""

    before: Subject
    after: Subject
    rounds: int
    newer: bool = False


def both(subject: Subject, rounds: int) -> Pair:
    return Pair(before=subject, after=subject, rounds=rounds)


def keys(row: int, size: str, before: list[str], after: list[str], rounds: int = 3) -> Pair:
    what = f"{before[-1]} -> {after[-1]}"
    sides = (Step(row, what, words, size=size) for words in (before, after))
    return Pair(before=next(sides), after=next(sides), rounds=rounds, newer=True)


SUBJECTS: dict[str, Pair] = {
    "cells": both(Cells(), 3),
    "start": both(Start(), 5),
    "faults": both(Faults(), 3),
    **{f"engine-{s}": keys(4, s, ["parallel.engine=deepspeed"], ["parallel.engine=auto"]) for s in Step.SIZES},
    **{f"compile-{s}": keys(12, s, ["speed.compile=none"], ["speed.compile=block"]) for s in Step.SIZES},
    **{f"bf16-{s}": keys(5, s, ["parallel.precision=fp32"], ["parallel.precision=bf16"]) for s in Step.SIZES},
    "build": both(Build(), 3),
    "verify": both(Verify(), 5),
    "saves": both(Saves(), 3),
    "decode": both(Decode(), 3),
    "huggingface": Pair(before=HuggingFace("theirs"), after=HuggingFace("ours"), rounds=3, newer=True),
}


def measure(name: str, pair: Pair, before: Tree, after: Tree, rounds: int) -> dict[str, Any]:
    """All rounds of a subject. Returns value spreads and ratios by the name of the number."""
    found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="headway-speed-") as temporary:
        sides = {
            "before": (pair.before, after if pair.newer else before),
            "after": (pair.after, after),
        }
        for side, (subject, tree) in sides.items():
            folder = Path(temporary) / side
            folder.mkdir()
            subject.prepare(tree, folder)
        for number in range(rounds):
            for side in ("before", "after") if number % 2 == 0 else ("after", "before"):
                subject, tree = sides[side]
                values = subject.round(tree, Path(temporary) / side, number)
                found[side].append(values)
                print(f"{name} {number + 1}/{rounds} {side:<6} {_short(values)}", flush=True)
    result: dict[str, Any] = {"load_average_at_start": load, "one_checkout": pair.newer, "numbers": {}}
    for row in pair.after.rows:
        old, new = ([values[row.key] for values in found[side]] for side in ("before", "after"))
        result["numbers"][row.key] = {
            **{"row": row.row, "what": row.what, "unit": row.unit, "goal": row.goal},
            **{"before": spread(old), "after": spread(new)},
            "after_over_before": spread([b / a for a, b in zip(old, new, strict=True)]),
            "raw": {"before": old, "after": new},
        }
    return result


def _short(values: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.4g}" for key, value in values.items())


def table(measured: dict[str, Any]) -> str:
    """Markdown: one line for each number, in the order of its row."""
    lines = [
        "| row | what | before | after | after / before | goal |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    numbers = [n for subject in measured.values() for n in subject["numbers"].values()]
    for n in sorted(numbers, key=lambda n: (n["row"], n["what"])):
        cells = (_cell(n["before"], n["unit"]), _cell(n["after"], n["unit"]), _cell(n["after_over_before"], "x"))
        goal = "" if n["goal"] is None else f"<= {_value(n['goal'], n['unit'])}"
        lines.append(f"| {n['row']} | {n['what']} | {' | '.join(cells)} | {goal} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, float], unit: str) -> str:
    """Median and quartiles."""
    if unit == "bytes":
        found, unit = {key: value / 1e6 for key, value in found.items()}, "MB"
    return f"{_value(found['median'], unit)} ({_value(found['q1'])}..{_value(found['q3'])})"


def _value(value: float, unit: str = "") -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def commit_of(tree: Tree) -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tree.root, check=True, capture_output=True, text=True
    ).stdout.strip()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of an older commit")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.md are written")
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join(SUBJECTS)}")
    parser.add_argument("--rounds", type=int, help="of each subject, instead of its own number")
    args = parser.parse_args(words)
    before, after = Tree(root=args.before.resolve()), Tree(root=ROOT)
    file = args.out.with_suffix(".json")
    measured = json.loads(file.read_text(encoding="utf-8"))["subjects"] if file.exists() else {}
    for name in args.only.split(",") if args.only else SUBJECTS:
        measured[name] = measure(name, SUBJECTS[name], before, after, args.rounds or SUBJECTS[name].rounds) | {
            "commits": {"before": commit_of(before), "after": git_commit()}
        }
        result = {
            "kind": "before_after",
            "command": "PYTHONPATH=tests/speed python -P tests/speed/before_after.py --before FOLDER --out "
            "docs/results/bench/rows",
            "versions": versions(),
            "machine": machine(),
            "subjects": {name: measured[name] for name in SUBJECTS if name in measured},
        }
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(table(result["subjects"]), encoding="utf-8")


if __name__ == "__main__":
    main()
