"""`headway study merge`: join the finished cells of one study from several folders into one.

All checks come first: what differs in a way that would change a result is refused in one message, and nothing is
written. Run folders are copied without checkpoints, records as they are.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.launcher.base import console
from headway.launcher.base.errors import NoInputError, SpecError, printable
from headway.launcher.compare.cell_record import record_file
from headway.launcher.compare.cell_results import FULL
from headway.launcher.compare.cells import OUTCOMES, cell_state, records_of
from headway.launcher.compare.step_figures import step_figures
from headway.launcher.match.measured import FILE as MATCHING
from headway.launcher.run.records import read_run
from headway.launcher.run.run_dir import SHA256, RunDir, changed, difference, identity, read_mapping, write_json
from headway.launcher.study.config import load_study
from headway.launcher.study.keeping import STUDY
from headway.launcher.study.merge_checks import Finished, cell_differences, data_differences, version_differences

RUN_FILES = ("spec.json", "run.json", "run_id.json", "micro_batch.json", "branch_start.json", "metrics.jsonl")
"""What is copied of a run folder, before its summary.json, which says that the run is complete."""

MEASURED = (MATCHING,)
"""Files with measurements of a study, taken from the first source of a cell that has them."""

_DESIGN = {"study": str, "baseline": str, "seeds": list, "variants": list, "cells": list}
_ALIKE = ("study", "baseline", "match", "branch_start", "margin_nats", "asks")
"""Keys of study.json that must be equal in all sources: the report follows them."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder with cells of a study. `design`: its study.json; None for a folder of cells alone.

    `folder`: that of the study. `cells`: where its run folders are. `records`: where its records are.
    """

    name: str
    design: dict[str, Any] | None
    folder: Path
    cells: Path
    records: Path

    def cell_keys(self) -> list[str]:
        """Keys of all cells that have a run folder or a record here."""
        folders = {f"{p.parent.name}/{p.name}" for p in self.cells.glob("*/seed-*") if p.is_dir()}
        files = {f"{p.parent.name}/{p.name.removesuffix('.json')}" for p in self.records.glob("*/seed-*.json")}
        return sorted(folders | files)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A cell that is not merged, and why."""

    key: str
    source: str
    state: str
    detail: str

    def __str__(self) -> str:
        return f"{self.key} of {self.source}: {self.state}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Sources of one study, joined. `found`: all finished cells; `chosen`: one for each key."""

    design: dict[str, Any]
    found: list[Finished]
    chosen: dict[str, Finished]
    left_out: list[LeftOut]


def merge_studies(paths: Sequence[Path], to: Path) -> int:
    """Join the finished cells of the sources into the folder `to`, from which a report can be written. Returns 0.

    `paths`: folders of a study, folders of records or of cells, or study files. Unfinished and damaged cells are named
    and left out. Raises NoInputError for a path that is none of these; SpecError if the sources have no finished cell,
    if they differ, or if `to` is not empty. Nothing is written then.
    """
    refuse_full(to)
    joint = join(paths)
    if not joint.chosen:
        raise nothing_finished(paths, joint.left_out)
    check_alike(joint.found)
    with made_whole(to) as making:
        fill(making, joint, command=merge_command(paths, to), records=making / "records")
    _say(to, joint)
    return 0


def merge_command(paths: Sequence[Path], to: Path) -> str:
    return shlex.join(["headway", "study", "merge", *map(str, paths), "--to", str(to)])


def nothing_finished(paths: Sequence[Path], left_out: Sequence[LeftOut]) -> SpecError:
    names = ", ".join(printable(str(path), 300) for path in paths)
    return SpecError("\n".join([f"{names}: no finished cell to merge", *(f"  {one}" for one in left_out[:10])]))


def join(paths: Sequence[Path]) -> Joint:
    """The finished cells of the sources and their design; `check_alike` must follow.

    Raises as `merge_studies`, but not if there is no finished cell.
    """
    sources = [_source(path) for path in paths]
    design = _joint_design(sources)
    planned = {cell_key_of(cell): cell for cell in design["cells"]}
    found, left_out = list[Finished](), list[LeftOut]()
    for source in sources:
        for key in source.cell_keys():
            made = _finished(source, key, planned.get(key))
            if isinstance(made, Finished):
                found.append(made)
            else:
                left_out.append(made)
    if wrong := list(cell_differences(found)):
        raise refusal(wrong)
    chosen = _chosen(found)
    return Joint(design=design, found=found, chosen=chosen, left_out=[one for one in left_out if one.key not in chosen])


def check_alike(found: Sequence[Finished]) -> None:
    """Raise SpecError for finished cells of other data, or of versions that decide about results."""
    if found and (wrong := [*data_differences(found), *version_differences(found)]):
        raise refusal(wrong)


