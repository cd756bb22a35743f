"""What a run says about processes, precision, optimizer, schedule and checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StrictModel(BaseModel):
    """Frozen, keyword-only, refuses unknown keys and silent type changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class CheckpointError(Exception):
    """A checkpoint cannot be written or must not be read. The message says what to do next."""

    exit_code = 74


class ParallelConfig(StrictModel):
    """Layout and precision. What tensor x pipeline x context leaves of the processes is data parallel."""

    tensor: int = Field(
        default=1, ge=1, le=1024, description="ranks that share each layer: KV groups, FFN columns, rows of vocabulary"
    )
    pipeline: int = Field(default=1, ge=1, le=1024, description="stages of consecutive layers")
    context: int = Field(default=1, ge=1, le=1024, description="ranks that share each sequence (Ulysses)")
    sequence_parallel: bool = Field(
        default=False, description="norms and residuals by parts of the sequence over the tensor-parallel ranks"
    )
    recompute: Literal["none", "selective", "block"] = Field(
        default="none",
        description="block: keep a block's input alone and compute the rest again for its gradient; selective: compute "
        "norms and SwiGLU's product again",
    )
    zero: Literal[1, 2, 3] = Field(default=1, description="DeepSpeed ZeRO stage; 1 where there is a pipeline")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 keeps fp32 master weights")

    @property
    def model_ranks(self) -> int:
        """Ranks that work on one part of the batch: tensor x pipeline x context."""
        return self.tensor * self.pipeline * self.context


class SpeedConfig(StrictModel):
    """Levers of step speed: other ways to the same numbers, up to rounding."""

    compile: Literal["none", "elementwise"] = Field(
        default="none", description="elementwise: norms, SwiGLU's product and RoPE through torch.compile"
    )
    attention: Literal["auto", "cudnn", "flash", "fa3", "math"] = Field(
        default="auto",
        description="what the attention core runs on where there is a GPU; auto: cuDNN before flash, flash first where "
        "algorithms must be deterministic",
    )
    norm: Literal["torch", "apex", "liger"] = Field(default="torch", description="whose RMS norm")
    loss: Literal["chunked", "torch", "liger"] = Field(
        default="chunked", description="whose cross entropy of the head; chunked: Headway's own"
    )


class OptimizerConfig(StrictModel):
    """AdamW (Loshchilov and Hutter, 2019); weight decay reaches matrices only."""

    lr: float = Field(gt=0, le=10)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), strict=False
    )
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0, description="gradient norm over all parameters")


class ScheduleConfig(StrictModel):
    """Learning rate against tokens: linear warm-up, then constant and linear decay (wsd), or cosine."""

    type: Literal["wsd", "cosine"] = "wsd"
    warmup_tokens: int = Field(default=0, ge=0)
    decay_fraction: float = Field(default=0.2, ge=0, le=1, description="wsd: last share of the tokens, decayed to zero")
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="learning rate at the end over its peak")


class CheckpointConfig(StrictModel):
    """When checkpoints are written and which stay. One is always written at the end, and at a signal to stop."""

    every_tokens: int | None = Field(default=None, gt=0, description="training tokens from one to the next; none: off")
    every_minutes: float | None = Field(
        default=15.0, gt=0, description="minutes of rank 0's clock from one to the next; none: off"
    )
    keep: int = Field(default=2, ge=1, description="newest checkpoints that stay")
    keep_every_tokens: int | None = Field(
        default=None, gt=0, description="the first one after each multiple of so many tokens stays for good"
    )
    keep_best: bool = Field(
        default=False, description="the one with the lowest validation loss stays, among those validated at their step"
    )
    max_failures: int = Field(
        default=3, ge=1, description="saves that may fail in a row before the run stops (exit 74)"
    )


