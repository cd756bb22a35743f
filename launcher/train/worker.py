"""One training process: `python -m headway.launcher.train.worker RUN_DIR`, started by `headway train`, one per rank."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from headway.launcher.run import heartbeat

PREEMPTED, STORAGE = 75, 74

# Full, over quota, too large, failing, read-only: what a log or metrics file meets on a disk that is not well.
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class Preempted(Exception):
    """SIGTERM or SIGINT came; the state is saved and the same command continues."""

    exit_code = PREEMPTED


def main() -> int:
    """Train the run in the folder named by the first argument; the exit status tells the launcher how it ended."""
    run_path, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    logs = run_path / "logs"
    error_file = logs / f"rank-{rank}.error.json"
    error_file.unlink(missing_ok=True)
    stop = _StopFlag()  # a signal during the set-up counts too
    _die_with_parent()
    _own_log(logs / f"rank-{rank}.log", main=rank == 0)
    try:
        heartbeat.start(logs, rank)
        (logs / f"rank-{rank}.pid").write_text(str(os.getpid()))
        train(run_path, stop)
        return 0
    except BaseException as e:
        code, message = getattr(e, "exit_code", None), str(e)
        if isinstance(e, OSError) and e.errno in _STORAGE_ERRORS:
            code, message = STORAGE, f"{e}; free space or mend the disk, then start the same command again"
        report = {"rank": rank, "exit_code": code, "type": type(e).__name__, "message": message}
        if not isinstance(e, Preempted):
            traceback.print_exc()
        with contextlib.suppress(OSError):  # a full disk must not hide the error it caused
            error_file.write_text(json.dumps(report))
        sys.stderr.flush()
        # Peers may be inside a collective with this rank; leaving at once closes the connection and ends them too.
        os._exit(code if isinstance(code, int) else 1)


def train(run_path: Path, stop: _StopFlag) -> None:
    """The training loop."""
    import torch

    from headway.launcher.run.run_dir import RunDir
    from headway.launcher.train.session import Session

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    run = RunDir(run_path)
    with contextlib.ExitStack() as stack:
        s = stack.enter_context(Session.open(run))
        spec = s.spec
        while s.step < spec.steps:
            heartbeat.beat("data", s.step + 1)
            t0 = time.perf_counter()
            batch = next(s.loader)
            data_s = time.perf_counter() - t0
            heartbeat.beat("step", s.step + 1)
            agreed = s.agree(batch, stop.raised)
            stats = s.train_step(batch, agreed)
            s.record(stats, digest=agreed.digest, data_s=data_s, step_s=time.perf_counter() - t0)
            if s.due("validation"):
                s.validate()
            if s.due("checkpoint") or agreed.save or agreed.stop:
                s.checkpoint(last=agreed.stop or s.step == spec.steps)
            elif agreed.written:
                s.saving.settle(s.tracker)
            if agreed.stop and s.step < spec.steps:
                raise Preempted(f"stopped after step {s.step} by a signal; the same command continues from there")
        s.finish()


class _StopFlag:
    """Raised by SIGTERM, SIGUSR1 or SIGINT; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.raised = False
        signal.signal(signal.SIGTERM, self._raise)
        signal.signal(signal.SIGUSR1, self._raise)
        signal.signal(signal.SIGINT, self._raise)

    def _raise(self, signum: int, frame: Any) -> None:
        if self.raised and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised = True


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, so that no orphan goes on writing into the folder."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Log(io.TextIOWrapper):
    """Text into a log. What a full or failing disk does not take is lost, and ends no training."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace", write_through=True)

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)


def _own_log(path: Path, *, main: bool) -> None:
    """Send stderr of every rank, and stdout of all but rank 0, to the rank's log file."""
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


if __name__ == "__main__":
    sys.exit(main())
