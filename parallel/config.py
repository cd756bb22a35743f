"""Config sections of a run: layout, precision, speed, optimizer, checkpoints, guard and launch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator

from headway.parallel.secrecy import SECRET_NAME, secret_form
from headway.parallel.slurm import SlurmConfig


class StrictModel(BaseModel):
    """Base of these configs: frozen, keyword-only; unknown keys and implicit type conversions are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class CheckpointError(Exception):
    """A checkpoint cannot be written, or is not valid. The message says what to do next."""

    exit_code = 74


class ParallelConfig(StrictModel):
    """Layout and precision. The data-parallel size is the number of processes / (tensor x pipeline x context)."""

    tensor: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="tensor-parallel ranks; they shard KV groups, FFN columns and rows of the vocabulary",
    )
    pipeline: int = Field(default=1, ge=1, le=1024, description="pipeline stages of consecutive layers")
    context: int = Field(default=1, ge=1, le=1024, description="context-parallel ranks that share a sequence (Ulysses)")
    sequence_parallel: bool = Field(
        default=False, description="shard norms and residuals along the sequence over the tensor-parallel ranks"
    )
    recompute: Literal["none", "selective", "block"] = Field(
        default="none",
        description="activation recomputation; block: keep only a block's input and recompute the rest; selective: "
        "recompute norms and silu(gate) * up",
    )
    zero: Literal[1, 2, 3] = Field(default=1, description="ZeRO stage; must be 1 with a pipeline")
    engine: Literal["auto", "deepspeed"] = Field(
        default="auto",
        description="auto: Headway's own engine in a single process, where no stage of ZeRO has anything to shard, and "
        "DeepSpeed's engines otherwise; deepspeed: always DeepSpeed's",
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 keeps fp32 master weights")
    gradient_reduction: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="precision in which gradients are summed over data-parallel ranks; bf16 halves the traffic and "
        "rounds gradients to a relative error of about 2e-3",
    )
    overlap: Literal["auto", True, False] = Field(
        default="auto",
        description="exchange gradients during the backward pass and, under zero 3, gather parameters during the "
        "passes, each in a stream of its own; auto: on GPUs with several data-parallel ranks under zero 2 and 3",
    )

    @model_validator(mode="after")
    def _reduction_fits(self) -> ParallelConfig:
        if self.gradient_reduction == "bf16" and self.precision == "fp32":
            raise ValueError(
                "gradient_reduction: bf16 needs bf16 training; use parallel.gradient_reduction fp32, or "
                "parallel.precision bf16"
            )
        return self

    @model_validator(mode="after")
    def _overlap_exists(self) -> ParallelConfig:
        if (reason := self.why_no_overlap()) is not None:
            raise ValueError(reason)
        return self

    def why_no_overlap(self) -> str | None:
        """Why `overlap: true` has no form with the other keys; None if it has, or is not asked for."""
        if self.overlap is not True:
            return None
        if self.pipeline > 1:
            return (
                "overlap: with a pipeline, DeepSpeed exchanges gradients after the last backward pass of a step; use "
                "parallel.overlap false or auto, or parallel.pipeline 1"
            )
        if self.zero == 1 and self.precision == "bf16":
            return (
                "overlap: in bf16 under zero 1, DeepSpeed adds up gradients in fp32 and exchanges the sums after the "
                "last backward pass of a step; use parallel.overlap false or auto, or parallel.zero 2 or 3"
            )
        return None

    def overlaps(self, *, device: str, data_ranks: int) -> bool:
        """Whether exchanges overlap with the passes: `overlap`, or for auto the choice for these ranks.

        `device`: cuda or cpu. On a CPU exchanges block, so overlap would only change when they take place.
        """
        if self.overlap != "auto":
            return self.overlap
        return device == "cuda" and data_ranks > 1 and self.zero > 1

    def is_single(self, world_size: int) -> bool:
        """Whether Headway's engine for a single process runs this layout on `world_size` ranks."""
        return world_size == 1 and self.engine == "auto"

    @property
    def model_ranks(self) -> int:
        """Ranks per data-parallel replica: tensor x pipeline x context."""
        return self.tensor * self.pipeline * self.context


