"""`headway probe report`: probe.md, probe.html, probe.csv and a figure, from the records of the cells of all tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headway.data.config import SyntheticSource
from headway.data.synthetic import SyntheticTask
from headway.launcher.base.errors import SpecError
from headway.launcher.compare.analyse import CellResult, StudyResult, VariantResult, analyse
from headway.launcher.match.matching import quantity_words
from headway.launcher.report.charts import Axis, Chart, Panel, Series
from headway.launcher.report.page import Block, Heading, Image, Items, Table, Text, to_html, to_markdown
from headway.launcher.report.plots.chart import draw
from headway.launcher.report.plots.study import Plot, save
from headway.launcher.report.plots.style import GREY, STYLE, styles
from headway.launcher.report.study import report
from headway.launcher.report.tables import write_csv, write_text
from headway.launcher.run.run_dir import read_mapping

SOLVED = 0.99
"""Minimum accuracy on the validation tokens at which a task counts as solved."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The study of one task. `chance`: accuracy of the best guess without memory of earlier tokens."""

    name: str
    result: StudyResult
    source: SyntheticSource
    chance: float
    seq_len: int

    def cells(self, variant: str) -> list[CellResult]:
        """Finished and validated cells of a variant, in the order of seeds."""
        return [c for c in self.result.cells if c.variant == variant and c.done and c.record.accuracy.size]


def probe_report(out: Path) -> Path:
    """Write the table of a folder of probe tasks and the report of every task. Returns the path of probe.html.

    Raises SpecError if the folder does not contain probe tasks, or no task was started.
    """
    record = read_mapping(out / "probe.json")
    if record.get("format") != 1:
        raise SpecError(f"{out}: has no readable probe.json; run the probe tasks, or name the folder they were run in")
    begun = [name for name in record["tasks"] if (out / name / "study.json").exists()]
    if not begun:
        raise SpecError(f"{out}: no task was begun; run the probe tasks, or name the folder they were run in")
    tasks = [_task(name, out / name) for name in begun]
    for task in tasks:
        report(task.result.out)
    plot = _draw(tasks, out)
    blocks = list(_blocks(record, tasks, [n for n in record["tasks"] if n not in begun], plot))
    write_text(out / "probe.md", to_markdown(blocks))
    title = f"Probe tasks {record['probe']}"
    write_text(out / "probe.html", to_html(blocks, title=title, folder=out, styles=styles(tasks[0].result)))
    write_csv(out / "probe.csv", _rows(tasks))
    return out / "probe.html"


def solved_at(cell: CellResult) -> int | None:
    """Number of optimizer steps at the first validation with an accuracy of at least 0.99; None without one."""
    reached = np.flatnonzero(cell.record.accuracy >= SOLVED)
    return int(cell.record.validation.step[reached[0]]) if reached.size else None


def _task(name: str, out: Path) -> Task:
    result = analyse(out)
    data = result.cells[0].planned["data"]
    source = SyntheticSource.model_validate(data["source"])
    synthetic = SyntheticTask(source, split="validation", seq_len=data["seq_len"], seed=data["seed"])
    return Task(
        name=name, result=result, source=source, chance=synthetic.chance_accuracy(), seq_len=int(data["seq_len"])
    )


# ---------------------------------------------------------------- the page


def _blocks(record: dict[str, Any], tasks: list[Task], not_begun: list[str], plot: Plot | None) -> Iterator[Block]:
    yield Heading(f"Probe tasks {record['probe']}", 1)
    missing = [(t, c) for t in tasks for c in t.result.cells if not c.done]
    if missing or not_begun:
        yield Text("Not in the numbers below:", "warn")
        rows = [("task", "cell", "state", "why")]
        rows += [(t.name, c.key, c.state, c.detail or "-") for t, c in missing]
        rows += [(name, "all", "missing", "-") for name in not_begun]
        yield Table(rows, frozenset({0, 1, 2, 3}))
    yield Text(_explanation(tasks))
    yield Table(list(_table(tasks)), frozenset({0}))
    if plot is not None:
        yield Image(plot)
    yield Heading("Tasks")
    yield Table(list(_task_rows(tasks)), frozenset({0, 1}))
    yield Heading("Sizes")
    yield Text(_matching(tasks[0].result))
    yield Table(list(_sizes(tasks)))
    yield Heading("Provenance")
    yield Items(list(_provenance(record, tasks)))


