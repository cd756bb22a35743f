"""`headway board RUN...`: serve TensorBoard for runs and studies, by default only on this machine."""

from __future__ import annotations

import getpass
import ipaddress
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from headway.launcher.base import console
from headway.launcher.base.errors import HeadwayError, SpecError, printable
from headway.launcher.board.files import EVENTS, rebuild
from headway.launcher.board.links import log_folder, runs_below
from headway.launcher.run.record_check import check_records

LOOPBACK = "127.0.0.1"


def board(
    paths: Sequence[Path],
    *,
    host: str,
    port: int | None,
    expose: bool,
    rebuild_files: bool,
    serve: bool,
    per_layer: bool | None = None,
    send: bool = False,
) -> int:
    """Serve TensorBoard for the runs at or below each of `paths` until a signal arrives. Returns 0.

    `port`: None selects 6006 or the next free port, 0 any free port. A `host` other than this machine requires
    `expose`. `rebuild_files`: first rebuild the event files of each run from metrics.jsonl; `per_layer`: with the
    scalars of each layer (None: as the spec of the run says). `send`: send W&B and MLflow what they lack of complete
    runs. `serve` False starts no server. Raises NoInputError if there is no run, SpecError for an invalid address or a
    run that is being trained.
    """
    address = _address(host, expose)
    if port is not None and not 0 <= port <= 65535:
        raise SpecError(f"--port: {port} is not a port; use 1 to 65535, or 0 for any free port")
    if per_layer and not rebuild_files:
        raise SpecError("--per-layer: event files have it only after --rebuild; add --rebuild, or leave it out")
    runs = [run for path in paths for run in runs_below(path)]
    if rebuild_files:
        for run in runs:
            lost = rebuild(run, per_layer=per_layer)
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
    if send:
        from headway.launcher.board.trackers.sending import send_all

        send_all(runs)
    if serve:
        with log_folder(paths) as folder:
            _serve(folder, address, port)
    return 0


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


def _serve(folder: Path, host: str, port: int | None) -> None:
    """Run TensorBoard in threads of this process, until SIGINT or SIGTERM."""
    from tensorboard import default, program

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server = program.TensorBoard(plugins=_plugins(default.get_plugins()))
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


def _plugins(found: Sequence[Any]) -> list[Any]:
    """The tabs, with the custom layout first: TensorBoard opens on the first tab for which there is data."""
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin

    return sorted(found, key=lambda plugin: plugin is not CustomScalarsPlugin)


def _login() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = "USER"
    return printable(f"{user}@{socket.gethostname()}")
