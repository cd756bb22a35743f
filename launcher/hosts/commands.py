"""The command and the environment of each host, for a real start and for `--dry-run` alike."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headway.launcher.base.errors import HeadwayError, SpecError, printable
from headway.launcher.hosts.place import rendezvous_port
from headway.launcher.run.run_dir import RunDir

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

LOOPBACK = "127.0.0.1"
"""Address at which the processes of a single host meet."""

_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"

# Variables that locate programs, the user, libraries, caches, devices and the way to the network of a host. All other
# variables of the ranks must be in the spec (launch.env), so that a run does not depend on the shell of each host.
INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TZ", "LANG", "LC_ALL", "LC_CTYPE"),
    *("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"),
    *("XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "HF_HOME"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
    "HEADWAY_FAULT",  # fault injection in tests: headway.parallel.fault_points
)


def command(spec: Spec, run: RunDir, *, host: int = 0, port: int | str | None = None) -> list[str]:
    """The command that the launcher of a host executes: torchrun or DeepSpeed's launcher, or a single worker directly.

    `port`: port of the rendezvous; None: the spec's, or any free port on a single host.
    """
    launch, worker = spec.launch, ["headway.launcher.train.worker", str(run.path.resolve())]
    python = [sys.executable, "-P", "-m"]
    if launch.method == "deepspeed":
        return [
            *[*python, "deepspeed.launcher.runner", "--hostfile", str(hostfile(run)), "--no_ssh"],
            *["--node_rank", str(host), "--master_addr", launch.address or LOOPBACK],
            *["--master_port", str(port or _port(spec)), "--no_local_rank", "--module", *worker],
        ]
    if launch.world_size == 1:
        return [*python, *worker]
    # One host needs no name: with --standalone, torchrun would give the ranks the name of this host, which need not
    # resolve to an address.
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{LOOPBACK}:{launch.port or 0}", "--rdzv-id", "headway"]
    where += ["--local-addr", LOOPBACK]
    if launch.hosts > 1:
        assert launch.address is not None, "LaunchConfig requires it, and a Slurm job sets it"
        where = ["--node-rank", str(host), "--master-addr", launch.address, "--master-port", str(port or _port(spec))]
    return [
        *[*python, "torch.distributed.run", *where, "--nnodes", str(launch.hosts)],
        # By default torchrun writes to the temporary folder, and leaves its files there when it is killed.
        *["--log-dir", str(torchrun_folder(run)), "--nproc-per-node", str(launch.processes)],
        *["--max-restarts", "0", "-m", *worker],
    ]


def worker_environment(spec: Spec, *, interface: str | None = None) -> dict[str, str]:
    """Variables that Headway sets for the ranks. `interface`: for several hosts; launch.interface overrides it."""
    launch, cores = spec.launch, len(os.sched_getaffinity(0))
    threads = launch.threads or max(1, cores // launch.processes)
    env = {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    # By default torch caches compiled code in /tmp, under a name that another user can create first.
    if "HOME" in os.environ and _INDUCTOR not in launch.env:
        env[_INDUCTOR] = str(Path(os.environ["HOME"]) / ".cache" / "headway" / "inductor")
    interface = launch.interface or interface
    if interface is not None:
        env |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    if launch.world_size == 1 and launch.method != "deepspeed":
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": LOOPBACK}
        env["MASTER_PORT"] = str(launch.port or free_port())
    return env


def check_caches(environment: Mapping[str, str]) -> None:
    """Raises SpecError if other users can write to a folder from which ranks load compiled code.

    `environment`: variables that the ranks get from this host and from launch.env.
    """
    for name in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", _INDUCTOR):
        folder = environment.get(name)
        if folder is None or not (path := Path(folder)).is_dir():
            continue
        found = path.stat()
        if found.st_mode & 0o022 or found.st_uid not in (0, os.getuid()):
            raise SpecError(
                f"{name}: ranks run code from {printable(folder, 300)}, and other users can write to it; make it your "
                f"own folder and run `chmod go-w` on it, or unset {name} (in the environment or in launch.env)"
            )


def inherited(spec: Spec) -> list[str]:
    """Variables that ranks take from the environment of this host: `INHERITED`, and those of the spec's trackers."""
    of_trackers = (name for service in spec.tracking.services for name in service.variables)
    return [name for name in (*INHERITED, *of_trackers) if name in os.environ]


def forwarded(spec: Spec, environment: Mapping[str, str]) -> dict[str, str]:
    """Values of launch.env. Raises SpecError if a variable with value null is missing in `environment`."""
    missing = [name for name, value in spec.launch.env.items() if value is None and name not in environment]
    if missing:
        raise SpecError(
            f"launch.env: {', '.join(missing)} not set in the environment of this command; set it there, or write its "
            "value in the spec"
        )
    return {name: environment[name] if value is None else value for name, value in spec.launch.env.items()}


def full_environment(spec: Spec, extra: Mapping[str, str], *, interface: str | None = None) -> dict[str, str]:
    """The whole environment of the ranks: `inherited` from this host, `extra` (launch.env), and Headway's variables."""
    own = {name: os.environ[name] for name in inherited(spec)}
    return {**own, **extra, **worker_environment(spec, interface=interface)}


def torchrun_folder(run: RunDir) -> Path:
    """Folder for torchrun's own log files; removed at the end of each start."""
    return run.logs.resolve() / "torchrun"


def hostfile(run: RunDir) -> Path:
    """Path of the hostfile that Headway writes for DeepSpeed's launcher."""
    return run.path.resolve() / "hostfile"


def free_port() -> int:
    """A port on which no process listens now. Raises HeadwayError as `check_loopback` does."""
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, 0))
        except OSError as e:
            raise _no_loopback(e) from e
        return probe.getsockname()[1]


def check_loopback() -> None:
    """Raise HeadwayError if processes of this host cannot connect to each other at 127.0.0.1."""
    with socket.socket() as ear, socket.socket() as caller:
        caller.settimeout(5.0)
        try:
            ear.bind((LOOPBACK, 0))
            ear.listen(1)
            caller.connect(ear.getsockname())
        except OSError as e:
            raise _no_loopback(e) from e


def _no_loopback(error: OSError) -> HeadwayError:
    return HeadwayError(
        f"processes of this host cannot connect to each other at {LOOPBACK} ({error.strerror or error}); bring up the "
        "loopback interface (`ip link set lo up`, as root), or start outside of this container or network namespace"
    )


def _port(spec: Spec) -> int:
    return rendezvous_port(spec) if spec.launch.hosts > 1 else spec.launch.port or free_port()


# ---------------------------------------------------------------- as text


def dry_run_text(spec: Spec, run: RunDir, *, names: Sequence[str] | None = None, port: int | str | None = None) -> str:
    """Environment and command of every host, in shell syntax.

    A variable that a host takes from its own environment is shown as a reference, so that no secret is printed.
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
    taken = inherited(spec)
    taken += [name for name, value in spec.launch.env.items() if value is None]
    fixed = {name: value for name, value in spec.launch.env.items() if value is not None} | worker_environment(spec)
    shown = [f'{name}="${name}"' for name in taken] + [f"{name}={shlex.quote(value)}" for name, value in fixed.items()]
    return " ".join(["env", "-i", *shown, shlex.join(words)])
