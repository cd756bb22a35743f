"""What is executed on each host, and in which environment: the same for a real start and for `--dry-run`."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headway.launcher.base.errors import SpecError, printable
from headway.launcher.hosts.place import rendezvous_port
from headway.launcher.run.run_dir import RunDir

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

# Where programs, the user, libraries, caches and devices are on a host. Anything else that ranks are to see stands in
# the spec (launch.env), so that a run does not depend on the shell of each host.
INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TZ", "LANG", "LC_ALL", "LC_CTYPE"),
    *("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"),
    *("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "HF_HOME", "SSL_CERT_FILE"),
    "HEADWAY_FAULT",  # a drill: headway.parallel.fault_points
)


def command(spec: Spec, run: RunDir, *, host: int = 0, port: int | str | None = None) -> list[str]:
    """What the launcher of a host executes: torchrun or DeepSpeed's launcher around the worker, or one worker alone.

    `port`: of the rendezvous; None takes the spec's, and any free one on a single host.
    """
    launch, worker = spec.launch, ["headway.launcher.train.worker", str(run.path.resolve())]
    python = [sys.executable, "-P", "-m"]
    if launch.method == "deepspeed":
        return [
            *[*python, "deepspeed.launcher.runner", "--hostfile", str(hostfile(run)), "--no_ssh"],
            *["--node_rank", str(host), "--master_addr", launch.address or "127.0.0.1"],
            *["--master_port", str(port or _port(spec)), "--no_local_rank", "--module", *worker],
        ]
    if launch.world_size == 1:
        return [*python, *worker]
    where = ["--standalone"]
    if launch.hosts > 1:
        assert launch.address is not None, "LaunchConfig asks for it, and a job of Slurm brings it"
        where = ["--node-rank", str(host), "--master-addr", launch.address, "--master-port", str(port or _port(spec))]
    elif launch.port is not None:
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{launch.port}", "--rdzv-id", "headway"]
    return [
        *[*python, "torch.distributed.run", *where, "--nnodes", str(launch.hosts)],
        # What torchrun writes for itself would else stay in the temporary folder when it is killed.
        *["--log-dir", str(torchrun_folder(run)), "--nproc-per-node", str(launch.processes)],
        *["--max-restarts", "0", "-m", *worker],
    ]


def worker_environment(spec: Spec, *, interface: str | None = None) -> dict[str, str]:
    """What Headway sets for the ranks. `interface` of this host is for several hosts; the spec's comes first."""
    launch, cores = spec.launch, len(os.sched_getaffinity(0))
    threads = launch.threads or max(1, cores // launch.processes)
    env = {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if "HOME" in os.environ:  # else torch keeps compiled code in /tmp, under a name that others can take first
        env["TORCHINDUCTOR_CACHE_DIR"] = str(Path(os.environ["HOME"]) / ".cache" / "headway" / "inductor")
    interface = launch.interface or interface
    if interface is not None:
        env |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    if launch.world_size == 1 and launch.method != "deepspeed":
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(launch.port or free_port())
    return env


def check_caches(environment: Mapping[str, str]) -> None:
    """Raises SpecError where others may write into a folder out of which ranks load compiled code."""
    for name in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"):
        folder = environment.get(name)
        if folder is None or not (path := Path(folder)).is_dir():
            continue
        found = path.stat()
        if found.st_mode & 0o022 or found.st_uid not in (0, os.getuid()):
            raise SpecError(
                f"{name}: others can write into {printable(folder, 300)}, and ranks run the code they find there; "
                f"take that away with `chmod go-w` (and own it), or unset {name}"
            )


def forwarded(spec: Spec, environment: Mapping[str, str]) -> dict[str, str]:
    """Values of launch.env; raises SpecError where one is to be taken from an environment that does not have it."""
    missing = [name for name, value in spec.launch.env.items() if value is None and name not in environment]
    if missing:
        raise SpecError(
            f"launch.env: {', '.join(missing)} not set where this command was started; set it there, or give the value "
            "in the spec"
        )
    return {name: environment[name] if value is None else value for name, value in spec.launch.env.items()}


def full_environment(spec: Spec, extra: Mapping[str, str], *, interface: str | None = None) -> dict[str, str]:
    """The whole environment of the ranks: this host's own of `INHERITED`, `extra` (launch.env), and Headway's."""
    own = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {**own, **extra, **worker_environment(spec, interface=interface)}


def torchrun_folder(run: RunDir) -> Path:
    """For what torchrun writes for itself; removed at the end of each start."""
    return run.logs.resolve() / "torchrun"


def hostfile(run: RunDir) -> Path:
    """Where the hostfile for DeepSpeed's launcher is written."""
    return run.path.resolve() / "hostfile"


def free_port() -> int:
    """A port that no process listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _port(spec: Spec) -> int:
    return rendezvous_port(spec) if spec.launch.hosts > 1 else spec.launch.port or free_port()


# ---------------------------------------------------------------- as text


def dry_run_text(spec: Spec, run: RunDir, *, names: Sequence[str] | None = None, port: int | str | None = None) -> str:
    """Environment and command of every host, as a shell would read them.

    A variable that a host takes from its own environment is shown as such, so secrets stay where they are.
    """
    launch = spec.launch
    if launch.hosts == 1:
        return _line(spec, command(spec, run, port=port))
    texts = [] if launch.interface else ["# GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are set to each host's interface"]
    texts += [] if launch.interface else [f"# that leads to {launch.address}"]
    for host in range(launch.hosts):
        name = names[host] if names else launch.address if host == 0 else "--node-rank " + str(host)
        texts += [f"# host {host} of {launch.hosts} ({name})", _line(spec, command(spec, run, host=host, port=port))]
    return "\n".join(texts)


def _line(spec: Spec, words: Sequence[str]) -> str:
    taken = [name for name in INHERITED if name in os.environ]
    taken += [name for name, value in spec.launch.env.items() if value is None]
    fixed = {name: value for name, value in spec.launch.env.items() if value is not None} | worker_environment(spec)
    shown = [f'{name}="${name}"' for name in taken] + [f"{name}={shlex.quote(value)}" for name, value in fixed.items()]
    return " ".join(["env", "-i", *shown, shlex.join(words)])