class SpeedConfig(StrictModel):
    """Speed options: kernels with equal results up to rounding. fp8 rounds much more than the others."""

    compile: Literal["auto", "none", "elementwise", "block"] = Field(
        default="auto",
        description="elementwise: norms, silu(gate) * up and RoPE with torch.compile; block: whole blocks, in training "
        "on a CPU; auto: elementwise on a GPU, none on the CPU",
    )
    attention: Literal["auto", "cudnn", "flash", "fa3", "math"] = Field(
        default="auto",
        description="backend of the attention core on a GPU; auto: cuDNN, then flash; flash first if deterministic "
        "algorithms are required",
    )
    norm: Literal["torch", "apex", "liger"] = Field(default="torch", description="library of the RMSNorm kernel")
    loss: Literal["chunked", "torch", "liger"] = Field(
        default="chunked", description="kernel of the head's cross-entropy; chunked: Headway's own"
    )
    matmul: Literal["none", "fp8"] = Field(
        default="none",
        description="fp8: products of the MLP and of attention's projections in 8 bits, on GPUs from compute "
        "capability 8.9; none: in parallel.precision",
    )
    delta: Literal["auto", "torch", "fla"] = Field(
        default="auto",
        description="state of attention.type gated_delta; fla: flash-linear-attention's kernel; torch: Headway's own "
        "form; auto: fla on a GPU in bf16 where it is installed",
    )


class OptimizerConfig(StrictModel):
    """AdamW (Loshchilov and Hutter, 2019). Weight decay applies to matrices only."""

    lr: float = Field(gt=0, le=10)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), strict=False
    )
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip_norm: float = Field(default=1.0, gt=0, description="maximum gradient norm over all parameters")


class CheckpointConfig(StrictModel):
    """When checkpoints are saved and kept. One is always saved at the end and at a signal to stop."""

    every_tokens: int | None = Field(default=None, gt=0, description="training tokens between checkpoints; none: off")
    every_minutes: float | None = Field(
        default=15.0, gt=0, description="minutes between checkpoints, by rank 0's clock; none: off"
    )
    keep: int = Field(default=2, ge=1, description="number of newest checkpoints to keep")
    keep_every_tokens: int | None = Field(
        default=None, gt=0, description="keep the first checkpoint after each multiple of this many tokens forever"
    )
    keep_at_tokens: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(),
        strict=False,
        description="also save after the step that reaches each of these numbers of tokens (ascending), and keep that "
        "checkpoint forever",
    )
    keep_best: bool = Field(
        default=False,
        description="keep the checkpoint with the lowest validation loss, of those validated at their own step",
    )
    max_failures: int = Field(
        default=3, ge=1, description="number of consecutive failed saves at which the run stops (exit 74)"
    )

    @model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        marks = self.keep_at_tokens
        if list(marks) != sorted(set(marks)):
            raise ValueError(f"keep_at_tokens: {list(marks)} must ascend; use {sorted(set(marks))}")
        return self

    def marked(self, *, before: int, tokens: int) -> bool:
        """Whether the step from `before` to `tokens` reaches one of `keep_at_tokens`."""
        return any(before < mark <= tokens for mark in self.keep_at_tokens)


