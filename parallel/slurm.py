"""Config section `launch.slurm`: what a Slurm job asks for, and how its hosts start their launchers."""

from __future__ import annotations

import re
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,-]{0,127}$")]


class _Program(NamedTuple):
    """A program of Slurm. `field`: option -> the key that sets it. `refused`: options that Headway depends on."""

    name: Literal["sbatch", "srun"]
    field: dict[str, str]
    refused: frozenset[str]
    values: re.Pattern[str]
    example: str


_SBATCH = _Program(
    name="sbatch",
    field={
        "partition": "slurm.partition",
        "account": "slurm.account",
        "time": "slurm.time",
        "gpus-per-node": "slurm.gpus_per_node",
        "cpus-per-task": "slurm.cpus_per_task",
        "requeue": "slurm.requeue",
        "no-requeue": "slurm.requeue",
        "signal": "slurm.warn_s",
        "nodes": "hosts",
        "job-name": "name of the spec",
        "chdir": "folder the command is started in",
        "output": "run_dir of the spec",
        "error": "run_dir of the spec",
    },
    refused=frozenset(
        [
            *("ntasks", "ntasks-per-node", "array", "wrap", "open-mode", "parsable", "wait", "test-only", "hold"),
            "dependency",
        ]
    ),
    values=re.compile(r"[A-Za-z0-9_.,:/@+*()&|-]+"),  # part of an #SBATCH line, where sbatch has its own rules
    example="--exclusive or --gres=tmp:10G",
)

_SRUN = _Program(
    name="srun",
    field={"nodes": "hosts", "cpus-per-task": "slurm.cpus_per_task", "chdir": "folder the command is started in"},
    refused=frozenset(
        ["ntasks", "ntasks-per-node", "kill-on-bad-exit", "multi-prog", "pty", "bcast", "no-kill", "relative", "wait"]
    ),
    values=re.compile(r"[A-Za-z0-9_.,:/@+*()&|=#~%{}-]+"),  # quoted in the script
    example="--cpu-bind=cores or --container-image=registry.example.org#team/image:1",
)


class SlurmConfig(BaseModel):
    """Options of the Slurm job, besides its hosts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    partition: _Word | None = Field(default=None, description="sbatch --partition")
    account: _Word | None = Field(default=None, description="sbatch --account")
    time: str | None = Field(
        default=None, pattern=r"^([0-9]{1,3}-)?[0-9]{1,4}(:[0-9]{2}){0,2}$", description="sbatch --time, as 1-12:00:00"
    )
    memory: str | None = Field(
        default=None,
        pattern=r"^(0|[1-9][0-9]{0,8}[KMGT]?)$",
        description="sbatch --mem, per host, as 64G; 0: all of it",
    )
    gpus_per_node: int | None = Field(
        default=None, ge=1, le=64, description="sbatch --gpus-per-node; none: `processes` where the device is cuda"
    )
    cpus_per_task: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="CPUs of each host, for sbatch and srun; none: processes x threads if `threads` is set",
    )
    requeue: bool = Field(default=True, description="requeue the job after its time limit or a node failure")
    warn_s: int = Field(
        default=300, ge=30, le=3600, description="seconds before the time limit at which the job saves and stops"
    )
    options: tuple[str, ...] = Field(
        default=(), strict=False, description="additional options of sbatch, each as --name or --name=value"
    )
    srun: tuple[str, ...] = Field(
        default=(), strict=False, description="additional options of srun: containers and their mounts, --cpu-bind, ..."
    )
    setup: tuple[str, ...] = Field(
        default=(), strict=False, description="lines of the job script before the command: modules, activation"
    )
    python: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_./+@-]{1,512}$",
        description="Python of the hosts of the job; none: the one that submits it",
    )

    @model_validator(mode="after")
    def _check(self) -> SlurmConfig:
        for key, program, options in (("options", _SBATCH, self.options), ("srun", _SRUN, self.srun)):
            for option in options:
                _check_option(key, program, option)
        if self.memory is not None and any(name_of(option).startswith("mem") for option in self.options):
            raise ValueError("memory: options set the memory too; use one of them, or leave memory out")
        if self.python is not None and (self.python.startswith("-")):
            raise ValueError(
                f"python: {self.python!r} is no path of a program; use an absolute path, or a name in PATH"
            )
        for line in self.setup:
            if not line.strip() or len(line) > 4096 or not line.isprintable() or line.lstrip().startswith("#"):
                raise ValueError(
                    f"setup: {line[:80]!r} is not one line of the shell; use one command an entry, such as "
                    "`module load cuda`, or leave it out"
                )
        return self

    @property
    def asks_gpus(self) -> bool:
        """Whether `options` ask for GPUs."""
        return any(name_of(o).startswith(("gpus", "gres")) and "gpu" in o for o in self.options)


def name_of(option: str) -> str:
    """Name of an option of sbatch or srun, without its dashes and value."""
    return option.removeprefix("--").partition("=")[0]


def _check_option(key: str, program: _Program, option: str) -> None:
    found = re.fullmatch(r"--([a-z][a-z0-9-]*)(=(.+))?", option, re.ASCII)
    if found is None or (found[3] is not None and not program.values.fullmatch(found[3])):
        raise ValueError(
            f"{key}: {option[:80]!r} is not a single {program.name} option of plain characters; "
            f"use --name or --name=value, such as {program.example}"
        )
    if found[1] in program.field:
        raise ValueError(f"{key}: --{found[1]} is set by Headway; use {program.field[found[1]]}, or leave it out")
    if found[1] in program.refused:
        raise ValueError(
            f"{key}: --{found[1]} would change how the hosts are started; use hosts and processes, or leave it out"
        )
