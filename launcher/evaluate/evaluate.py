"""`headway eval`: measure a run, exported weights, or every finished cell of a study."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError
from headway.launcher.compare.evaluations import FORMAT, evaluation_file, kept_evaluation_file
from headway.launcher.evaluate.choices import evaluate_choices, read_questions
from headway.launcher.evaluate.harness import evaluate_harness
from headway.launcher.evaluate.lengths import evaluate_lengths, evaluate_recall
from headway.launcher.evaluate.measure import Measure
from headway.launcher.evaluate.summaries import Summaries, evaluate_summaries
from headway.launcher.evaluate.texts import TextSource, evaluate_text, own_sources
from headway.launcher.exchange.opened import Opened, open_model
from headway.launcher.run.machine import machine, versions
from headway.launcher.run.run_dir import RunDir, read_mapping, write_json

_OF_BYTES = {"/loss": "/bits_per_byte", "/acc": "/gold_bits_per_byte"}
"""Measure -> the one beside it that is left out if the tokenizer loses text."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to measure. `texts`: None for the validation sets of the run. `limit`: documents, pairs, questions or
    sequences.
    """

    texts: tuple[TextSource, ...] | None
    tasks: tuple[str, ...]
    include: Path | None
    shots: int | None
    lengths: tuple[int, ...]
    recall: tuple[int, ...]
    summaries: Summaries
    limit: int | None

    def check(self) -> None:
        """Raises SpecError for tasks that exclude each other, NoInputError for files that do not exist."""
        sources = (*(self.texts or ()), *self.summaries.sources)
        names = [source.name for source in sources] + [_name(task) for task in self.tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            options = "--text, --summaries, --tasks" if self.summaries.sources else "--text, --tasks"
            raise SpecError(f"{options}: two are called {twice[0]}; name one of them: --text NAME=PATH")
        self.summaries.check()
        if self.shots is not None and all(task.endswith(".jsonl") for task in self.tasks):
            raise SpecError("--shots: only tasks of lm-evaluation-harness have examples; leave it out, or name one")
        for source in self.texts or ():
            if not source.path.exists():
                raise NoInputError(f"--text {source.path}: no such file or folder; name a text or a dataset")
        for task in (task for task in self.tasks if task.endswith(".jsonl")):
            read_questions(Path(task))


def evaluate(path: Path, asked: Asked, *, step: int | None, out: Path | None) -> int:
    """Measure `path`, print the measures, and write them: into the folder of a run, and to `out` if given.

    A study is measured cell by cell, and its report shows the measures. Raises NoInputError, SpecError, DataError and
    CheckpointError with what to do.
    """
    asked.check()
    if (path / "ladder.json").is_file():
        raise NoInputError(f"{path}: is a study with sizes; name the folder of one size, {path}/sizes/SIZE")
    if (path / "study.json").is_file():
        if step is not None or out is not None or asked.summaries.texts is not None:
            raise SpecError("--step, --out, --texts-out: are of one run; leave them out for a study")
        return _study(path, asked)
    result = _measured(path, asked, step)
    if RunDir(path).spec.is_file():
        _keep(evaluation_file(path), result)
    if out is not None:
        write_json(out, result)
    console.emit(result)
    for line in table(result["measures"]):
        console.say(line)
    return 0


def _study(path: Path, asked: Asked) -> int:
    from headway.launcher.compare.cell_results import read_cells
    from headway.launcher.compare.cells import records_of
    from headway.launcher.report.study import report

    study = read_mapping(path / "study.json")
    records = records_of(path, study)
    cells = [c for c in read_cells(path, study["cells"], records) if c.done and c.budget == 1]
    here = [c for c in cells if not c.from_record]
    if not here:
        raise NoInputError(f"{path}: has no finished cell with checkpoints; run the study where it should be measured")
    if len(here) < len(cells):
        console.note(f"note: {len(cells) - len(here)} cells are read from their records and have no model to measure")
    results = {}
    for number, cell in enumerate(here, 1):
        console.say(f"[{number}/{len(here)}] {cell.key}")
        results[cell.key] = result = _measured(cell.record.path, asked, None)
        _keep(evaluation_file(cell.record.path), result)
        if records is not None:
            _keep(kept_evaluation_file(records, cell.key), result)
    console.emit(results)
    console.say(f"report: {report(path)}")
    return 0


def _measured(path: Path, asked: Asked, step: int | None) -> dict[str, Any]:
    model = open_model(path, step)
    started = time.perf_counter()
    measures = list(_all(model, asked))
    return {
        "kind": "evaluation",
        "format": FORMAT,
        "model": model.identity,
        "measures": [measure.row() for measure in measures],
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
        "machine": machine(),
    }


def _all(model: Opened, asked: Asked) -> Iterator[Measure]:
    """Every measure that was asked for; without any question, the losses of the run's validation sets."""
    for given, option in ((asked.tasks, "--tasks"), (asked.lengths, "--lengths"), (asked.recall, "--recall")):
        if given:
            model.decoder_for(f"headway eval {option}")
    texts = asked.texts
    if texts is None and not (asked.tasks or asked.recall or asked.summaries.sources):
        texts = tuple(own_sources(model.data)) if model.data is not None else ()
        if not texts:
            raise SpecError(
                "nothing to measure: name texts (--text books=FILE), tasks (--tasks FILE.jsonl) or --recall LENGTH; "
                "runs on text are measured on their own validation sets without any"
            )
    for source in texts or ():
        with console.progress(f"evaluate {source.name}", None, "tokens") as bar:
            if asked.lengths:
                yield from evaluate_lengths(model, source, list(asked.lengths), limit=asked.limit, done=bar.update)
            else:
                yield from evaluate_text(model, source, limit=asked.limit, done=bar.update)
    for source in asked.summaries.sources:
        with console.progress(f"continue {source.name}", None, "prompts") as bar:
            yield from evaluate_summaries(model, source, asked.summaries, limit=asked.limit, done=bar.update)
    if asked.recall:
        with console.progress("evaluate recall", None, "tokens") as bar:
            yield from evaluate_recall(model, model.data, list(asked.recall), limit=asked.limit, done=bar.update)
    for task in asked.tasks:
        with console.progress(f"evaluate {_name(task)}", None, "tokens") as bar:
            if task.endswith(".jsonl"):
                questions = read_questions(Path(task), asked.limit)
                yield from evaluate_choices(model, _name(task), questions, done=bar.update)
            else:
                yield from evaluate_harness(
                    model, task, include=asked.include, shots=asked.shots, limit=asked.limit, done=bar.update
                )