SECRET_NAME = re.compile(r"(?<!_P)KEY|TOKEN(?!IZER)|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
"""Names of variables whose values belong into no file and no message (NCCL_IB_PKEY, TOKENIZERS_... are none)."""


class GuardConfig(StrictModel):
    """What happens when losses are no numbers, or jump (`headway.launcher.train.guard` has the formula)."""

    max_skipped: int = Field(
        default=5, ge=1, description="steps in a row that may be skipped because a loss or gradient is not finite"
    )
    spike: Literal["off", "warn", "skip", "stop"] = Field(
        default="warn", description="skip: the step's update is not applied; stop: the run ends (exit 70)"
    )
    window: int = Field(default=64, ge=4, le=4096, description="losses that a spike is judged against")
    deviations: float = Field(default=10.0, gt=0, description="spreads above their median that make a spike")
    replicas_every_steps: int | None = Field(
        default=100,
        ge=0,
        description="steps from one comparison of what ranks hold alike to the next; each checkpoint begins with one "
        "too. 0 or none: never",
    )


_TAKEN = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|HEADWAY_.*|SLURM_.*|PATH|HOME|PYTHON.*|LD_.*|"
    r"BASH_ENV|ENV|SHELLOPTS|IFS)"
)
_OWN_FIELD = {
    "OMP_NUM_THREADS": "threads",
    "GLOO_SOCKET_IFNAME": "interface",
    "NCCL_SOCKET_IFNAME": "interface",
}
_SBATCH_FIELD = {
    "partition": "slurm.partition",
    "account": "slurm.account",
    "time": "slurm.time",
    "gpus-per-node": "slurm.gpus_per_node",
    "requeue": "slurm.requeue",
    "no-requeue": "slurm.requeue",
    "signal": "slurm.warn_s",
    "nodes": "hosts",
    "job-name": "name of the spec",
    "chdir": "folder the command is started in",
    "output": "run_dir of the spec",
    "error": "run_dir of the spec",
}
_SBATCH_REFUSED = ("ntasks", "ntasks-per-node", "array", "wrap", "open-mode", "parsable", "wait", "test-only", "hold")

_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,-]{0,127}$")]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$")]


class SlurmConfig(StrictModel):
    """What the job asks of Slurm besides its hosts."""

    partition: _Word | None = Field(default=None, description="sbatch --partition")
    account: _Word | None = Field(default=None, description="sbatch --account")
    time: str | None = Field(
        default=None, pattern=r"^([0-9]{1,3}-)?[0-9]{1,4}(:[0-9]{2}){0,2}$", description="sbatch --time, as 1-12:00:00"
    )
    gpus_per_node: int | None = Field(default=None, ge=1, le=64, description="sbatch --gpus-per-node")
    requeue: bool = Field(default=True, description="queue the job again when its time is over or a node failed")
    warn_s: int = Field(
        default=300, ge=30, le=3600, description="seconds before the end of its time at which the job saves and stops"
    )
    options: tuple[str, ...] = Field(
        default=(), strict=False, description="more options of sbatch, each as --name or --name=value"
    )

    @model_validator(mode="after")
    def _check(self) -> SlurmConfig:
        for option in self.options:
            found = re.fullmatch(r"--([a-z][a-z0-9-]*)(=[A-Za-z0-9_.,:/@+*()&|-]+)?", option, re.ASCII)
            if found is None:
                raise ValueError(
                    f"options: {option[:80]!r} is not one option of sbatch in plain characters; "
                    "use --name or --name=value, such as --exclusive or --mem=64G"
                )
            if found[1] in _SBATCH_FIELD:
                raise ValueError(
                    f"options: --{found[1]} is written by Headway; use {_SBATCH_FIELD[found[1]]}, or leave it out"
                )
            if found[1] in _SBATCH_REFUSED:
                raise ValueError(
                    f"options: --{found[1]} would change how the hosts are started; use hosts and processes, or leave "
                    "it out"
                )
        return self