def cell_key_of(cell: dict[str, Any]) -> str:
    """Key of a cell of study.json: the last two folders of its run."""
    return "/".join(Path(str(cell["run_dir"])).parts[-2:])


# ---------------------------------------------------------------- sources


def _source(path: Path) -> Source:
    shown = printable(str(path), 300)
    if path.is_file():
        study = load_study(path)
        folder = next((p for p in (study.out, study.records) if p is not None and (p / STUDY).is_file()), None)
        if folder is None:
            raise SpecError(
                f"{shown}: no study was started in {study.out}; run it first, or name the folder that has its cells"
            )
        design = _design(folder)
        records = study.records or study.out
        return Source(name=shown, design=design, folder=study.out, cells=study.out / "cells", records=records)
    if not path.is_dir():
        raise NoInputError(f"{shown}: no such folder (looked for {path.absolute()}); name the folder of a study")
    cells = path / "cells" if (path / "cells").is_dir() else path
    if (path / STUDY).is_file():
        design = _design(path)
        records = records_of(path, design) or path
        return Source(name=shown, design=design, folder=path, cells=cells, records=records)
    source = Source(name=shown, design=None, folder=path, cells=cells, records=cells)
    if not source.cell_keys():
        raise NoInputError(
            f"{shown}: has neither study.json nor cells (VARIANT/seed-N); name the `out` folder of a study, the folder "
            "of its `records`, or its YAML file"
        )
    return source


def _design(folder: Path) -> dict[str, Any]:
    found = read_mapping(folder / STUDY)
    whole = found.get("format") == 1 and all(isinstance(found.get(key), kind) for key, kind in _DESIGN.items())
    if not whole:
        raise SpecError(f"{folder / STUDY}: is damaged, or of another version; restore it, or run the study again")
    return found


def _joint_design(sources: Sequence[Source]) -> dict[str, Any]:
    """The design with the variants, seeds, budgets and cells of all sources. Raises SpecError if they differ."""
    designs = [(source.name, source.design) for source in sources if source.design is not None]
    if not designs:
        raise SpecError("none of the folders has a study.json, which says what was compared; name one that has it too")
    (name, first), wrong = designs[0], list[str]()
    variants = {v["name"]: (name, v) for v in first["variants"]}
    cells = {cell_key_of(cell): (name, cell) for cell in first["cells"]}
    for other, design in designs[1:]:
        for key in _ALIKE:
            if first.get(key) != design.get(key):
                wrong.append(f"study: {key}: {first.get(key)!r} in {name}, {design.get(key)!r} in {other}")
        for variant in design["variants"]:
            where, known = variants.setdefault(variant["name"], (other, variant))
            wrong += [
                f"variant {variant['name']}: {key}: {known.get(key)!r} in {where}, {variant.get(key)!r} in {other}"
                for key in ("keys", "free_value")
                if known.get(key) != variant.get(key)
            ]
        for cell in design["cells"]:
            where, known = cells.setdefault(cell_key_of(cell), (other, cell))
            wrong += [
                f"cell {cell_key_of(cell)}: {key}: {a!r} planned in {where}, {b!r} in {other}"
                for key, a, b in difference(identity(known["spec"]), identity(cell["spec"]))
                if key != SHA256
            ]
    if wrong:
        raise refusal(wrong)
    seeds, budgets = (_union(design.get(key, [FULL]) for _, design in designs) for key in ("seeds", "budgets"))
    order = list(variants)
    # A study without uptrained variants, to which another source adds some, becomes one that compares at own ends.
    ends = next(({key: d[key]} for _, d in designs for key in ("compare_at",) if key in d), {})
    later: dict[str, int] = {}  # a question that was late in one source is late
    for _, design in designs:
        for text, finished in design.get("asked_later", {}).items():
            later[text] = max(later.get(text, 0), finished)
    return {
        **{key: value for key, value in first.items() if key not in ("records", "written_at", "asked_later")},
        **({"asked_later": later} if later else {}),
        **ends,
        "seeds": seeds,
        "budgets": sorted(budgets),
        "variants": [variant for _, variant in variants.values()],
        "cells": sorted(
            (cell for _, cell in cells.values()),
            key=lambda c: (seeds.index(c["seed"]), order.index(c["variant"]), *_budget_order(c)),
        ),
    }


def _budget_order(cell: dict[str, Any]) -> tuple[bool, float]:
    budget = float(cell.get("budget", FULL))
    return budget != FULL, budget


def _union(lists: Iterator[list[Any]]) -> list[Any]:
    return list(dict.fromkeys(value for values in lists for value in values))


def refusal(wrong: Sequence[str]) -> SpecError:
    more = [f"  ... and {len(wrong) - 10} more"] if len(wrong) > 10 else []
    return SpecError(
        "\n".join(["the cells are not those of one study:", *(f"  {line}" for line in wrong[:10]), *more])
        + "\nnothing was written; leave one of the folders out, or train its cells again like the others"
    )


