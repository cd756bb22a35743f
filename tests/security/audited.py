"""A whole run in one process that records its effects on the machine: python audited.py REPORT SPEC OVERRIDES...

Connections to anything but this host are refused, as without a network.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

done: dict[str, set[str]] = defaultdict(set)
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
_LOCAL = ("127.0.0.1", "localhost", "::1")


def hook(event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if isinstance(path, str | bytes):
            done["written" if writes else "read"].add(str(Path(os.fsdecode(path)).absolute()))
    elif event in _CHANGES:
        done["written"] |= {_where(os.fsdecode(p), args) for p in args if isinstance(p, str | bytes)}
    elif event in _STARTS:
        done["started"].add(str(args[:2]))
    elif event == "pickle.find_class":
        done["unpickled"].add(".".join(map(str, args)))
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        address = args[1] if event in ("socket.connect", "socket.sendto", "socket.bind") else args
        host = address[0] if isinstance(address, tuple) else str(address)
        if host not in _LOCAL:
            done["network"].add(f"{event} {address}")
            raise OSError(f"no network: {event} {address}")


def _where(path: str, args: tuple[Any, ...]) -> str:
    """The absolute path; the folder itself for a path relative to an open folder."""
    folders = [n for n in args if isinstance(n, int) and n >= 0 and Path(f"/proc/self/fd/{n}").is_dir()]
    relative = not Path(path).is_absolute() and folders
    return str(Path(f"/proc/self/fd/{folders[0]}").readlink() if relative else Path(path).absolute())


def train(spec_file: str, overrides: list[str]) -> None:
    """Run `headway train`'s launcher code, and then the code of its one rank."""
    from headway.launcher.cli import main as cli
    from headway.launcher.run.resolve import resolve
    from headway.launcher.run.run_dir import RunDir
    from headway.launcher.spec.load import load_spec
    from headway.launcher.train import worker

    assert cli.main(["train", spec_file, *overrides, "--dry-run"]) == 0
    spec = resolve(load_spec(spec_file, overrides).spec)[0]
    run = RunDir.of(spec)
    with run.locked():
        run.adopt(spec)
        run.logs.mkdir(parents=True)
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
        os.environ["MASTER_PORT"] = "0"
        sys.argv = ["worker", str(run.path)]
        assert worker.main() == 0


if __name__ == "__main__":
    report, spec_name, *rest = sys.argv[1:]
    sys.addaudithook(hook)
    try:
        train(spec_name, rest)
    finally:
        Path(report).write_text(json.dumps({key: sorted(values) for key, values in done.items()}))
