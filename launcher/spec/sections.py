"""Sections of a spec and their values, before the rules that hold between sections are checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from headway.data.config import DataConfig, StrictModel
from headway.launcher.spec.fields import AUTO, Word
from headway.launcher.spec.paths import split_step
from headway.launcher.spec.tracking import TrackingConfig
from headway.model.config import ModelConfig
from headway.model.convert.methods import By, How
from headway.model.mixed import AnyAttention
from headway.parallel.config import (
    CheckpointConfig,
    GuardConfig,
    LaunchConfig,
    OptimizerConfig,
    ParallelConfig,
    SpeedConfig,
)
from headway.parallel.schedule import AnySchedule, WsdSchedule


class ConvertConfig(StrictModel):
    """Conversion of given weights to the attention of the spec (docs/uptraining.md)."""

    how: How = Field(
        description="how KV heads of a group become one: mean, first, random, align, cluster, cluster_align"
    )
    by: By = Field(
        default="activations", description="what align, cluster and cluster_align compare: keys and values, or weights"
    )
    tokens: int = Field(
        default=16_384,
        ge=1,
        description="tokens of the training split for calibration, and of the validation split for the losses",
    )


class InitConfig(StrictModel):
    """Initial state, if it is not random: given weights, or another run that this one is a branch of."""

    weights: str | None = Field(
        default=None,
        min_length=1,
        description="folder of exported or imported weights, or of a run: PATH (its newest checkpoint) or PATH@STEP",
    )
    convert: ConvertConfig | None = Field(
        default=None, description="convert `weights`, of a model with attention of type mha, gqa or mqa, at the start"
    )
    run: str | None = Field(
        default=None, min_length=1, description="PATH@STEP: continue the run in PATH from its checkpoint of STEP"
    )
    optimizer: Literal["continue", "fresh"] = Field(
        default="continue",
        description="of a branch (`run`): `continue` takes Adam's moments and counter too, `fresh` starts them from 0",
    )
    sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="of the config.json of weights, or of the manifest of the checkpoint; filled in at the first start",
    )

    @model_validator(mode="after")
    def _check(self) -> InitConfig:
        if self.run is not None:
            parts = split_step(self.run)
            if parts is None or parts[1] < 1:
                raise ValueError(
                    f"run: {self.run[:80]!r} is not PATH@STEP with a step of at least 1; use the folder of a run and "
                    "the step of one of its checkpoints (`headway checkpoint list RUN`), such as runs/stable@4000"
                )
            if self.weights is not None:
                raise ValueError(
                    "run: a run starts either from given weights or from another run; use init.run or init.weights, "
                    "and leave the other out"
                )
        if self.optimizer == "fresh" and self.run is None:
            raise ValueError(
                "optimizer: only a branch (init.run) has an optimizer to continue, and every other start has a fresh "
                "one; leave init.optimizer out, or use init.run"
            )
        if self.convert is not None and self.weights is None:
            raise ValueError(
                "convert: there are no weights to convert; use init.weights too, or leave init.convert out"
            )
        if self.sha256 is not None and self.weights is None and self.run is None:
            raise ValueError(
                "sha256: there are no weights that it could be the hash of; use init.weights or init.run too, or leave "
                "init out"
            )
        return self

    @property
    def start_step(self) -> int:
        """Number of steps that the parent of a branch has trained; 0 for a run that is no branch."""
        parts = None if self.run is None else split_step(self.run)
        return 0 if parts is None else parts[1]

    def without_run(self) -> InitConfig:
        """The same start without a parent and a conversion, for measurements that do not depend on the weights."""
        return self if self.run is None and self.convert is None else InitConfig()


class TrainConfig(StrictModel):
    """Length of the training and batch sizes."""

    tokens: int = Field(gt=0, description="training tokens; rounded up to whole steps")
    global_batch: int = Field(ge=1, description="sequences per optimizer step, over all ranks")
    micro_batch: Annotated[int, Word(AUTO)] = Field(
        ge=1, description="sequences per forward pass of one data-parallel rank; `auto`: `headway train` measures"
    )
    validate_every_tokens: int | None = Field(default=None, gt=0, description="none: only at the end")
    validate_first: bool = Field(default=False, description="validate before the first step too, at 0 tokens")
    validation_tokens: int = Field(default=65_536, gt=0, description="tokens of each validation; always the same ones")


LONGEST_NAME = 128
"""Characters of the name of a run."""


class Sections(StrictModel):
    """All sections of one run. `headway.launcher.spec.spec.Spec` adds the rules between them."""

    name: str = Field(default="run", max_length=LONGEST_NAME, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: str | None = Field(default=None, description="folder of the run; default runs/NAME")
    seed: int = Field(default=1, ge=0, lt=1 << 63, description="initial parameters (data.seed orders the data)")
    model: ModelConfig
    attention: AnyAttention
    init: InitConfig = InitConfig()
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    speed: SpeedConfig = SpeedConfig()
    optimizer: OptimizerConfig
    schedule: AnySchedule = WsdSchedule()
    train: TrainConfig
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    launch: LaunchConfig = LaunchConfig()

    @field_validator("schedule", mode="before")
    @classmethod
    def _default_type(cls, value: Any) -> Any:
        return {"type": WsdSchedule().type, **value} if isinstance(value, dict) else value

    @property
    def data_parallel(self) -> int:
        """Data-parallel size: number of processes divided by tensor x pipeline x context."""
        return self.launch.world_size // self.parallel.model_ranks

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.data.seq_len

    @property
    def steps(self) -> int:
        return -(-self.train.tokens // self.tokens_per_step)
