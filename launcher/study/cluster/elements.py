"""Elements of array jobs: which cells each of them trains, and the index file that tells it.

An element trains one cell, and after it the cells of smaller budgets that continue it. Line I of an index file (a JSON
array with one element per line) is what element I of its array reads, so that a study file that is edited while jobs
are queued changes none of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.launcher.base.errors import HeadwayError, NoInputError
from headway.launcher.run.run_dir import write_text
from headway.launcher.study.branches import way_of
from headway.launcher.study.config import FULL
from headway.launcher.study.plan import Cell, StudyPlan
from headway.launcher.study.queue import Task

if TYPE_CHECKING:
    from headway.parallel.config import LaunchConfig

Name = tuple[str, str]
"""(folder of the study, key) of a cell."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A cell of an element. `arguments`: those of `headway train`.

    For a cell that continues its full run: `parent` and `parent_record` are folder and record of that run,
    `branch_step` is the step of its checkpoint, `whole` are the arguments for a start without it, and `whole_init` is
    their init.run.
    """

    out: Path
    key: str
    variant: str
    seed: int
    budget: float
    run_dir: Path
    record: Path | None
    arguments: tuple[str, ...]
    parent: Path | None = None
    parent_record: Path | None = None
    branch_step: int = 0
    whole: tuple[str, ...] | None = None
    whole_init: str | None = None

    @property
    def name(self) -> Name:
        return str(self.out), self.key


@dataclass(frozen=True, kw_only=True)
class Element:
    """Cells that one element of an array trains, one after the other. `launch`: of the first one."""

    parts: tuple[Part, ...]
    launch: LaunchConfig


def elements_of(tasks: Sequence[Task], plans: Sequence[StudyPlan], *, elsewhere: set[Name]) -> list[Element]:
    """The elements for unfinished cells, in the order of `tasks`. `elsewhere`: cells that other jobs train.

    A cell whose full run or teacher trains elsewhere, or failed, has no element: it cannot start yet.
    """
    planned = [{cell.key: cell for cell in plan.cells} for plan in plans]
    firsts: dict[tuple[int, str], list[Part]] = {}
    launches: list[LaunchConfig] = []
    for task in tasks:
        plan, cell = plans[task.number], planned[task.number][task.cell.key]
        own = (task.number, cell.key)
        _, full = task.full_run
        if cell.budget != FULL and (task.number, full) in firsts:
            firsts[task.number, full].append(_part(plan, cell))
            continue
        way = way_of(cell)
        if cell.after is not None and way.waits:
            continue  # the follow-up submits it when its teacher is complete
        if cell.budget != FULL and ((str(plan.study.out), full) in elsewhere or way.waits):
            continue
        firsts[own] = [_part(plan, cell)]
        launches.append(cell.spec.launch)
    return [Element(parts=tuple(parts), launch=x) for parts, x in zip(firsts.values(), launches, strict=True)]


def by_shape(elements: Sequence[Element]) -> list[list[Element]]:
    """Elements whose jobs are described by the same script, shapes in the order of their first element."""
    found: dict[Any, list[Element]] = {}
    for element in elements:
        launch = element.launch
        shape = (launch.hosts, launch.processes, launch.threads, launch.device, launch.address, launch.port)
        found.setdefault((*shape, launch.slurm), []).append(element)
    return list(found.values())


def write_index(path: Path, elements: Sequence[Element]) -> None:
    """Write the index file of an array of these elements."""
    rows = [json.dumps([asdict(part) for part in e.parts], default=str, ensure_ascii=False) for e in elements]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "[\n" + ",\n".join(rows) + "\n]\n")


def read_element(path: Path, number: int) -> list[Part]:
    """The cells of one element of an index file. Raises NoInputError if it cannot be read or has no such element."""
    again = "start `headway study run STUDY --slurm` again"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [_restored(part) for part in rows[number]]
    except (OSError, ValueError) as e:
        raise NoInputError(f"{path}: the index file of this array cannot be read ({e}); {again}") from e
    except (IndexError, TypeError, KeyError) as e:
        raise HeadwayError(f"{path}: has no element {number} of an array of cells; {again}") from e


def _restored(part: dict[str, Any]) -> Part:
    paths = {key: part[key] and Path(part[key]) for key in ("out", "run_dir", "record", "parent", "parent_record")}
    whole = None if part["whole"] is None else tuple(part["whole"])
    return Part(**{**part, **paths, "arguments": tuple(part["arguments"]), "whole": whole})


def _part(plan: StudyPlan, cell: Cell) -> Part:
    base = str(plan.study.base)
    branch: dict[str, Any] = {}
    if cell.whole is not None:
        branch = {
            "parent": cell.parent,
            "parent_record": cell.parent_record,
            "branch_step": cell.branch_step,
            "whole": (base, *cell.whole.overrides),
            "whole_init": cell.whole.spec.init.run,
        }
    return Part(
        out=plan.study.out,
        key=cell.key,
        variant=cell.variant,
        seed=cell.seed,
        budget=cell.budget,
        run_dir=cell.run_dir,
        record=cell.record,
        arguments=(base, *cell.overrides),
        **branch,
    )