class LaunchConfig(StrictModel):
    """How the processes are started and watched."""

    method: Literal["torchrun", "deepspeed", "slurm"] = Field(
        default="torchrun", description="slurm: as a job of sbatch, with torchrun on each of its hosts"
    )
    hosts: int = Field(default=1, ge=1, le=4096, description="hosts, each with as many processes")
    processes: int = Field(default=1, ge=1, le=4096, description="processes per host")
    threads: int | None = Field(default=None, ge=1, description="CPU threads per process; none: cores / processes")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    address: _Name | None = Field(
        default=None, description="the first host's name or IPv4 address, as every host reaches it"
    )
    port: int | None = Field(
        default=None,
        ge=1024,
        le=65_534,
        description="of the rendezvous; the next one is for the launchers of several hosts. none: any free one on one "
        "host, 29500 on several, by job number under slurm",
    )
    interface: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$",
        description="network interface of gloo and NCCL; none: on several hosts the one that leads to the first host",
    )
    rendezvous_s: int = Field(default=300, ge=1, description="how long hosts wait for each other at the start")
    timeout_s: int = Field(default=600, ge=1, description="limit of every collective operation")
    hang_s: int = Field(
        default=300,
        ge=2,
        description="a rank that makes no progress in a step for so long hangs; validation and saving may take four "
        "times as long, the set-up six times",
    )
    stop_s: int = Field(
        default=120, ge=1, description="how long ranks that a signal asks to stop may take for their step and saving"
    )
    restarts: int = Field(
        default=2,
        ge=0,
        le=1000,
        description="how often in a row ranks are started again, after one has died or hung, without a new checkpoint",
    )
    host_lost_s: int = Field(default=30, ge=2, description="a host that is not heard of for so long is lost")
    env: dict[str, str | None] = Field(
        default={}, description="variables for the ranks: a value, or null for the first host's own"
    )
    hostfile: str | None = Field(default=None, description="deepspeed: lines `name slots=N`; none: one is written")
    ssh: bool = Field(default=False, description="deepspeed: the first host starts the others by ssh")
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _check(self) -> LaunchConfig:
        if self.hosts > 1 and self.address is None and self.method != "slurm":
            raise ValueError(
                f"address: {self.hosts} hosts meet at the first one, which has no address here; use address with a "
                "name or IPv4 address of the first host that all hosts reach, or method slurm"
            )
        for key in ("hostfile", "ssh"):
            if getattr(self, key) and self.method != "deepspeed":
                raise ValueError(f"{key}: only method deepspeed reads it; use method deepspeed, or leave {key} out")
        if self.ssh and self.hostfile is None:
            raise ValueError(
                "ssh: the names of the other hosts are not known; use hostfile with a line `name slots=N` for each, or "
                "ssh false and the same command on each host"
            )
        if self.slurm != SlurmConfig() and self.method != "slurm":
            raise ValueError("slurm: only method slurm reads it; use method slurm, or leave slurm out")
        for name, value in self.env.items():
            _check_variable(name, value)
        return self

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.hosts * self.processes


def _check_variable(name: str, value: str | None) -> None:
    shown = repr(name[:80])
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name, re.ASCII):
        raise ValueError(f"env: {shown} is no name of a variable; use letters, digits and _, or leave it out")
    if name in _OWN_FIELD:
        raise ValueError(f"env: Headway sets {name}; use {_OWN_FIELD[name]}, or leave it out")
    if _TAKEN.fullmatch(name):
        raise ValueError(
            f"env: {name} decides which code runs or which rank a process is, which no spec may; use a variable of "
            "another name, or leave it out"
        )
    if value is not None and SECRET_NAME.search(name):
        raise ValueError(
            f"env: {name} is named like a secret, and what a spec says is written into run folders; use {name}: null "
            "and set it where the command is started, or a variable of another name"
        )
    if value is not None and (len(value) > 4096 or not value.isprintable()):
        raise ValueError(
            f"env: the value of {name} is longer than 4096 characters or has control characters; use a shorter one in "
            "one line, or the name of a file"
        )
