"""State of one training process: model, engine, data, records, hooks and progress."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headway.data.loader import Loader
from headway.data.validation import ValidationData
from headway.launcher.run.run_dir import RunDir
from headway.launcher.spec.spec import Spec
from headway.launcher.train.ahead import Ahead
from headway.launcher.train.guard import Guard
from headway.launcher.train.saving import Saving
from headway.launcher.train.tracking import Tracker
from headway.parallel.engine import Engine, StepStats
from headway.parallel.layout import Layout
from headway.parallel.schedule import learning_rate


@dataclass(kw_only=True)
class Session:
    """State of a training process, built by `headway.launcher.train.load`. `step` counts completed optimizer steps.

    `bytes_per_token`: of the validation text (""), and of each validation set by name; without those not known.
    """

    run: RunDir
    spec: Spec
    layout: Layout
    engine: Engine
    loader: Loader
    validation: ValidationData
    saving: Saving
    tracker: Tracker
    guard: Guard
    bytes_per_token: Mapping[str, float] = field(default_factory=dict)
    hooks: Sequence[Hook] = ()
    step: int = 0
    train_s: float = 0.0
    resumes: int = 0
    validation_loss: float | None = None  # of the last validation
    validation_step: int | None = None
    step_times: deque[float] = field(default_factory=lambda: deque(maxlen=50))  # in seconds, of the last steps
    batches: Ahead = field(init=False)  # of `loader`

    def __post_init__(self) -> None:
        self.batches = Ahead(self.loader, self.engine)

    @property
    def tokens(self) -> int:
        """Number of tokens trained."""
        return self.step * self.spec.tokens_per_step

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        total = self.spec.steps * self.spec.tokens_per_step
        after = self.tokens + self.spec.tokens_per_step
        return learning_rate(
            self.spec.optimizer, self.spec.schedule, tokens_before=self.tokens, tokens_after=after, total_tokens=total
        )

    @property
    def seconds_left(self) -> float | None:
        """Estimated time for the remaining steps, from the median of the last step times.

        None until three steps are done: the first ones are much slower than the others.
        """
        if len(self.step_times) < 3:
            return None
        recent = sorted(self.step_times)
        return (self.spec.steps - self.step) * recent[len(recent) // 2]

    def count_step(self, step_s: float) -> None:
        """Record a completed step that took `step_s` seconds."""
        self.step += 1
        self.train_s += step_s
        self.step_times.append(step_s)

    def is_due(self, every_tokens: int | None) -> bool:
        """Whether the last step crossed a multiple of `every_tokens` (None: never) or was the final one of the run."""
        if self.step == self.spec.steps:
            return True
        before = self.tokens - self.spec.tokens_per_step
        return every_tokens is not None and self.tokens // every_tokens > before // every_tokens

    @property
    def checkpoint_due(self) -> bool:
        """Whether the spec asks for a checkpoint after the last step, by its number of tokens."""
        config, before = self.spec.checkpoint, self.tokens - self.spec.tokens_per_step
        return self.is_due(config.every_tokens) or config.marked(before=before, tokens=self.tokens)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, apart from tensors."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "train_s": self.train_s,
            "applied_steps": self.engine.applied_steps,
            "resumes": self.resumes,
            "validation_loss": self.validation_loss,
            "validation_step": self.validation_step,
            "guard": self.guard.state(),
            "records": self.tracker.end(),
        }

    def restore(self, step: int, state: dict[str, Any], *, branched: bool = False) -> None:
        """Continue after the checkpoint of `step`. `state`: result of the method `state` when it was saved.

        `branched`: the checkpoint is that of another run, so this is the first start of this run.
        """
        self.step, self.train_s, self.resumes = step, state["train_s"], 0 if branched else state["resumes"] + 1
        # Checkpoints of earlier versions do not contain the following keys.
        self.validation_loss, self.validation_step = state.get("validation_loss"), state.get("validation_step")
        self.guard.restore(state.get("guard", {}))
        self.saving.resumed(step, self.tokens)

    def close(self) -> None:
        """Stop the threads that read data and write records."""
        for hook in self.hooks:
            hook.on_close(self)
        self.loader.close()
        self.tracker.close()


class Hook:
    """A hook that does nothing. `s.step` counts completed steps; from `after_step` on it includes the last step."""

    def on_start(self, s: Session) -> None:
        """Called after everything is loaded, before the first step of this process."""

    def before_data(self, s: Session) -> None:
        """Called before the batch of a step is read."""

    def before_step(self, s: Session) -> None:
        """Called before a step, when its batch is read."""

    def after_step(self, s: Session, stats: StepStats, record: dict[str, Any]) -> None:
        """Called after a step. Keys that the hook adds to `record` are logged."""

    def after_log(self, s: Session, stats: StepStats, record: dict[str, Any]) -> None:
        """Called after `record` was logged. The hook may end the run, since its last step is recorded."""

    def after_validation(self, s: Session) -> None:
        """Called after the validation loss of this step was logged."""

    def before_save(self, s: Session) -> None:
        """Called before a checkpoint of this step is written."""

    def on_close(self, s: Session) -> None:
        """Called when the session ends, also because of an error. Not collective."""


def seed_step(spec: Spec, layout: Layout, step: int) -> None:
    """Seed the random numbers of a step from (seed, step, part of the batch, stage) only.

    A resumed run therefore draws the same numbers, and ranks that share a layer draw identical numbers. Step 0 is the
    set-up.
    """
    key = f"{spec.seed}/{step}/{layout.data_index + layout.data_ranks * layout.pp_rank}".encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)