def _name(task: str) -> str:
    return Path(task).name.removesuffix(".jsonl") if task.endswith(".jsonl") else task


def _keep(file: Path, result: dict[str, Any]) -> None:
    """Write a result; measures of other names that the file has of the same model stay.

    Bits per byte do not stay if what they were measured with is measured again without them.
    """
    before = read_mapping(file)
    names = {measure["name"] for measure in result["measures"]}
    for measure, of_bytes in _OF_BYTES.items():
        names |= {name.removesuffix(measure) + of_bytes for name in names if name.endswith(measure)}
    if before.get("format") == FORMAT and before.get("model") == result["model"]:
        others = [measure for measure in before["measures"] if measure["name"] not in names]
        result = {**result, "measures": sorted([*others, *result["measures"]], key=lambda m: m["name"])}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)


def table(measures: list[dict[str, Any]]) -> list[str]:
    """One line for each measure: name, value, interval, number, and the value of guessing."""
    width = max((len(m["name"]) for m in measures), default=0)
    lines = []
    for m in measures:
        interval = "" if m["low"] is None else f" [{m['low']:.4f}, {m['high']:.4f}]"
        chance = "" if m["chance"] is None else f", chance {m['chance']:.4f}"
        lines.append(f"{m['name']:<{width}}  {m['value']:.4f}{interval} {m['unit']}, n {m['n']}{chance}")
    return lines
