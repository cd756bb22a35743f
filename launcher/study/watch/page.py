"""The page: what is done and running, and the losses of all cells so far."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.launcher.base.loss_unit import PER_TOKEN, loss_unit
from headway.launcher.base.text import short_number
from headway.launcher.compare.cell_record import record_file
from headway.launcher.compare.cells import cell_state
from headway.launcher.compare.step_figures import running_mean
from headway.launcher.report.charts import Axis, Chart, Panel, Series
from headway.launcher.report.page import Block, Heading, Live, Table, Text, to_html
from headway.launcher.report.plots.style import styles_of
from headway.launcher.run.records import Curve, read_run
from headway.launcher.run.run_dir import RunDir, read_mapping
from headway.launcher.study.config import FULL, Study
from headway.launcher.study.status import status_record, status_rows

FEW = 2
"""Validations of a cell with which the chart shows them; with fewer, it shows the running mean of training losses."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A plain study of the file: the only one, a size of a ladder, or trials. `label`: empty for the only one."""

    label: str
    study: Study


class Pages:
    """Makes the page. Curves of cells whose records did not change are not read again.

    `parts`: gives the parts as they are now. Trials of a ladder are added while it trains.
    """

    def __init__(self, name: str, parts: Callable[[], Sequence[Part]]) -> None:
        self._name, self._parts = name, parts
        self._curves: dict[Path, tuple[tuple[int, int], Curve, Curve]] = {}

    def state(self) -> str:
        """A text that differs when the page does."""
        seen = []
        for part in self._parts():
            for cell in status_record(part.study)["cells"]:
                mark = _mark(part.study.out / "cells" / cell["cell"])
                seen.append(f"{part.label}/{cell['cell']} {cell['state']} {cell['tokens']} {mark}")
        return str(hash(tuple(seen)))

    def html(self) -> str:
        """The page as it is now."""
        state = self.state()
        text = to_html([*self._blocks()], title=f"{self._name}: running", folder=Path(), renewed=True)
        return text.replace('<main id="report">', f'<main id="report" data-state="{state}">', 1)

    def _blocks(self) -> Iterator[Block]:
        yield Heading(f"Study {self._name}", 1)
        records = [(part, status_record(part.study)["cells"]) for part in self._parts()]
        yield Text(_summary([cell for _, cells in records for cell in cells]), "lead")
        yield Text(f"Read at {time.strftime('%H:%M:%S')}. The page asks for news every 3 seconds.")
        for part, cells in records:
            if not cells:
                continue
            if part.label:
                yield Heading(part.label)
            yield from self._chart(part.study, cells)
            yield Table(status_rows(part.study), frozenset({0, 1, 5}))

    def _chart(self, study: Study, cells: Iterable[dict[str, Any]]) -> Iterator[Block]:
        config = study.config
        others = [name for name in config.variants if name != config.baseline_name]
        found = {}
        for cell in cells:
            curves = self._of(study, cell["cell"]) if cell["budget"] == FULL else None
            if curves is not None and len(curves[1]) > 1:
                found[cell["variant"], cell["seed"]] = curves
        if not found:
            return
        validated = all(len(validation) >= FEW for validation, _ in found.values())
        series = []
        for (variant, seed), (validation, train) in found.items():
            curve = validation if validated else train
            mark = "line" if len(config.seeds) == 1 else "thin"
            series.append(Series(variant=variant, name=f"seed {seed}", x=curve.tokens, y=curve.loss, mark=mark))
        what = "validation loss" if validated else "training loss (running mean)"
        axis = Axis(label=f"{what} ({_unit(study)})")
        panel = Panel(x=Axis(label="training tokens", low=0), y=axis, series=series)
        chart = Chart(styles=styles_of(config.baseline_name, others), panels=[panel])
        yield Live(chart, "Loss so far", f"{what.capitalize()} of every cell that has begun. No test is made of it.")

    def _of(self, study: Study, key: str) -> tuple[Curve, Curve] | None:
        """(validation, running mean of the training loss) of a cell; None without records."""
        run_dir = study.out / "cells" / key
        mark = _mark(run_dir)
        if mark is None:
            record = study.records and record_file(study.records, key)
            stored = cell_state(run_dir, None, record, key=key).record
            return None if stored is None else (stored.run.validation, stored.steps.curve)
        known = self._curves.get(run_dir)
        if known is None or known[0] != mark:
            run = read_run(run_dir)
            known = self._curves[run_dir] = (mark, run.validation, running_mean(run.train)[1])
        return known[1], known[2]


def _unit(study: Study) -> str:
    """Unit of the losses of a study, by its design."""
    cells = read_mapping(study.out / "study.json").get("cells")
    return loss_unit(cells[0].get("spec") or {}) if isinstance(cells, list) and cells else PER_TOKEN


def _mark(run_dir: Path) -> tuple[int, int] | None:
    """Size and time of the records of a run; None without any."""
    try:
        found = RunDir(run_dir).metrics.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _summary(cells: Sequence[dict[str, Any]]) -> str:
    states = Counter(cell["state"] for cell in cells)
    words = [f"{count} {state}" for state, count in states.items() if state != "done"]
    trained = short_number(sum(cell["tokens"] for cell in cells))
    done = f"{states['done']} of {len(cells)} cells are done"
    return f"{done}{', ' + ', '.join(words) if words else ''}; {trained} tokens trained."
