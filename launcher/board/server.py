"""`headway board RUN...`: TensorBoard over runs and studies, for this machine alone unless told otherwise."""

from __future__ import annotations

import contextlib
import getpass
import ipaddress
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlparse

from headway.launcher.base import console
from headway.launcher.base.errors import HeadwayError, NoInputError, SpecError, printable
from headway.launcher.board.files import EVENTS, rebuild
from headway.launcher.run.run_dir import RunDir

LOOPBACK = "127.0.0.1"
_DEEPEST = 4  # of a run below the folder that is named: probes/TASK/cells/VARIANT/seed-N


def board(paths: Sequence[Path], *, host: str, port: int | None, expose: bool, rebuild_files: bool, serve: bool) -> int:
    """Show what the runs at or below each of `paths` have recorded, until a signal comes; returns 0.

    `port`: None takes 6006 or the next that is free, 0 any. `host` beyond this machine needs `expose`.
    `rebuild_files`: make each run's event files anew from metrics.jsonl first. Without `serve` nothing is started.
    Raises NoInputError where there is no run, SpecError for an address or a run that is still trained.
    """
    address = _address(host, expose)
    if port is not None and not 0 <= port <= 65535:
        raise SpecError(f"--port: {port} is no port; name one from 1 to 65535, or 0 for any that is free")
    found = {path: runs_below(path) for path in paths}
    runs = [run for below in found.values() for run in below]
    if rebuild_files:
        for run in runs:
            lost = rebuild(run)
            print(f"{run.tensorboard}: made anew from {run.metrics.name}{f'; {lost}' if lost else ''}", flush=True)
    elif empty := [run for run in runs if not any(run.tensorboard.glob(f"{EVENTS}*"))]:
        print(
            f"{len(empty)} of {len(runs)} runs have nothing to show yet, the first is {empty[0].path}; `--rebuild` "
            "makes it from metrics.jsonl where a run was trained with tracking.tensorboard=false",
            flush=True,
        )
    if serve:
        with _log_folder([_shown(path, below) for path, below in found.items()]) as folder:
            _serve(folder, address, port)
    return 0


def runs_below(path: Path) -> list[RunDir]:
    """The run in a folder, or those below it (a study's, those of probes). Raises NoInputError where there is none."""
    if _is_run(path):
        return [RunDir(path)]
    for depth in range(1, _DEEPEST + 1):
        if found := sorted({p.parent for p in path.glob("*/" * depth + "metrics.jsonl") if _is_run(p.parent)}):
            return [RunDir(p) for p in found]
    raise NoInputError(
        f"{path}: there is no run here, and none below; name the folder that holds metrics.jsonl, or that of a study"
    )


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file() or (path / "tensorboard").is_dir()


def _address(host: str, expose: bool) -> str:
    """The address to listen at; raises SpecError where others could reach it and nobody said that they may."""
    try:
        address = ipaddress.ip_address(LOOPBACK if host == "localhost" else host)
    except ValueError as e:
        raise SpecError(
            f"--host: {printable(host)} is no address; use {LOOPBACK} (this machine), or the address of an interface"
        ) from e
    if not address.is_loopback and not expose:
        raise SpecError(
            f"--host: {address} can be reached from other machines, and TensorBoard asks nobody for a password; leave "
            "it out and go through ssh (the command is shown), or add --expose to let everyone there read it"
        )
    return str(address)


def _shown(path: Path, below: Sequence[RunDir]) -> Path:
    """What TensorBoard is given: a run's view, or the folder above several, so that runs to come are seen too."""
    return below[0].tensorboard if below[0].path == path else path


@contextlib.contextmanager
def _log_folder(folders: Sequence[Path]) -> Iterator[Path]:
    """One folder above several runs as it is; else a temporary one with a link to each view, named after its run."""
    if len(folders) == 1 and folders[0].name != "tensorboard":
        yield folders[0].resolve()
        return
    with tempfile.TemporaryDirectory(prefix="headway-board-") as temporary:
        for folder in folders:
            whole = folder.resolve()
            name = whole.parent.name if folder.name == "tensorboard" else whole.name
            link, number = Path(temporary) / name, 1
            while link.is_symlink():
                number += 1
                link = link.with_name(f"{name}-{number}")
            link.symlink_to(whole)
        yield Path(temporary)


def _serve(folder: Path, host: str, port: int | None) -> None:
    """TensorBoard in threads of this process, until SIGINT or SIGTERM."""
    from tensorboard import default, program

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server = program.TensorBoard(plugins=default.get_plugins())
    wanted = ["--port", str(port)] if port is not None else []
    server.configure(argv=["tensorboard", "--logdir", str(folder), "--host", host, *wanted])
    try:
        url = server.launch()
    except program.TensorBoardServerException as e:
        raise HeadwayError(f"--port: {e.msg}; name another --port, or 0 for any that is free") from e
    at = urlparse(url).port
    print(f"TensorBoard: {url}  (Ctrl-C ends it)", flush=True)
    if ipaddress.ip_address(host).is_loopback:
        print(f"from another machine: ssh -N -L {at}:{host}:{at} {_login()}", flush=True)
    else:
        console.warn(f"EVERYONE who reaches {host}:{at} can read it: there is no password")
    stop.wait()


def _login() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "USER"
    return printable(f"{user}@{socket.gethostname()}")
