"""The cache of a remote dataset with a limit of its size, shared by the processes of a host.

What counts is the size of all shards, and of those that processes are fetching now: each has a reservation, an empty
file of that size whose lock its process holds. `.cache.lock` is held while sizes are added up and shards are deleted,
but not during a download. Shards that were used least recently are deleted first, never one that a process has open:
readers hold a shared lock (flock) on the file. The time of the last use is that of the lock file of the shard, because
a change of the shard's own times would make readers hash it again. The kernel releases all locks when their process
ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from headway.data.config import DataError
from headway.data.manifest import SPLITS, clear_staging

_LOCK = ".cache.lock"
_RESERVED = ".reserved-"
_LOOK_S = 0.02
_NOTE_S = 0.05
_WAIT_S = 300.0
_numbers = itertools.count()
_is_staging = re.compile(r"\.(.+\.mds(?:\.zstd)?)\.[0-9]+(?:\.tmp)?").fullmatch


class _Shard(NamedTuple):
    used: float  # time of the last use, in seconds
    path: str
    bytes: int


def lock_path(path: Path) -> Path:
    """The file whose lock is held while `path` is fetched, and whose time is that of its last use."""
    return path.with_name(f".{path.name}.lock")


def open_pinned(path: Path) -> int:
    """Open a file so that no process deletes it from its cache until the descriptor is closed.

    Raises FileNotFoundError if it is not there, or was deleted while it was opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_shared(path: Path) -> int:
    """As `open_pinned`, for a cache without a limit: on a file system without locks, it is opened all the same."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


class Cache:
    """The shards below `root` with at most `limit` bytes together. Thread-safe."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        self._noted: dict[Path, float] = {}

    def used(self, path: Path) -> None:
        """Note that a shard is used now, at most 20 times a second."""
        now = time.monotonic()
        if now - self._noted.get(path, -_NOTE_S) >= _NOTE_S:
            self._noted[path] = now
            with contextlib.suppress(OSError):
                lock_path(path).touch(mode=0o644)

    def trim(self) -> None:
        """Delete shards down to the limit, which may be lower than in earlier runs, and what killed processes left."""
        for split in SPLITS:
            folder = self.root / split
            with contextlib.suppress(OSError):
                for name in {found[1] for entry in folder.iterdir() if (found := _is_staging(entry.name))}:
                    with contextlib.suppress(Timeout), FileLock(str(lock_path(folder / name)), timeout=0):
                        clear_staging(folder / name)
        with self.room(0, wait_s=0.0):
            pass

    @contextlib.contextmanager
    def room(self, size: int, *, keep: Collection[Path] = (), wait_s: float | None = None) -> Iterator[bool]:
        """Reserve `size` bytes until the context ends, and delete shards for that. Gives False if there is no room.

        keep: shards that are not deleted for it. wait_s: how long to wait until other processes close or finish theirs.
        """
        end = time.monotonic() + (_WAIT_S if wait_s is None else wait_s)
        while (reservation := self._reserve(size, keep)) is None and time.monotonic() < end:
            time.sleep(_LOOK_S)
        try:
            yield reservation is not None
        finally:
            if reservation is not None:
                reservation.release()

    def no_room(self, name: str, size: int) -> DataError:
        """The error for a shard that does not get room."""
        return DataError(
            f"data.source.cache_bytes: {self.root} has no room for {name} ({size:,} of {self.limit:,} bytes), because "
            f"processes have its other shards open or are fetching them for more than {_WAIT_S:.0f} s; increase it"
        )

    def _reserve(self, size: int, keep: Collection[Path]) -> _Reservation | None:
        kept = {str(path) for path in keep}
        with self._locked():
            # Reservations first: one that ends in between leaves a shard, which then counts twice and not never.
            taken = self._reserved()
            shards = self._shards()
            taken += sum(shard.bytes for shard in shards)
            for shard in sorted(shards):
                if taken + size <= self.limit:
                    break
                if shard.path not in kept and _delete(shard.path):
                    taken -= shard.bytes
            if taken + size > self.limit:
                return None
            return _Reservation(self.root, size)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(str(self.root / _LOCK), timeout=_WAIT_S)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire(poll_interval=_LOOK_S)
        except Timeout:
            raise DataError(
                f"{lock.lock_file}: held for more than {_WAIT_S:.0f} s by another process; end that process, or use "
                "another data.source.path"
            ) from None
        except (OSError, NotImplementedError) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(
                f"{lock.lock_file}: cannot be locked ({why}); data.source.cache_bytes needs a data.source.path that "
                "you can write to, on a file system with locks"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _shards(self) -> list[_Shard]:
        found = []
        for split in SPLITS:
            with contextlib.suppress(FileNotFoundError), os.scandir(self.root / split) as entries:
                for entry in entries:
                    if ".mds" in entry.name and not entry.name.startswith("."):
                        with contextlib.suppress(FileNotFoundError):
                            size, path = entry.stat(follow_symlinks=False).st_size, Path(entry.path)
                            found.append(_Shard(_last_use(path), entry.path, size))
        return found

    def _reserved(self) -> int:
        """Bytes that live processes have reserved. Reservations of killed ones are deleted."""
        total = 0
        with os.scandir(self.root) as entries:
            names = [entry.path for entry in entries if entry.name.startswith(_RESERVED)]
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    Path(name).unlink()
                except BlockingIOError:
                    total += os.fstat(descriptor).st_size
                finally:
                    os.close(descriptor)
        return total


class _Reservation:
    """A sparse file of the reserved size, locked by this process."""

    def __init__(self, root: Path, size: int) -> None:
        self._path = root / f"{_RESERVED}{os.getpid()}-{threading.get_ident()}-{next(_numbers)}"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(self._descriptor, size)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _last_use(path: Path) -> float:
    for noted in (lock_path(path), path):
        with contextlib.suppress(OSError):
            return noted.stat().st_mtime
    return 0.0


def _delete(path: str) -> bool:
    """Delete a shard unless a process has it open."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Path(path).unlink()
            return True
        finally:
            os.close(descriptor)
    return False


def least_bytes(raw: Sequence[int], stored: Sequence[int], window: int) -> int:
    """The smallest limit for shards of these sizes: those of a shuffle window, and one that a sequence ends in.

    raw: sizes of the shards of a split. stored: sizes of compressed ones, of which one exists beside its shard while it
    is unpacked; empty if they are not compressed.
    """
    return sum(sorted(raw, reverse=True)[: window + 1]) + max(stored, default=0)


def check_limit(limit: int, root: Path, raw: Sequence[int], stored: Sequence[int], window: int) -> None:
    """Raise DataError if `limit` is smaller than `least_bytes`."""
    need = least_bytes(raw, stored, window)
    if limit < need:
        shards = min(window + 1, len(raw))
        raise DataError(
            f"data.source.cache_bytes: {limit:,} bytes do not hold the {shards} largest shards of {root} "
            f"({need:,} bytes): those of a shuffle window (data.shuffle_window: {window}) and the one in which a "
            f"sequence may end; use at least {need}, a smaller shuffle_window, or a dataset with a smaller shard_bytes"
        )
