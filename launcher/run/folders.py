"""Determine the kind of a folder from its files, and create messages for a folder of another kind.

The folder of a run contains spec.json. The folder of a study contains study.json and its runs below `cells/`. The
folder of probe tasks contains probe.json and a study for every task, that of a ladder ladder.json and a study for every
size. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from headway.launcher.base.errors import HeadwayError, NoInputError, printable
from headway.launcher.run.run_dir import RunDir, read_mapping

Kind = Literal["run", "study", "probe", "ladder"]

RECORDS: dict[str, Kind] = {"spec.json": "run", "study.json": "study", "probe.json": "probe", "ladder.json": "ladder"}
"""File that exists in only one kind of folder -> that kind."""

_WORDS = {
    "run": "the folder of a run",
    "study": "the folder of a study",
    "probe": "the folder of probe tasks",
    "ladder": "the folder of a study with sizes",
}
_WANTED = {"spec": "the spec of a run", "study": "a study", "probe": "a set of probe tasks", "corpus": "a corpus"}
_MOST = 24  # maximum number of paths in one message


def kind_of(folder: Path) -> Kind | None:
    """The kind of a folder that Headway wrote; None for any other path."""
    return next((kind for name, kind in RECORDS.items() if (folder / name).is_file()), None)


def runs_in(folder: Path) -> list[Path]:
    """Folders of the started runs of a study or of probe tasks, in the order of the study; for a run, only its own."""
    match kind_of(folder):
        case "run":
            return [folder]
        case "study":
            return [cell for cell in cells_of(folder) if kind_of(cell) == "run"]
        case "probe" | "ladder":
            return [run for task in tasks_of(folder) for run in runs_in(task)]
    return []


def cells_of(study: Path) -> list[Path]:
    """Folders of the cells that study.json plans, started or not."""
    cells = read_mapping(study / "study.json").get("cells")
    names = [cell.get("run_dir") for cell in cells if isinstance(cell, dict)] if isinstance(cells, list) else []
    return [study / name for name in names if isinstance(name, str) and _below(name)]


def tasks_of(folder: Path) -> list[Path]:
    """Folders of the studies that probe.json or ladder.json names, started or not."""
    if kind_of(folder) == "ladder":
        sizes = read_mapping(folder / "ladder.json").get("sizes")
        names = [size.get("folder") for size in sizes if isinstance(size, dict)] if isinstance(sizes, list) else []
    else:
        tasks = read_mapping(folder / "probe.json").get("tasks")
        names = tasks if isinstance(tasks, list) else []
    return [folder / name for name in names if isinstance(name, str) and _below(name)]


def find_run(path: Path) -> RunDir:
    """The run in a folder. Raises NoInputError for any other path, with a list of runs that may be meant."""
    run = RunDir(path)
    if not run.spec.is_file():
        raise NoInputError(not_a_run(path))
    return run


def not_a_run(path: Path) -> str:
    """Message that explains why `path` is not the folder of a run, and which folders may be meant."""
    shown = printable(str(path), 300)
    if (kind := kind_of(path)) is not None:
        return f"{shown} is {_WORDS[kind]}; name one of its runs{_listed(runs_in(path))}"
    if path.is_file():
        return f"{shown} is a file; name the run's folder{_of_file(path)}"
    if not path.exists():
        return (
            f"{shown}: no such folder (looked for {path.absolute()}); name the folder of a run: `headway ls` lists them"
        )
    return (
        f"{shown} has no spec.json: train a model with `headway train SPEC`, or name the folder of a run (`headway ls`)"
    )


def refuse_folder(path: Path, kind: str) -> None:
    """Raise NoInputError if `path` is a folder that Headway wrote. `kind` of the required file: spec, study, probe or
    corpus.
    """
    found = kind_of(path) if path.is_dir() else None
    if found is None:
        return
    said = f"{path} is {_WORDS[found]}, and the YAML file of {_WANTED[kind]} is wanted"
    if found == "run":
        study = path.resolve().parents[2] if len(path.resolve().parents) > 2 else path
        if kind_of(study) != "study" or path.resolve() not in [cell.resolve() for cell in cells_of(study)]:
            raise NoInputError(f"{said}; name the file that the run was started with")
        said, path, found = f"{said}; it is a run of the study in {study}", study, "study"
    record = read_mapping(path / f"{found}.json")
    file, command = (_text(record, key) for key in ("path", "command"))
    file = f"; its file is {file}" if file else "; name its file"
    raise NoInputError(f"{said}{file}{f', and `{command}` continues it' if command else ''}")


def _of_file(path: Path) -> str:
    """`: runs/x`: folder of the run, or of the runs of the study, that a YAML file describes; empty for other files."""
    from headway.launcher.spec.load import load_mapping

    if path.suffix not in (".yaml", ".yml"):
        return ""
    try:
        tree: dict[str, Any] = load_mapping(path, inherit=True).plain()
    except HeadwayError:
        return ""
    if "variants" in tree:
        out = Path(_text(tree, "out") or f"studies/{_text(tree, 'study')}")
        return _listed(runs_in(out), out)
    if "corpus" in tree:
        return "; this file describes a corpus"
    run = Path(_text(tree, "run_dir") or f"runs/{_text(tree, 'name') or 'run'}")
    return f": {run}" + ("" if kind_of(run) == "run" else f" (once `headway train {path}` has made it)")


def _listed(runs: Sequence[Path], out: Path | None = None) -> str:
    if not runs:
        return f"; none was begun{f' in {out}' if out is not None else ''}"
    more = [f"  ... and {len(runs) - _MOST} more"] if len(runs) > _MOST else []
    return "\n".join([":", *(f"  {printable(str(run), 300)}" for run in runs[:_MOST]), *more])


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    return printable(value, 300) if isinstance(value, str) else ""


def _below(name: str) -> bool:
    """Whether a name from a record refers to a path below its folder. A record must not refer to other paths."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts
