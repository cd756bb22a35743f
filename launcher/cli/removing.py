"""`headway rm`: delete folders of runs, studies and probe tasks, and nothing that Headway did not write.

A folder is deleted only if all its entries are known, none is a link, and no process holds its lock. The records that
identify the folder are deleted last, so that an interrupted deletion can be repeated.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headway.launcher.base.errors import NoInputError, SpecError, printable
from headway.launcher.base.text import disk_size
from headway.launcher.run.disk import bytes_below
from headway.launcher.run.folders import RECORDS, Kind, kind_of
from headway.launcher.run.run_dir import RunDir, read_mapping

LOCKS = {
    "run": ("run.lock", "worker.lock"),
    "study": ("study.lock",),
    "probe": ("study.lock",),
    "ladder": ("ladder.lock",),
}
_LOCK_FILES = dict.fromkeys((name for names in LOCKS.values() for name in names), 2)
_LAST = {**_LOCK_FILES, **dict.fromkeys((*RECORDS, "run_id.json"), 1)}
_RUN_FOLDERS = (
    *("checkpoints", "tensorboard", ".tensorboard.tmp", "logs", "slurm", "skipped", "traces", "wandb"),
    *("converted", ".converted.staging", "inspection"),
)
_RUN_FILES = re.compile(r"hostfile|\.?[a-z_]+(\.[a-z_]+)*\.(json|jsonl|lock|tmp)")
_RECORD_FILES = re.compile(r"\.?[\w-]+(\.[\w-]+)*\.(json|tmp)")
_STUDY_FILES = re.compile(r"\.?[\w-]+(\.[\w-]+)*\.(json|lock|tmp|md|html|csv|png|svg)")
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A folder that may be deleted. `held`: (folder, kind) of all its folders with locks. `bytes`: bytes to free."""

    path: Path
    kind: Kind
    held: tuple[tuple[Path, Kind], ...]
    bytes: int


def remove(paths: Sequence[Path], *, yes: bool, checkpoints: bool) -> int:
    """Delete the folders, or with `checkpoints` only the checkpoints of their runs. Returns 0, or 1 if not confirmed.

    Asks on the terminal unless `yes`. Raises NoInputError or SpecError before any deletion for a folder that does not
    exist, was not written by Headway, is a link or is held by a live process, and if there is no terminal to ask on.
    """
    targets = _outermost([_target(path, checkpoints) for path in paths])
    with contextlib.ExitStack() as stack:
        for folder, kind in dict.fromkeys(held for target in targets for held in target.held):
            for name in LOCKS[kind]:
                stack.enter_context(_locked(folder, name))
        # Check again under the locks. Keep the sizes from before, because the lock files take a few bytes.
        targets = [replace(_target(target.path, checkpoints), bytes=target.bytes) for target in targets]
        for target in targets:
            print(f"{target.path}: {target.kind}, {disk_size(target.bytes)}{' of checkpoints' if checkpoints else ''}")
        if not yes and not _confirmed(targets, checkpoints):
            print("nothing was deleted")
            return 1
        for target in targets:
            _remove(target, checkpoints)
    print(f"freed {sum(target.bytes for target in targets):,} bytes")
    return 0


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Hold a lock of a folder. Raises SpecError if another process holds it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(RunDir(folder).locked(name))
        except SpecError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            raise SpecError(
                f"{folder}: a live process holds it ({name}), so nothing was deleted; wait for it, or stop it first"
            ) from None
        yield


def _remove(target: Target, checkpoints: bool) -> None:
    inside = [folder for folder, _ in target.held if folder == target.path or target.path in folder.parents]
    for folder in reversed(inside):  # cells and tasks before their study
        if not checkpoints:
            _delete(folder)
        elif kind_of(folder) == "run":
            _delete_in(folder, [_CHECKPOINTS])


def _target(path: Path, checkpoints: bool) -> Target:
    """Check one argument and return its target. Raises NoInputError or SpecError."""
    shown = printable(str(path), 300)
    if path.is_symlink():
        raise SpecError(f"{shown}: is a link, and links are not followed; name the folder it leads to")
    if not path.exists():
        raise NoInputError(f"{shown}: no such folder (looked for {path.absolute()}); `headway ls` lists what there is")
    kind = kind_of(path)
    if kind is None:
        raise SpecError(f"{shown}: is no run, study or probe folder of Headway; `headway ls` lists what there is")
    if Path.cwd().is_relative_to(path.resolve()):
        raise SpecError(f"{shown}: is the folder you are in, or above it; go to another folder and name it from there")
    held: tuple[tuple[Path, Kind], ...] = tuple(_checked(path, kind))
    above = path.resolve().parents
    if kind == "run" and len(above) > 2 and above[0].parent.name == "cells" and kind_of(above[2]) == "study":
        held = ((above[2], "study"), *held)  # the study may be about to train this cell
    runs = [folder for folder, inner in held if inner == "run"]
    size = sum(bytes_below(run / _CHECKPOINTS) for run in runs) if checkpoints else bytes_below(path)
    return Target(path=path, kind=kind, held=held, bytes=size)


