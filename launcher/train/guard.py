"""Losses that are no numbers, and losses that jump: what a run does about them.

A loss is a spike when it exceeds the median of the last `guard.window` losses by more than `guard.deviations` times
their spread, and by more than 5 % of the median. The spread is the median absolute deviation, times 1.4826, which makes
it the standard deviation of normally distributed losses. Nothing is judged until half the window is full.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from headway.data.loader import Loader
from headway.launcher.base.errors import HeadwayError
from headway.parallel.config import GuardConfig
from headway.parallel.engine import Engine, StepStats
from headway.parallel.layout import Layout

_TO_STANDARD = 1.4826
_LEAST = 0.05
_DUMPS = 20


class NumericError(HeadwayError):
    """Training has left the numbers in which it makes sense."""

    exit_code = 70


class Tells(Protocol):
    """Where events are said; `headway.launcher.train.tracking.Tracker` is one."""

    def event(self, record: dict[str, Any], text: str) -> None: ...


class Guard:
    """Judges each step; the same on every rank, as it sees sums over all ranks alone."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self.skipped, self.in_a_row, self.spikes = 0, 0, 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes}
        return {"losses": list(self._losses), **counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` returned; an empty mapping for a checkpoint that has none."""
        self._losses.extend(state.get("losses", ()))
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        self.spikes = state.get("spikes", 0)

    def limit(self) -> float:
        """The loss above which the next step is a spike; infinite while too little is known."""
        if self._config.spike == "off" or len(self._losses) < max(2, self._config.window // 2):
            return math.inf
        middle = _median(list(self._losses))
        spread = _TO_STANDARD * _median([abs(loss - middle) for loss in self._losses])
        return middle + max(self._config.deviations * spread, _LEAST * abs(middle))

    def allows(self, loss: float) -> bool:
        """Whether a step with this loss is applied, under the policy `skip`."""
        return not loss > self.limit()

    @property
    def vetoes(self) -> bool:
        """Whether `allows` must be asked before each step."""
        return self._config.spike == "skip"

    def after_step(self, step: int, stats: StepStats, tracker: Tells, *, saved_step: int) -> None:
        """Count and report. Raises NumericError where the run must end."""
        finite, limit = math.isfinite(stats.loss) and math.isfinite(stats.grad_norm), self.limit()
        spike = math.isfinite(stats.loss) and stats.loss > limit
        if math.isfinite(stats.loss):
            self._losses.append(stats.loss)
        if spike:
            self._report_spike(step, stats, tracker, limit, saved_step)
        if not finite and not stats.skipped:
            raise NumericError(
                f"step {step}: loss {stats.loss}, gradient norm {stats.grad_norm}, and the step was applied; the last "
                f"checkpoint is of step {saved_step}. Start the same command again to continue from there"
            )
        if not stats.skipped:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        if finite:  # a spike that was not applied, and said so
            return
        record = {"kind": "skipped", "step": step, "in_a_row": self.in_a_row, "total": self.skipped}
        tracker.event(
            record,
            f"step {step} SKIPPED on all ranks: loss {stats.loss}, gradient norm {stats.grad_norm} "
            f"({self.in_a_row} in a row, {self.skipped} in all; stops after {self._config.max_skipped} in a row)",
        )
        if self.in_a_row >= self._config.max_skipped:
            raise NumericError(
                f"step {step}: {self.in_a_row} steps in a row had a loss or a gradient that is no finite number "
                f"(guard.max_skipped); what they read is in the run's folder `skipped`. The last checkpoint is of step "
                f"{saved_step}; lower optimizer.lr or use parallel.precision=fp32, in another run_dir"
            )

    def _report_spike(self, step: int, stats: StepStats, tracker: Tells, limit: float, saved_step: int) -> None:
        self.spikes += 1
        applied = "not applied" if stats.skipped else "applied"
        text = f"step {step} LOSS SPIKE: {stats.loss:.4f}, above {limit:.4f} (guard.spike); the step was {applied}"
        tracker.event({"kind": "spike", "step": step, "loss": stats.loss, "limit": limit, "applied": applied}, text)
        if self._config.spike == "stop":
            raise NumericError(f"{text}. The last checkpoint is of step {saved_step}, before it")


def dump(folder: Path, step: int, digest: str, loader: Loader, engine: Engine, layout: Layout) -> None:
    """Write what a skipped step read; collective.

    `folder`/step-N.json: the hash of the batch, and of each rank its sequences' numbers in their order, the sums of the
    losses of its micro-batches (where it computes them), and which of its parameters hold NaN or infinity.
    """
    mine = {
        "rank": layout.rank,
        "data_rank": layout.dp_rank,
        "sequences": loader.sequences(step - 1),
        "micro_batch_loss_sums": [loss if math.isfinite(loss) else str(loss) for loss in engine.last_losses()],
        "parameters_not_finite": engine.not_finite(),
    }
    parts = layout.gather_json(mine)
    if not layout.is_main:
        return
    folder.mkdir(exist_ok=True)
    if len(list(folder.iterdir())) < _DUMPS:
        value = {"step": step, "batch_hash": digest, "ranks": parts}
        (folder / f"step-{step:010d}.json").write_text(json.dumps(value, indent=1) + "\n")


def _median(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
