"""Train the unfinished cells of one or several studies: several at once, each recorded in the folder of its study."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import PREEMPTED
from headway.launcher.compare.cells import OUTCOMES, cell_state, failure
from headway.launcher.hosts.forked import VARIABLE
from headway.launcher.run.run_dir import read_mapping
from headway.launcher.study.branches import Way, as_it_stands, not_run
from headway.launcher.study.eta import Eta, step_share
from headway.launcher.study.jobs import Jobs
from headway.launcher.study.keeping import TIMING, conclude, keep, keep_file, state_of
from headway.launcher.study.plan import Cell, StudyPlan, cell_key
from headway.launcher.study.pool import POLL_S, Child, Pool
from headway.launcher.study.queue import Queue, Task, unfinished
from headway.launcher.study.timing import needs_timing, timing_command
from headway.launcher.study.warm import Warm

AGAIN_S = 0.5
"""How often a free worker looks whether a cell can start that waits for another process."""

PATIENCE_S = 60.0
"""How long a cell waits for another process that holds its folder, if there is no other cell to start."""


@dataclass(kw_only=True)
class Book:
    """What is recorded about one study while its cells train. `plan`: as planned. `current`: as cells are trained.

    `write` writes study.json.
    """

    plan: StudyPlan
    current: StudyPlan
    write: Callable[[StudyPlan], None]

    @classmethod
    def open(cls, plan: StudyPlan, write: Callable[[StudyPlan], None]) -> Book:
        """Say and record how the cells would be trained with the files that exist now."""
        current, notes = as_it_stands(plan)
        _say_notes(notes)
        write(current)
        return cls(plan=plan, current=current, write=write)

    @property
    def out(self) -> Path:
        return self.plan.study.out

    @property
    def beside(self) -> int:
        """Most other cells beside a cell of this study."""
        outcomes = read_mapping(self.out / OUTCOMES).values()
        return max((int(o.get("beside", 0)) for o in outcomes if isinstance(o, dict)), default=0)

    def take(self, way: Way) -> None:
        """Record the way of a cell that starts now, if it is another one than before."""
        cells = self.current.cells
        if way.cell in cells:
            return
        self.current = replace(self.current, cells=tuple(way.cell if c.key == way.cell.key else c for c in cells))
        self.write(self.current)
        _say_notes([f"{way.cell.key}: {way.note}"] if way.note else [])

    def outcome(self, key: str) -> dict[str, Any]:
        """Outcome of the latest attempt of a cell; empty if there was none."""
        return read_mapping(self.out / OUTCOMES).get(key) or {}

    def begin(self, cell: Cell, *, beside: int) -> None:
        """Record the start of a cell. Until it has ended, it counts as interrupted, as it is after kill -9."""
        self.conclude(cell, begun(self.log(cell), beside=beside))

    def conclude(self, cell: Cell, outcome: Mapping[str, Any]) -> None:
        """Record the outcome of a cell."""
        conclude(self.out, cell.key, outcome)

    def log(self, cell: Cell) -> Path:
        return log_file(self.out, cell.key)


def train_cells(
    books: Sequence[Book],
    jobs: Jobs,
    command_of: Callable[[StudyPlan, Cell], list[str]],
    *,
    timing: bool = True,
    in_order: bool = False,
) -> int:
    """Train what is unfinished of all plans in one queue. `command_of`: the command that trains a cell.

    `in_order`: all cells of a plan start before those of the next one.

    `timing`: afterwards, time the variants of the plans whose cells trained beside others.
    Returns 0 if every cell is done, 1 if one failed or is damaged, 75 after a stop by a signal.
    """
    tasks = unfinished([book.plan for book in books], [book.current for book in books], in_order=in_order)
    cells = [cell for book in books for cell in book.plan.cells]
    if len(tasks) < len(cells):
        console.say(f"{len(cells) - len(tasks)} of {len(cells)} cells are done already")
    # Damaged cells are not trained again, since their folders may be all that is left of them. The report names them.
    damaged = sum(state_of(cell).state == "damaged" for cell in cells)
    _say_notes([note for cell in cells if (note := keep(cell))])
    warm = Warm([task.cell.spec for task in tasks])
    with warm, Pool() as pool, console.progress("study", len(tasks), "cells", lines=False, rate=False) as bar:
        training = _Training(books, tasks, jobs, command_of, warm, pool, bar)
        failed = training.run()
        if timing and failed is not None and not training.time_alone():
            failed = None
    return PREEMPTED if failed is None else int(bool(failed + damaged))


class _Training:
    def __init__(
        self,
        books: Sequence[Book],
        tasks: Sequence[Task],
        jobs: Jobs,
        command_of: Callable[[StudyPlan, Cell], list[str]],
        warm: Warm,
        pool: Pool,
        bar: console.Bar,
    ) -> None:
        self._books, self._jobs, self._command_of = books, jobs, command_of
        self._warm, self._pool, self._bar = warm, pool, bar
        self._queue = Queue(waiting=list(tasks), planned=[{c.key: c for c in book.plan.cells} for book in books])
        self._eta = Eta({task: task.total - task.done for task in tasks}, jobs=jobs.count)
        self._count, self._started, self._failed = len(tasks), 0, 0
        self._places: dict[Task, int] = {}
        self._beside: dict[Task, int] = {}
        self._idle_s: float | None = None

    def run(self) -> int | None:
        """Number of failed cells; None after a stop."""
        while self._warm.starts and not self._pool.stopping:
            time.sleep(0.02)
        while self._queue.waiting or self._pool.children:
            if not self._pool.stopping:
                self._fill()
            elif not self._pool.children:
                break
            for child in self._pool.wait(AGAIN_S):
                self._conclude(child)
            if self._idle_s is not None:
                time.sleep(POLL_S)
        return None if self._pool.stopping else self._failed

    def time_alone(self) -> bool:
        """Time the variants of the plans whose cells trained beside others, one plan after the other.

        Returns False after a stop.
        """
        for book in self._books:
            if not needs_timing(book.out, beside=book.beside > 0):
                continue
            name = book.plan.study.config.study
            console.say(f"timing the variants of {name} alone, in turns, as its cells trained beside others")
            self._bar.name(f"study: time the variants of {name}")
            self._pool.start(
                book,
                timing_command(book.out),
                log=book.out / "logs" / "timing.log",
                show=lambda line: console.say(f"[timing] {line}"),
                server=self._warm.server,
            )
            while not (ended := self._pool.wait()):
                pass
            if self._pool.stopping:
                return False
            keep_file(book.out, book.plan.study.records, TIMING)
            if (outcome := ended[0].outcome)["exit_code"] != 0:
                console.alert(
                    f"the variants of {name} could not be timed alone: {failure(outcome)}; all its output: "
                    f"{outcome['log']}. The report has no speeds; the same command tries again"
                )
        return True

    def _fill(self) -> None:
        """Start cells while workers are free and cells can start."""
        while len(self._pool.children) < self._jobs.count and not self._pool.stopping:
            waited_s = 0.0 if self._idle_s is None else time.monotonic() - self._idle_s
            taken = self._queue.take(patient=bool(self._pool.children) or waited_s < PATIENCE_S)
            if taken is None:
                break
            self._start(*taken)
        # Cells wait although none runs: other processes hold the folders of all of them.
        idle = bool(self._queue.waiting) and not self._pool.children
        self._idle_s = (self._idle_s or time.monotonic()) if idle else None

    def _start(self, task: Task, way: Way) -> None:
        book, cell = self._books[task.number], way.cell
        book.take(way)
        if way.waits:
            before = cell.after or cell_key(cell.variant, cell.seed)
            self._end(task, cell, not_run(way.waits, book.outcome(before), book.log(cell)))
            return
        self._started += 1
        resumed = cell_state(cell.run_dir, None).tokens > 0
        self._beside[task] = int(book.outcome(cell.key).get("beside", 0)) if resumed else 0
        book.begin(cell, beside=max(self._beside[task], self._jobs.count - 1))
        place = min(set(range(self._jobs.count)) - set(self._places.values()))
        self._places[task] = place
        self._eta.begin(task, task.done, task.total)
        server = self._warm.server
        self._pool.start(
            (task, cell),
            self._command_of(book.plan, cell),
            log=book.log(cell),
            show=partial(self._show, task, f"{self._started}/{self._count} {task.label}"),
            environment={**({} if server is None else {VARIABLE: server}), **self._jobs.environment(place)},
            server=server,
        )
        self._name_bar()

    def _show(self, task: Task, label: str, line: str) -> None:
        share = step_share(line)
        if share is not None:
            self._eta.step(task, share * task.total)
            self._name_bar()
        console.say(f"[{label} | study eta {self._eta}] {line}")

    def _name_bar(self) -> None:
        running = [task.label for task in self._places]
        what = running[0] if len(running) == 1 else f"{len(running)} cells train"
        self._bar.name(f"study: {what}, eta {self._eta}")

    def _conclude(self, child: Child) -> None:
        task, cell = child.task
        outcome, stopping = child.outcome, self._pool.stopping
        del self._places[task]
        outcome["beside"] = max(child.beside, self._beside.pop(task))
        if child.lost and not stopping:
            console.say(f"note: {task.label}: the process that it was forked from ended; the cell starts again")
            self._started -= 1
            self._queue.put_back(task)
            return
        self._end(task, cell, judged(outcome, cell.run_dir, stopping=stopping))

    def _end(self, task: Task, cell: Cell, outcome: dict[str, Any]) -> None:
        self._books[task.number].conclude(cell, outcome)
        self._queue.end(task)
        self._eta.end(task)
        self._bar.update()
        _say_notes([note] if (note := keep(cell)) else [])
        if outcome["exit_code"] == PREEMPTED:
            self._pool.stop()
        elif outcome["exit_code"] != 0 and not self._pool.stopping:
            self._failed += 1
            console.alert(f"[{task.label}] FAILED: {failure(outcome)}; all its output: {outcome['log']}")


def begun(log: Path, *, beside: int = 0) -> dict[str, Any]:
    """Outcome of a cell that has started: that of an interruption."""
    return {"exit_code": PREEMPTED, "last_lines": [], "log": str(log), "beside": beside}


def judged(outcome: dict[str, Any], run_dir: Path, *, stopping: bool) -> dict[str, Any]:
    """The outcome of a cell from that of its process. `stopping`: this process asked it to stop."""
    if stopping and outcome["exit_code"] in (-signal.SIGTERM, -signal.SIGKILL):
        outcome["exit_code"] = PREEMPTED  # it was stopped before it could save: not a failure
    if outcome["exit_code"] == 0 and read_mapping(run_dir / "summary.json").get("complete") is not True:
        outcome["exit_code"] = 70
        outcome["last_lines"].append("error: training ended without a complete summary.json")
    return outcome


def log_file(out: Path, key: str) -> Path:
    """File with all output of a cell of the study in `out`."""
    return out / "logs" / f"{key.replace('/', '.')}.log"


def _say_notes(notes: Sequence[str]) -> None:
    for note in notes:
        console.say(f"note: {note}")
