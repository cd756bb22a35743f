"""The hosts of a run: the number of this host, hostfiles, and the start of the other hosts by ssh."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headway.launcher.base.command import COMMAND
from headway.launcher.base.errors import HeadwayError, SpecError
from headway.launcher.spec.yamlio import read_text

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec

PORT = 29_500
"""Default port of the rendezvous between several hosts."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """This host within the run. `name`: its name in messages."""

    host: int
    hosts: int
    processes: int
    name: str

    @property
    def ranks(self) -> range:
        """Ranks that run on this host."""
        return range(self.host * self.processes, (self.host + 1) * self.processes)

    @property
    def is_first(self) -> bool:
        return self.host == 0


def this_host(spec: Spec, node_rank: int | None, environment: Mapping[str, str]) -> int:
    """Number of this host in the run: `--node-rank`, or SLURM_NODEID within a Slurm job step.

    Raises SpecError if neither is given, or if the run has no such host.
    """
    launch = spec.launch
    if node_rank is None and "SLURM_STEP_ID" in environment and launch.hosts > 1:
        node_rank = int(environment["SLURM_NODEID"])
    if node_rank is None and (launch.hosts == 1 or launch.ssh):
        return 0
    if node_rank is None:
        raise SpecError(
            f"launch.hosts: this run has {launch.hosts} hosts, and the number of this host is unknown; use "
            f"--node-rank 0 on the first ({launch.address}) and 1 to {launch.hosts - 1} on the others, or "
            "launch.hosts=1"
        )
    if not 0 <= node_rank < launch.hosts:
        raise SpecError(
            f"--node-rank: {node_rank} is out of range for a run of {launch.hosts} host(s); use 0 to "
            f"{launch.hosts - 1}, or another launch.hosts"
        )
    return node_rank


def check_address(spec: Spec) -> None:
    """Raise SpecError if several hosts have no address to meet at. Under Slurm, only a job of Headway sets it."""
    launch = spec.launch
    if launch.hosts > 1 and launch.address is None:
        raise SpecError(
            f"launch.address: {launch.hosts} hosts need the address of the first one, which the job script of `headway "
            "train` sets, and this command was not started by it; start it without --node-rank, outside of a job step, "
            "to submit that job, or within a job of your own add launch.address=NAME, the first line of `scontrol show "
            'hostnames "$SLURM_JOB_NODELIST"`'
        )


def rendezvous_port(spec: Spec) -> int:
    """Port of torch's rendezvous between several hosts; their launchers use the next port."""
    return spec.launch.port or PORT


# ---------------------------------------------------------------- hostfiles


def read_hostfile(spec: Spec) -> list[str] | None:
    """Names of the hosts in `launch.hostfile`, in order; None if the spec has no hostfile.

    Raises NoInputError if it cannot be read, and SpecError if it does not fit the spec. Names become arguments of
    other programs, so only letters, digits and ._- are accepted.
    """
    path = spec.launch.hostfile
    if path is None:
        return None
    lines = read_text(Path(path), f"launch.hostfile: {path}").splitlines()
    names: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{0,252})\s+slots=([0-9]{1,4})", text, re.ASCII)
        if found is None or found[1] in names:
            what = "repeats a host" if found else "is not `name slots=N`"
            raise SpecError(f"{path}:{number}: {text[:80]!r} {what}; fix the line, or remove launch.hostfile")
        if int(found[2]) != spec.launch.processes:
            raise SpecError(
                f"{path}:{number}: {found[2]} slots, but launch.processes is {spec.launch.processes} on every host; "
                f"write slots={spec.launch.processes}, or use launch.processes={found[2]}"
            )
        names.append(found[1])
    if len(names) != spec.launch.hosts:
        fewer = f"use launch.hosts={len(names)}, or a file with {spec.launch.hosts} hosts"
        none = f"write a line `name slots={spec.launch.processes}` for each host, or remove launch.hostfile"
        raise SpecError(
            f"launch.hostfile: {path} names {len(names)} hosts, but launch.hosts is {spec.launch.hosts}; "
            f"{fewer if names else none}"
        )
    return names


def hostfile_text(spec: Spec, names: Sequence[str] | None) -> str:
    """Text of the hostfile for DeepSpeed's launcher.

    Without names from the user, any names will do, because the launcher does not connect to them.
    """
    names = names or [f"host-{n}" for n in range(spec.launch.hosts)]
    return "".join(f"{name} slots={spec.launch.processes}\n" for name in names)


# ---------------------------------------------------------------- by ssh


def remote_command(name: str, host: int, arguments: Sequence[str], folder: Path) -> list[str]:
    """The ssh command that runs `headway train` on another host in the same folder, quoted for the remote shell."""
    inner = [*COMMAND, "train", *arguments, "--node-rank", str(host)]
    text = f"cd {shlex.quote(str(folder))} && exec {shlex.join(inner)}"
    return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", name, text]


def check_ssh(names: Sequence[str]) -> None:
    """Raises HeadwayError with the hosts on which ssh cannot run a command without a prompt."""
    probes = {
        name: subprocess.Popen(
            ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", name, "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    failed = []
    for name, probe in probes.items():
        try:
            _, said = probe.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            probe.kill()
            _, said = probe.communicate()
            said = said or "no answer within 30 s"
        if probe.returncode:
            failed.append(f"{name}: {said.strip().splitlines()[-1] if said.strip() else f'status {probe.returncode}'}")
    if failed:
        raise HeadwayError(
            f"launch.ssh: ssh cannot run a command on {'; '.join(failed)}\n"
            f"set up keys and known_hosts until `ssh -o BatchMode=yes {failed[0].partition(':')[0]} true` succeeds, or "
            "use launch.ssh=false and start the same command with --node-rank on each host"
        )


def start_others(
    names: Sequence[str], arguments: Sequence[str], folder: Path, logs: Path
) -> list[subprocess.Popen[bytes]]:
    """Start the launcher on every host except the first, by ssh. Their output goes to logs/ssh-N.log."""
    started = []
    for host, name in enumerate(names[1:], start=1):
        with (logs / f"ssh-{host}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    remote_command(name, host, arguments, folder),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches only the first host's launcher, which ends the run
                    env={n: v for n, v in os.environ.items() if n != "SSH_ASKPASS"},
                )
            )
    return started
