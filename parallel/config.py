"""What a run says about processes, precision, optimizer, schedule and checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


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
    recompute: Literal["none", "block"] = Field(
        default="none", description="block: keep a block's input alone and compute the rest again for its gradient"
    )
    zero: Literal[1, 2, 3] = Field(default=1, description="DeepSpeed ZeRO stage; 1 where there is a pipeline")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 keeps fp32 master weights")

    @property
    def model_ranks(self) -> int:
        """Ranks that work on one part of the batch: tensor x pipeline x context."""
        return self.tensor * self.pipeline * self.context


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
    """When checkpoints are written and how many stay."""

    every_tokens: int | None = Field(default=None, gt=0, description="none: only at the end and at SIGTERM")
    keep: int = Field(default=2, ge=1, description="newest checkpoints that stay")
    max_failures: int = Field(
        default=3, ge=1, description="saves that may fail in a row before the run stops (exit 74)"
    )


class LaunchConfig(StrictModel):
    """How the processes are started."""

    hosts: int = Field(default=1, ge=1, le=4096, description="hosts, each with as many processes")
    processes: int = Field(default=1, ge=1, le=4096, description="processes per host")
    threads: int | None = Field(default=None, ge=1, description="CPU threads per process; none: cores / processes")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    port: int | None = Field(default=None, ge=1024, le=65_535, description="rendezvous port; none: any free one")
    timeout_s: int = Field(default=600, ge=1, description="limit of every collective operation")

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.hosts * self.processes
