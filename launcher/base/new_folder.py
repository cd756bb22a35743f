"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from headway.launcher.base.errors import SpecError


@contextlib.contextmanager
def new_folder(out: Path, *, option: str) -> Iterator[Path]:
    """A hidden folder beside `out` to write files into; it becomes `out` when the block ends well, else it vanishes.

    `option`: what messages call the argument that names `out`. What a killed process left is removed by the next one.
    Raises SpecError where `out` is a file, a link or a folder that is not empty, or where another process is writing
    it.
    """
    refuse_taken(out, option=option)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".{out.name}.staging"
    if staging.is_symlink():
        raise SpecError(f"{option}: {staging} is a link where a folder is to be written; remove it, or name another")
    staging.mkdir(exist_ok=True)
    held = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpecError(
                f"{option}: another process is writing {out}; wait for it, or name another folder"
            ) from None
        try:
            for left in staging.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield staging
            for file in staging.iterdir():
                _fsync(file)
            _fsync(staging)
            refuse_taken(out, option=option)
            staging.rename(out)  # over an empty folder, too
            _fsync(out.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(held)


def refuse_taken(out: Path, *, option: str) -> None:
    """Raises SpecError unless `out` is not there, or an empty folder."""
    if out.is_symlink():
        raise SpecError(f"{option}: {out} is a link; name the folder it leads to, or a new one")
    if out.exists() and not out.is_dir():
        raise SpecError(f"{option}: {out} is a file; name a folder, or remove it")
    if out.is_dir() and (there := sorted(p.name for p in out.iterdir())):
        raise SpecError(f"{option}: {out} is not empty (it has {there[0]}); name a new folder, or remove this one")


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
