"""The cells of one or several studies in the order in which they start, and which of them can start now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from headway.launcher.compare.cells import cell_state
from headway.launcher.run.state import held_by_live_process
from headway.launcher.study.branches import Way, way_of
from headway.launcher.study.config import FULL
from headway.launcher.study.keeping import needs_no_training
from headway.launcher.study.plan import Cell, StudyPlan, cell_key


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """An unfinished cell. `number`: that of its plan. `label`: names it among the cells of all plans.

    `flops`: training FLOPs per token that the implementation executes.
    """

    number: int
    cell: Cell
    label: str
    flops: float

    @property
    def total(self) -> float:
        """FLOPs of the whole run."""
        return self.flops * self.cell.spec.steps * self.cell.spec.tokens_per_step

    @property
    def done(self) -> float:
        """FLOPs that need not be executed: those of an earlier start, or of the full run that the cell continues."""
        tokens = cell_state(self.cell.run_dir, None).tokens
        return min(self.total, self.flops * max(tokens, self.cell.branch_step * self.cell.spec.tokens_per_step))

    @property
    def full_run(self) -> tuple[int, str]:
        """Plan and key of the full run of the same variant and seed."""
        return self.number, cell_key(self.cell.variant, self.cell.seed)

    @property
    def before(self) -> tuple[int, str] | None:
        """Plan and key of the cell that must end before this one starts: its full run, or its teacher."""
        if self.cell.after is not None:
            return self.number, self.cell.after
        return self.full_run if self.cell.budget != FULL else None


def unfinished(
    plans: Sequence[StudyPlan], current: Sequence[StudyPlan] | None = None, *, in_order: bool = False
) -> list[Task]:
    """The cells that are not complete, in the order in which they start.

    Full runs before smaller budgets, whose runs are short and most of which continue a full run: a study that is
    stopped early has as many full runs as possible. Then seed by seed, and the variants of a plan one after the other
    within a seed, so that a machine whose speed drifts affects all variants alike. Of several plans, the one with most
    FLOPs comes first within a seed: long cells that start last would leave workers without work at the end.
    `current`: the plans with the cells as they would be trained now. `in_order`: plan by plan instead.
    """
    found: list[tuple[tuple[int, bool, int, float, int, int], Task]] = []
    for number, (plan, now) in enumerate(zip(plans, current or plans, strict=True)):
        cost = {v.name: 3.0 * v.cost.flops_per_token.executed for v in plan.variants}
        weight = max((cost[c.variant] * c.spec.train.tokens for c in plan.cells), default=0.0)
        seeds = {seed: place for place, seed in enumerate(plan.study.config.seeds)}
        prefix = f"{plan.study.config.study}/" if len(plans) > 1 else ""
        for place, (cell, changed) in enumerate(zip(plan.cells, now.cells, strict=True)):
            if not needs_no_training(cell):
                task = Task(number=number, cell=changed, label=prefix + cell.key, flops=cost[cell.variant])
                first = (number, 0.0) if in_order else (0, -weight)
                found.append(((first[0], cell.budget != FULL, seeds[cell.seed], first[1], number, place), task))
    return [task for _, task in sorted(found, key=lambda one: one[0])]


@dataclass(kw_only=True)
class Queue:
    """Tasks that have not started. `planned`: the cells of each plan by their keys, as they were planned."""

    waiting: list[Task]
    planned: list[dict[str, Cell]]
    _open: set[tuple[int, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._open = {(task.number, task.cell.key) for task in self.waiting}

    def take(self, *, patient: bool = True) -> tuple[Task, Way] | None:
        """Remove and return the first task that can start, with its way; None if none can.

        The cell of a smaller budget waits until its full run has ended, and a cell that converts a teacher of the study
        until the teacher has. If that failed, the way says that the cell waits, in vain. A cell whose folder another
        process holds is left out while `patient`: after kill -9 of a study, its cells take a moment to save.
        """
        for task in self.waiting:
            if task.before in self._open:
                continue
            if patient and held_by_live_process(task.cell.run_dir):
                continue
            self.waiting.remove(task)
            return task, way_of(self.planned[task.number][task.cell.key])
        return None

    def put_back(self, task: Task) -> None:
        """Return a task that has started but has not been trained."""
        self.waiting.insert(0, task)

    def end(self, task: Task) -> None:
        """Record that a task has ended, after success or failure."""
        self._open.discard((task.number, task.cell.key))