def _explanation(tasks: list[Task]) -> str:
    seeds = sorted({c.seed for t in tasks for c in t.result.cells})
    return (
        f"Accuracy at the end of training: share of the answers whose largest logit is the right one, mean over "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)} (smallest \u2013 largest where they differ). After the semicolon: "
        f"optimizer steps to the first validation with an accuracy of at least {SOLVED:.0%}, where the task counts as "
        "solved. A run is looked at only when it is validated: the true number of steps is up to one validation "
        "interval smaller (last columns of the tasks below). Chance: the best guess without memory of earlier tokens."
    )


def _table(tasks: list[Task]) -> Iterator[list[str]]:
    yield ["variant", *(t.name for t in tasks)]
    for name in _variants(tasks):
        yield [name, *(_cell(t.cells(name)) for t in tasks)]
    yield ["chance", *(f"{100 * t.chance:.1f} %" for t in tasks)]


def _cell(cells: Sequence[CellResult]) -> str:
    if not cells:
        return "-"
    accuracy = _spread([100 * float(c.record.accuracy[-1]) for c in cells], "{:.1f}", " %")
    steps = [s for s in map(solved_at, cells) if s is not None]
    limit = f"not solved in {max(int(c.record.validation.step[-1]) for c in cells):,} steps"
    if not steps:
        return f"{accuracy}; {limit}"
    partly = f" in {len(steps)} of {len(cells)} runs, else {limit}" if len(steps) < len(cells) else ""
    return f"{accuracy}; {_spread(steps, '{:,.0f}')}{partly}"


