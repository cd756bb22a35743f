"""Format the results of a drill as a table, for the console and for docs/results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headway.launcher.chaos.faults import FAULTS
from headway.launcher.chaos.verdict import RULE, Readings, Trial

_ABOUT = """Setting: two processes on the CPU (gloo), ZeRO-1, bf16, {steps} steps, a checkpoint after every step \
unless stated otherwise. The models have about the same size ({stock_bytes} and {headway_bytes} bytes per checkpoint). \
Stock DeepSpeed is a loop around its own `save_checkpoint` and `load_checkpoint` with their defaults and the \
documented timeout of `init_distributed`. It runs under torchrun in F3. In all other faults it runs under Headway's \
fork server, so that a start takes a second, without restarts (torchrun's default). Headway is `headway train` with \
the default restart budget (without restarts in F2)."""


def table(trials: Sequence[Trial], readings: Sequence[Readings], sides: Sequence[str]) -> str:
    """One row for each fault that was tried, in Markdown."""
    lines = ["| | fault | " + " | ".join(sides) + " |", "|---|---|" + "---|" * len(sides)]
    for fault in FAULTS:
        rows = [t for t in trials if t.fault == fault.key]
        if rows:
            cells = [_cell([t for t in rows if t.side == side]) for side in sides]
            lines.append(f"| {fault.key} | {fault.title} | " + " | ".join(cells) + " |")
        found = {r.side: r for r in readings if r.fault == fault.key}
        if found:
            what = "truncated to random lengths" if fault.key == "F7" else "with one random bit flipped"
            cells = [_reading(found[side]) for side in sides]
            lines.append(f"| {fault.key} | files {what}, read without training | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(trials: Sequence[Trial]) -> str:
    """Counts of the verdicts, their reasons, and the facts of this kind of fault."""
    kinds = Counter(t.verdict.kind for t in trials)
    parts = [f"{kinds['resumed']} of {len(trials)} resumed"]
    for kind, shown in (("wrong", "**wrong**"), ("stopped", "stopped")):
        why = Counter(t.verdict.why for t in trials if t.verdict.kind == kind)
        reasons = "; ".join(
            f"{count} x {_plain(text)}" if len(why) > 1 else _plain(text) for text, count in why.items()
        )
        if kinds[kind]:
            parts.append(f"{kinds[kind]} {shown} ({reasons})")
    facts = [shown for name, text in _FACTS.items() if (shown := _fact(trials, name, text))]
    return "; ".join([*parts, *facts])


_FACTS = {
    "noticed_s": "noticed after {} s",
    "gone_s": "its ranks ended after {} s",
    "exit": "exit status {}",
    "steps_lost": "{} steps lost",
    "training_went_on": "training continued: {}",
}


def _fact(trials: Sequence[Trial], name: str, text: str) -> str | None:
    words = {True: "yes", False: "no"}
    values = [t.facts[name] for t in trials if t.facts.get(name) is not None]
    shown = [words[v] if isinstance(v, bool) else str(v) for v in values]
    return text.format(", ".join(dict.fromkeys(shown))) if shown else None


def _reading(r: Readings) -> str:
    total = r.refused + r.changed + r.equal
    wrong = f"**{r.changed} of {total} read with another value without an error**" if r.changed else ""
    good = f"{r.refused} of {total} refused" + (f", {r.equal} changed no value" if r.equal else "")
    return "; ".join(part for part in (wrong, good) if part)


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def about(facts: dict[str, Any]) -> str:
    """Setting of the drill and meaning of the verdicts."""
    return _ABOUT.format(**facts) + "\n\n" + RULE


def write(out: Path, result: dict[str, Any], shown: str) -> None:
    """Write the JSON file, and the table as Markdown beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = result["machine"]
    foot = (
        f"{result['trials_done']} trials in {result['seconds']:.0f} s. Written by `{result['command']}` "
        f"at commit {result['commit']}; {versions}; {machine['cpu']}, {machine['cores']} cores."
    )
    text = f"# Faults in stock DeepSpeed and Headway\n\n{shown}\n\n{about(result['setting'])}\n\n{foot}\n"
    out.with_suffix(".md").write_text(text)


def rows(trials: Sequence[Trial], readings: Sequence[Readings]) -> dict[str, Any]:
    """Every trial and reading, for the JSON file."""
    return {"trials": [t.record() for t in trials], "readings": [asdict(r) for r in readings]}