class GuardConfig(StrictModel):
    """Reaction to non-finite losses, loss spikes (formula in `headway.launcher.train.guard`) and diverged replicas."""

    max_skipped: int = Field(
        default=5, ge=1, description="consecutive steps that may be skipped because of a non-finite loss or gradient"
    )
    spike: Literal["off", "warn", "skip", "stop"] = Field(
        default="warn", description="reaction to a spike; skip: do not apply the update; stop: end the run (exit 70)"
    )
    window: int = Field(default=64, ge=4, le=4096, description="number of previous losses that define a spike")
    deviations: float = Field(default=10.0, gt=0, description="a spike is this many spreads above their median")
    replicas_every_steps: int | None = Field(
        default=100,
        ge=0,
        description="steps between checks that replicated parameters are equal on all ranks; saving a checkpoint also "
        "starts with a check. 0 or none: never",
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
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$")]


class LaunchConfig(StrictModel):
    """How processes are started and monitored."""

    method: Literal["torchrun", "deepspeed", "slurm"] = Field(
        default="torchrun", description="slurm: an sbatch job that runs torchrun on each of its hosts"
    )
    hosts: int = Field(default=1, ge=1, le=4096, description="number of hosts, with `processes` processes each")
    processes: int = Field(default=1, ge=1, le=4096, description="processes per host")
    threads: int | None = Field(default=None, ge=1, description="CPU threads per process; none: cores / processes")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    address: _Name | None = Field(
        default=None, description="name or IPv4 address of the first host, reachable from every host"
    )
    port: int | None = Field(
        default=None,
        ge=1024,
        le=65_534,
        description="port of the rendezvous; the launchers of several hosts use the next port. none: any free port on "
        "one host, 29500 on several hosts, chosen by job number under slurm",
    )
    interface: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$",
        description="network interface of gloo and NCCL; none: with several hosts, the route to the first host",
    )
    rendezvous_s: int = Field(default=300, ge=1, description="seconds that hosts wait for each other at the start")
    timeout_s: int = Field(default=600, ge=1, description="timeout of every collective, in seconds")
    hang_s: int = Field(
        default=300,
        ge=2,
        description="seconds without progress in a step after which a rank counts as hung; four times as long for "
        "validation and saving, six times for the set-up",
    )
    stop_s: int = Field(
        default=120, ge=1, description="seconds that ranks have to finish their step and save after a signal to stop"
    )
    restarts: int = Field(
        default=2,
        ge=0,
        le=1000,
        description="consecutive restarts without a new checkpoint, after a rank died or hung",
    )
    host_lost_s: int = Field(default=30, ge=2, description="seconds without a message after which a host is lost")
    env: dict[str, str | None] = Field(
        default={}, description="environment variables of the ranks: a value, or null for the value on the first host"
    )
    hostfile: str | None = Field(default=None, description="deepspeed: lines `name slots=N`; none: generated")
    ssh: bool = Field(default=False, description="deepspeed: the first host starts the other hosts by ssh")
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _check(self) -> LaunchConfig:
        if self.hosts > 1 and self.address is None and self.method != "slurm":
            raise ValueError(
                f"address: {self.hosts} hosts need the address of the first one; use address with a "
                "name or IPv4 address of the first host that all hosts reach, or method slurm"
            )
        for key in ("hostfile", "ssh"):
            if getattr(self, key) and self.method != "deepspeed":
                raise ValueError(f"{key}: only method deepspeed uses it; use method deepspeed, or leave {key} out")
        if self.ssh and self.hostfile is None:
            raise ValueError(
                "ssh: the names of the other hosts are unknown; use hostfile with a line `name slots=N` for each, or "
                "ssh false and start the same command on each host"
            )
        if self.slurm != SlurmConfig() and self.method != "slurm":
            raise ValueError("slurm: only method slurm uses it; use method slurm, or leave slurm out")
        gpus = self.slurm.gpus_per_node
        if gpus is not None and gpus < self.processes and self.device != "cpu":
            raise ValueError(
                f"slurm.gpus_per_node: {self.processes} processes need a CUDA device each, and the job would have "
                f"{gpus} on each host; use {self.processes}, or processes {gpus}, or device cpu"
            )
        for name, value in self.env.items():
            _check_variable(name, value)
        return self

    @field_serializer("env", when_used="json")
    def _names_only(self, env: dict[str, str | None]) -> dict[str, None]:
        """Files and messages hold names of variables alone."""
        return dict.fromkeys(env)

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.hosts * self.processes


def _check_variable(name: str, value: str | None) -> None:
    shown = repr(name[:80])
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", name, re.ASCII):
        raise ValueError(f"env: {shown} is not a valid variable name; use letters, digits and _, or leave it out")
    if name in _OWN_FIELD:
        raise ValueError(f"env: Headway sets {name}; use {_OWN_FIELD[name]}, or leave it out")
    if _TAKEN.fullmatch(name):
        raise ValueError(
            f"env: {name} determines which code runs or the rank of a process, which a spec must not set; use a "
            "variable of another name, or leave it out"
        )
    if value is not None and SECRET_NAME.search(name):
        raise ValueError(
            f"env: {name} has the name of a secret, and specs are copied into run folders; use {name}: null "
            "and set the variable where you start the command, or use a variable of another name"
        )
    form = None if value is None else secret_form(value)
    if form is not None:
        raise ValueError(
            f"env: the value of {name} has the form of a secret ({form}), and specs are copied into run folders; use "
            f"{name}: null and set the variable where you start the command"
        )
    if value is not None and (len(value) > 4096 or not value.isprintable()):
        raise ValueError(
            f"env: the value of {name} is longer than 4096 characters or has control characters; use a shorter value "
            "on one line, or the name of a file"
        )