# ---------------------------------------------------------------- cells


def _finished(source: Source, key: str, planned: dict[str, Any] | None) -> Finished | LeftOut:
    if planned is None:
        detail = "no study.json that was named plans it"
        return LeftOut(key=key, source=source.name, state="not in the study", detail=detail)
    folder, record = source.cells / key, record_file(source.records, key)
    state = cell_state(folder, None, record, key=key)
    if state.state != "done":
        return LeftOut(key=key, source=source.name, state=state.state, detail=state.detail)
    stored = state.record
    run = read_run(folder) if stored is None else stored.run
    budget = float(planned.get("budget", FULL))
    differing = changed(planned["spec"], run.spec)
    return Finished(
        key=key,
        source=source.name,
        variant=planned["variant"],
        seed=planned["seed"],
        run=run,
        steps=step_figures(run) if stored is None else stored.steps,
        folder=source.folder,
        path=folder if stored is None else record,
        is_record=stored is not None,
        changes=[(k, a, b) for k, a, b in differing if budget == FULL or k != SHA256],
    )


def _chosen(found: Sequence[Finished]) -> dict[str, Finished]:
    """One of the equal forms of each cell: a run folder rather than a record, an earlier source rather than a later."""
    chosen: dict[str, Finished] = {}
    for cell in sorted(found, key=lambda cell: cell.is_record):
        chosen.setdefault(cell.key, cell)
    return chosen


# ---------------------------------------------------------------- the joint folder


def refuse_full(to: Path) -> None:
    if to.is_symlink() or (to.exists() and (not to.is_dir() or any(to.iterdir()))):
        raise SpecError(f"--to: {to} exists and is not an empty folder; name a new one, since nothing is overwritten")


@contextmanager
def made_whole(to: Path) -> Iterator[Path]:
    """A new folder under another name, which gets the name `to` once it is whole."""
    to.parent.mkdir(parents=True, exist_ok=True)
    making = to.with_name(f".{to.name}.merging-{os.getpid()}")
    try:
        making.mkdir()
        yield making
        if to.is_dir():
            to.rmdir()
        making.rename(to)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def fill(folder: Path, joint: Joint, *, command: str, records: Path) -> None:
    """Write a joint study into a folder that has none. `records`: folder for cells of which there is a record only."""
    chosen = joint.chosen
    (folder / "cells").mkdir(parents=True)
    for key, cell in chosen.items():
        if cell.is_record:
            target = record_file(records, key)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cell.path, target)
            continue
        target = folder / "cells" / key
        target.mkdir(parents=True)
        for name in (*RUN_FILES, RunDir(target).summary.name):
            if (cell.path / name).is_file():
                shutil.copyfile(cell.path / name, target / name)
    for name in MEASURED:
        there = [cell.folder / name for cell in chosen.values() if (cell.folder / name).is_file()]
        if there:
            shutil.copyfile(there[0], folder / name)
    # How many cells trained beside a cell decides whether its speed counts. A record has this itself.
    write_json(folder / OUTCOMES, {key: _outcome(cell) for key, cell in chosen.items() if not cell.is_record})
    of_records = {"records": os.path.relpath(records, folder)} if records.exists() else {}
    write_json(folder / STUDY, {**joint.design, "command": command, **of_records})


def _outcome(cell: Finished) -> dict[str, Any]:
    """The outcome of a cell, such as its time, without the output that names places of another machine."""
    found = read_mapping(cell.folder / OUTCOMES).get(cell.key)
    kept = found if isinstance(found, dict) else {"exit_code": 0}
    return {key: value for key, value in kept.items() if key not in ("last_lines", "log")}


def _say(to: Path, joint: Joint) -> None:
    say_cells(joint)
    if console.wants_json():
        console.emit({"out": str(to), **as_record(joint)})
    else:
        console.result(
            f"{len(joint.chosen)} of {len(joint.design['cells'])} cells merged into {to}; their report: "
            f"headway study report {shlex.quote(str(to))}"
        )


def say_cells(joint: Joint) -> None:
    """Name what was left out, and print how many cells came from each source."""
    for one in joint.left_out:
        console.alert(f"left out: {one}", "yellow")
    for source in dict.fromkeys(cell.source for cell in joint.chosen.values()):
        console.say(f"{sum(cell.source == source for cell in joint.chosen.values())} cells from {source}")


def as_record(joint: Joint) -> dict[str, Any]:
    """The cells and what was left out, for `--json`."""
    return {
        "cells": [{"cell": c.key, "from": c.source, "record": c.is_record} for c in joint.chosen.values()],
        "left_out": [vars(one) for one in joint.left_out],
    }