def _spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Text with the mean, and with minimum and maximum in brackets if their texts differ."""
    low, high = form.format(min(values)), form.format(max(values))
    brackets = "" if low == high else f" ({low} \u2013 {high})"
    return f"{form.format(np.mean(values))}{unit}{brackets}"


def _task_rows(tasks: list[Task]) -> Iterator[list[str]]:
    yield ["task", "what", "sequence", "vocabulary", "steps", "validated every", "batches"]
    for t in tasks:
        lengths = sorted({c.steps.count for c in t.result.cells if c.done})
        steps = f"{lengths[-1]:,}" if lengths else "-"
        every = _interval(t)
        yield [
            t.name,
            _what(t.source),
            f"{t.seq_len:,}",
            f"{t.source.vocab_size:,}",
            steps,
            "-" if every is None else f"{every:,} steps",
            t.result.pairing.status,
        ]


def _what(source: SyntheticSource) -> str:
    match source.task:
        case "mqar":
            return f"recall: {source.pairs} pairs, {source.queries} asked for"
        case "copy":
            return f"copy {source.span} tokens"
        case "induction":
            return f"induction: {source.span} tokens, {source.queries} asked for"


def _interval(task: Task) -> int | None:
    """Maximum number of steps between two validations, over finished runs."""
    gaps = [np.diff(c.record.validation.step, prepend=0).max() for c in task.result.cells if c.done]
    return int(max(gaps)) if gaps else None


def _matching(result: StudyResult) -> str:
    match = result.record["match"]
    if not match:
        return "Sizes are as written; nothing was matched."
    return (
        f"`{match['free']}` was solved for every task in multiples of {match['multiple']}, so that every variant has "
        f"the {quantity_words(match)} of {result.baseline.name}. Parameters, and in brackets by how much the matched "
        "quantity misses."
    )


def _sizes(tasks: list[Task]) -> Iterator[list[str]]:
    yield ["variant", *(t.name for t in tasks)]
    for name in _variants(tasks):
        yield [name, *(_size(t.result, name) for t in tasks)]


def _size(result: StudyResult, name: str) -> str:
    v = next((v for v in result.variants if v.name == name), None)
    if v is None:
        return "-"
    why = "baseline" if v is result.baseline else "not matched"
    return f"{v.cost['num_params']:,} ({_residual(v, why)})"


def _residual(variant: VariantResult, otherwise: str) -> str:
    matched = variant.planned["matched"]
    return f"{matched['residual']:+.2%}" if matched else otherwise


def _provenance(record: dict[str, Any], tasks: list[Task]) -> Iterator[str]:
    def card(key: str) -> Any:
        return next((found for t in tasks if (found := t.result.card(key)) is not None), None)

    machine, versions = card("machine") or {}, card("versions") or {}
    yield f"Command: `{record['command']}`"
    yield f"Commit: `{card('git_commit') or 'unknown'}`"
    yield "Versions: " + (", ".join(f"{k} {v}" for k, v in versions.items()) or "unknown")
    yield "Machine: " + (", ".join(f"{k} {v}" for k, v in machine.items() if v is not None) or "unknown")
    yield "Each task's own report, with losses, speed, routers and fairness: `TASK/report.html` beside this page"
    yield "Numbers per run: `probe.csv`; every validation: `TASK/cells/VARIANT/seed-N/metrics.jsonl`"


def _variants(tasks: list[Task]) -> list[str]:
    """Variants in the order of the file. All tasks have the same variants unless the file was changed in between."""
    return list(dict.fromkeys(v.name for t in tasks for v in t.result.variants))


# ---------------------------------------------------------------- figure and table of runs


def _draw(tasks: list[Task], out: Path) -> Plot | None:
    """Plot accuracy against the number of pairs; None if fewer than two numbers have finished runs."""
    recall = sorted((t for t in tasks if t.source.task == "mqar"), key=lambda t: t.source.pairs)
    recall = [t for t in recall if any(t.cells(name) for name in _variants([t]))]
    if len({t.source.pairs for t in recall}) < 2:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = {name: {"color": GREY, "linestyle": "-"} for name in _variants(recall)} | styles(recall[0].result)
    series = []
    for name in _variants(recall):
        runs = [(t.source.pairs, c.seed, 100 * float(c.record.accuracy[-1])) for t in recall for c in t.cells(name)]
        pairs = sorted({p for p, _, _ in runs})
        means = [float(np.mean([a for p, _, a in runs if p == pair])) for pair in pairs]
        series.append(Series(variant=name, name="mean", x=pairs, y=means))
        for seed in sorted({s for _, s, _ in runs}):
            own = [(p, a) for p, s, a in runs if s == seed]
            x, y = [p for p, _ in own], [a for _, a in own]
            series.append(Series(variant=name, name=f"seed {seed}", x=x, y=y, mark="ring"))
    pairs = [t.source.pairs for t in recall]
    chance = [100 * t.chance for t in recall]
    series.append(Series(variant=None, name="chance", x=pairs, y=chance))
    x_axis = Axis(label="key-value pairs", log=True, ticks=[(p, str(p)) for p in pairs])
    y_axis = Axis(label="accuracy at the end (%)", low=-2, high=103)
    chart = Chart(styles=looks, panels=[Panel(x=x_axis, y=y_axis, series=series)])
    with plt.rc_context({**STYLE, "svg.hashsalt": "recall"}):
        figure = draw(chart, height_in=4.0, width_in=7.0)
        title = "Associative recall by number of pairs"
        caption = "Line: mean over seeds; hollow marks: single seeds. Grey: the best guess without memory."
        return save(figure, out, "recall", title=title, caption=caption, chart=chart)


def _rows(tasks: list[Task]) -> Iterator[dict[str, Any]]:
    """One row per run of every task, in any state. Values that a run lacks are empty."""
    for t in tasks:
        variants = {v.name: v for v in t.result.variants}
        for c in t.result.cells:
            matched, accuracy = variants[c.variant].planned["matched"], c.record.accuracy
            final = float(accuracy[-1]) if c.done and accuracy.size else math.nan
            yield {
                "task": t.name,
                "variant": c.variant,
                "seed": c.seed,
                "state": c.state,
                "final_accuracy": final if math.isfinite(final) else None,
                "chance_accuracy": t.chance,
                "steps_to_solve": solved_at(c) if c.done else None,
                "steps": c.steps.count,
                "tokens": c.record.tokens,
                "validation_interval_steps": _interval(t),
                "num_params": variants[c.variant].cost["num_params"],
                "match_residual": matched["residual"] if matched else None,
                "train_s": None if c.damaged else c.record.train_s,
                "spec_hash": c.record.run.get("spec_hash"),
                "git_commit": c.record.run.get("git_commit"),
                "run_dir": str(c.record.path),
            }
