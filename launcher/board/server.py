"""`headway board RUN...`: serve TensorBoard for runs and studies, by default only on this machine."""

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
from headway.launcher.run.record_check import check_records
from headway.launcher.run.run_dir import RunDir

LOOPBACK = "127.0.0.1"
_DEEPEST = 4  # maximum depth of a run below the named folder: probes/TASK/cells/VARIANT/seed-N


def board(paths: Sequence[Path], *, host: str, port: int | None, expose: bool, rebuild_files: bool, serve: bool) -> int:
    """Serve TensorBoard for the runs at or below each of `paths` until a signal arrives. Returns 0.

    `port`: None selects 6006 or the next free port, 0 any free port. A `host` other than this machine requires
    `expose`. `rebuild_files`: first rebuild the event files of each run from metrics.jsonl. `serve` False starts no
    server. Raises NoInputError if there is no run, SpecError for an invalid address or a run that is being trained.
    """
    address = _address(host, expose)
    if port is not None and not 0 <= port <= 65535:
        raise SpecError(f"--port: {port} is not a port; use 1 to 65535, or 0 for any free port")
    found = {path: runs_below(path) for path in paths}
    runs = [run for below in found.values() for run in below]
    if rebuild_files:
        for run in runs:
            lost = rebuild(run)
            print(f"{run.tensorboard}: rebuilt from {run.metrics.name}{f'; {lost}' if lost else ''}", flush=True)
    for run in runs:
        if damage := check_records(run.path).damage:
            console.alert(f"DAMAGED: {run.path}: {damage}; restore the folder from a copy")
    if not rebuild_files and (empty := [run for run in runs if not any(run.tensorboard.glob(f"{EVENTS}*"))]):
        print(
            f"{len(empty)} of {len(runs)} runs have no event files, for example {empty[0].path}; if they were trained "
            "with tracking.tensorboard=false, `--rebuild` creates the files from metrics.jsonl",
            flush=True,
        )
    if serve:
        with _log_folder([_shown(path, below) for path, below in found.items()]) as folder:
            _serve(folder, address, port)
    return 0


def runs_below(path: Path) -> list[RunDir]:
    """The run in a folder, or the runs below it (of a study or probes). Raises NoInputError if there is none."""
    if _is_run(path):
        return [RunDir(path)]
    for depth in range(1, _DEEPEST + 1):
        if found := sorted({p.parent for p in path.glob("*/" * depth + "metrics.jsonl") if _is_run(p.parent)}):
            return [RunDir(p) for p in found]
    raise NoInputError(
        f"{path}: no run in this folder or below it; name the folder with metrics.jsonl, or the folder of a study"
    )


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file() or (path / "tensorboard").is_dir()


def _address(host: str, expose: bool) -> str:
    """The address to listen at. Raises SpecError if other machines can reach it and `expose` is False."""
    try:
        address = ipaddress.ip_address(LOOPBACK if host == "localhost" else host)
    except ValueError as e:
        raise SpecError(
            f"--host: {printable(host)} is not an address; use {LOOPBACK} (this machine), or the address of an "
            "interface"
        ) from e
    if not address.is_loopback and not expose:
        raise SpecError(
            f"--host: {address} can be reached from other machines, and TensorBoard has no password; omit --host and "
            "connect through ssh (the command is printed), or add --expose to give everyone in that network access"
        )
    return str(address)


def _shown(path: Path, below: Sequence[RunDir]) -> Path:
    """The folder for TensorBoard: the event files of a run, or the parent of several runs, to include later runs."""
    return below[0].tensorboard if below[0].path == path else path


@contextlib.contextmanager
def _log_folder(folders: Sequence[Path]) -> Iterator[Path]:
    """The log folder for TensorBoard: a single parent folder itself, else a temporary folder with a link per run."""
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
    """Run TensorBoard in threads of this process, until SIGINT or SIGTERM."""
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
        raise HeadwayError(f"--port: {e.msg}; use another --port, or 0 for any free port") from e
    at = urlparse(url).port
    print(f"TensorBoard: {url}  (stop with Ctrl-C)", flush=True)
    if ipaddress.ip_address(host).is_loopback:
        print(f"from another machine: ssh -N -L {at}:{host}:{at} {_login()}", flush=True)
    else:
        console.warn(f"WARNING: everyone who can reach {host}:{at} can read it, because there is no password")
    stop.wait()


def _login() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "USER"
    return printable(f"{user}@{socket.gethostname()}")
