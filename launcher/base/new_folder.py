"""Create a folder atomically: it appears with all its files or not at all."""

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
    """Yield a hidden folder beside `out` to write files into.

    It is renamed to `out` when the block succeeds and is deleted when the block fails. `option`: name of the argument
    for `out`, for messages. The next call removes the files that a killed process left. Raises SpecError if `out` is a
    file, a link or a folder that is not empty, or if another process is writing it.
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
            staging.rename(out)  # also replaces an empty folder
            _fsync(out.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(held)


def refuse_taken(out: Path, *, option: str) -> None:
    """Raise SpecError unless `out` does not exist or is an empty folder."""
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
