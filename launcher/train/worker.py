"""One training process: `python -m headway.launcher.train.worker RUN_DIR`, started by `headway train`, one per rank."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from headway.launcher.base.command import die_with_parent
from headway.launcher.run import heartbeat
from headway.launcher.train.allocator import keep_buffers
from headway.launcher.train.stop import Preempted, StopFlag

STORAGE = 74

# Errors when writing logs or metrics to a disk: full, over quota, file too large, I/O error, read-only.
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def main() -> int:
    """Train the run in the folder of the first argument. The exit status tells the launcher how the run ended."""
    run_path, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    logs = run_path / "logs"
    error_file = logs / f"rank-{rank}.error.json"
    error_file.unlink(missing_ok=True)
    stop = StopFlag()  # before the set-up, so that a signal during it is not lost
    keep_buffers()
    die_with_parent()  # so that no orphan process continues to write into the folder
    _own_log(logs / f"rank-{rank}.log", main=rank == 0)
    try:
        heartbeat.start(logs, rank)
        (logs / f"rank-{rank}.pid").write_text(str(os.getpid()))
        _train(run_path, stop)
        return 0
    except BaseException as e:
        code, message = getattr(e, "exit_code", None), str(e)
        if isinstance(e, OSError) and e.errno in _STORAGE_ERRORS:
            code, message = STORAGE, f"{e}; free space or mend the disk, then start the same command again"
        report = {"rank": rank, "exit_code": code, "type": type(e).__name__, "message": message}
        if not isinstance(e, Preempted):
            traceback.print_exc()
        with contextlib.suppress(OSError):  # a full disk must not hide the error that it caused
            error_file.write_text(json.dumps(report))
        sys.stderr.flush()
        # Peers may wait in a collective for this rank. An immediate exit closes the connections and ends them too.
        os._exit(code if isinstance(code, int) else 1)


def _train(run_path: Path, stop: StopFlag) -> None:
    import torch  # imported here, because the import takes seconds and signals must be handled during them

    from headway.launcher.run.run_dir import RunDir
    from headway.launcher.train.loop import train

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    train(RunDir(run_path), stop)


class _Log(io.TextIOWrapper):
    """Text stream to a log. Text that a full or failing disk rejects is lost, but does not end the training."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace", write_through=True)

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)


def _own_log(path: Path, *, main: bool) -> None:
    """Redirect stderr of every rank, and stdout of all ranks except rank 0, to the log file of the rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 2)
    if not main:
        os.dup2(fd, 1)
    os.close(fd)
    sys.stderr = _Log(os.fdopen(2, "wb", buffering=0, closefd=False))
    if not main:
        sys.stdout = _Log(os.fdopen(1, "wb", buffering=0, closefd=False))
    print(f"=== attempt of {time.strftime('%Y-%m-%dT%H:%M:%S%z')}, process {os.getpid()}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End the process without the interpreter's teardown, in which a thread of gloo can abort a rank that is done.

    Everything is on disk by then: `main` has closed records and checkpoints.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