def _checked(path: Path, kind: Kind) -> Iterator[tuple[Path, Kind]]:
    """(folder, kind) of `path` and of all runs and studies in it. Raises SpecError for files of other programs."""
    yield path, kind
    if kind == "run":
        spec = read_mapping(path / "spec.json")
        if not {"model", "attention", "train"} <= spec.keys():
            raise SpecError(f"{path}: its spec.json is no spec of a run; delete the folder by hand if it is not needed")
        for entry in _entries(path, _RUN_FILES):
            if entry.name not in _RUN_FOLDERS:
                raise _foreign(entry)
        return
    if kind == "study" and not any((path / name).exists() for name in ("cells", "study.lock", "tune")):
        raise SpecError(f"{path}: holds a report, but no runs (`cells`); delete the folder by hand if it is not needed")
    for entry in _entries(path, _STUDY_FILES):
        if entry.name == "slurm":
            _refuse_jobs(path)
        elif kind == "probe":
            yield from _checked_study(entry)
        elif entry.name == "sizes" and kind == "ladder":
            for size in _entries(entry, None):
                yield from _checked_study(size)
        elif entry.name == "tune":
            for value in (value for key in _entries(entry, None) for value in _entries(key, None)):
                yield from _checked_study(value)
        elif entry.name == "cells":
            yield from _checked_cells(entry)
        elif entry.name == "records":
            _check_records(entry)
        elif entry.name != "logs":
            raise _foreign(entry)


def _check_records(folder: Path) -> None:
    """Raise SpecError if records of cells, evaluations, sizes and trials contain anything but folders and JSON."""
    for inner in _entries(folder, _RECORD_FILES):
        _check_records(inner)


def _checked_study(folder: Path) -> Iterator[tuple[Path, Kind]]:
    """As `_checked`, for a folder that must be a study, or the trials of a study that is yet to begin."""
    if kind_of(folder) == "study" or (kind_of(folder) is None and (folder / "tune").is_dir()):
        return _checked(folder, "study")
    raise _foreign(folder)


def _refuse_jobs(study: Path) -> None:
    """Raise HeadwayError if jobs of a cluster are queued or running that write into the folder of a study."""
    from headway.launcher.study.cluster.submit import refuse_in_queue

    refuse_in_queue(study, "they write into this folder")


def _checked_cells(cells: Path) -> Iterator[tuple[Path, Kind]]:
    for variant in _entries(cells, None):
        for cell in _entries(variant, None):
            if not re.fullmatch(r"seed-\d+(\.budget-[0-9.e-]+)?", cell.name):
                raise _foreign(cell)
            if kind_of(cell) == "run":
                yield from _checked(cell, "run")
                continue
            for entry in _entries(cell, _RUN_FILES):  # the start ended before it wrote the spec
                if entry.name not in ("logs", "slurm"):
                    raise _foreign(entry)
            yield cell, "run"


def _entries(folder: Path, files: re.Pattern[str] | None) -> Iterator[Path]:
    """The folders in a folder. Raises SpecError for other entries than regular files that match `files`."""
    for entry in sorted(folder.iterdir()):
        mode = entry.lstat().st_mode
        if stat.S_ISDIR(mode):
            yield entry
        elif not stat.S_ISREG(mode) or files is None or not files.fullmatch(entry.name):
            raise _foreign(entry)


def _foreign(entry: Path) -> SpecError:
    what = "is a link" if entry.is_symlink() else "is not of Headway"
    return SpecError(
        f"{printable(str(entry), 300)}: {what}, so the folder is left as it is; move it away first, or delete by hand"
    )


def _outermost(targets: Sequence[Target]) -> list[Target]:
    """The targets without duplicates and without those inside another target."""
    by_path = {target.path.resolve(): target for target in targets}
    return [target for path, target in by_path.items() if not any(other in path.parents for other in by_path)]


def _confirmed(targets: Sequence[Target], checkpoints: bool) -> bool:
    if not sys.stdin.isatty():
        raise SpecError("rm: deletes for good, and nobody can be asked here; add --yes to the same command")
    size = disk_size(sum(target.bytes for target in targets))
    what = "the checkpoints (records stay; runs that are not done cannot go on)" if checkpoints else "all of this"
    print(f"delete {what}, {size}? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _delete(folder: Path) -> None:
    """Delete the folder and its content. The records that identify it are deleted last."""
    with os.scandir(folder) as entries:
        names = sorted((entry.name for entry in entries), key=lambda name: (_LAST.get(name, 0), name))
    _delete_in(folder, names)
    folder.rmdir()


def _delete_in(folder: Path, names: Sequence[str]) -> None:
    """Delete entries through the open folder: another folder that takes its name in the meantime is not touched."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for name in names:
            try:
                mode = os.stat(name, dir_fd=held, follow_symlinks=False).st_mode
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(mode):
                shutil.rmtree(name, dir_fd=held)
            else:
                os.unlink(name, dir_fd=held)
    finally:
        os.close(held)
