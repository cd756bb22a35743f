"""Detect non-finite losses and loss spikes, and apply the policy of the run.

A loss is a spike if it exceeds the median of the last `guard.window` losses by more than `guard.deviations` times
their spread, and by more than 5 % of the median. The spread is the median absolute deviation times 1.4826, which equals
the standard deviation for normally distributed losses. No loss is checked for spikes until half the window is full.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from headway.data.loader import Loader
from headway.launcher.base.errors import HeadwayError
from headway.launcher.run.run_dir import write_json
from headway.launcher.train.tracking import say
from headway.parallel.config import GuardConfig
from headway.parallel.engine import Engine, StepStats
from headway.parallel.layout import Layout

_TO_STANDARD = 1.4826
_LEAST = 0.05
_DUMPS = 20


class NumericError(HeadwayError):
    """Training cannot continue for numerical reasons."""

    exit_code = 70


class Tells(Protocol):
    """Receiver of events, such as `headway.launcher.train.tracking.Tracker`."""

    def event(self, record: dict[str, Any], text: str) -> None: ...


class Guard:
    """Check each step. All ranks reach the same decision, because the inputs are sums over all ranks."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self.skipped, self.in_a_row, self.spikes = 0, 0, 0

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes}
        return {"losses": list(self._losses), **counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`. The mapping is empty for a checkpoint without this state."""
        self._losses.extend(state.get("losses", ()))
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        self.spikes = state.get("spikes", 0)

    def limit(self) -> float:
        """The loss above which the next step is a spike; infinite while there are too few losses."""
        if self._config.spike == "off" or len(self._losses) < max(2, self._config.window // 2):
            return math.inf
        middle = _median(list(self._losses))
        spread = _TO_STANDARD * _median([abs(loss - middle) for loss in self._losses])
        return middle + max(self._config.deviations * spread, _LEAST * abs(middle))

    def allows(self, loss: float) -> bool:
        """Whether a step with this loss is applied under the policy `skip`."""
        return not loss > self.limit()

    @property
    def vetoes(self) -> bool:
        """Whether `allows` must be called before each step is applied."""
        return self._config.spike == "skip"

    def after_step(self, step: int, stats: StepStats, tracker: Tells, *, saved_step: int) -> None:
        """Count and report events of the step. Raises NumericError if the run must end."""
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
        if finite:  # a spike that was not applied and is already reported
            self.in_a_row = 0
            return
        self.in_a_row += 1
        record = {"kind": "skipped", "step": step, "in_a_row": self.in_a_row, "total": self.skipped}
        tracker.event(
            record,
            f"step {step} SKIPPED on all ranks: loss {stats.loss}, gradient norm {stats.grad_norm} "
            f"({self.in_a_row} in a row, {self.skipped} in all; stops after {self._config.max_skipped} in a row)",
        )
        if self.in_a_row >= self._config.max_skipped:
            raise NumericError(
                f"step {step}: {self.in_a_row} steps in a row had a loss or a gradient that is no finite number "
                "(guard.max_skipped); what they read is in the run's folder `skipped`, unless a line above says that "
                f"there is no dump. The last checkpoint is of step {saved_step}; lower optimizer.lr or use "
                "parallel.precision=fp32, in another run_dir"
            )

    def _report_spike(self, step: int, stats: StepStats, tracker: Tells, limit: float, saved_step: int) -> None:
        self.spikes += 1
        applied = "not applied" if stats.skipped else "applied"
        text = f"step {step} LOSS SPIKE: {stats.loss:.4f}, above {limit:.4f} (guard.spike); the step was {applied}"
        tracker.event({"kind": "spike", "step": step, "loss": stats.loss, "limit": limit, "applied": applied}, text)
        if self._config.spike == "stop":
            raise NumericError(f"{text}. The last checkpoint is of step {saved_step}, before it")


def dump(folder: Path, step: int, digest: str, loader: Loader, engine: Engine, layout: Layout) -> None:
    """Write the inputs of a skipped step to `folder`/step-N.json. Collective.

    The file contains the hash of the batch and, for each rank, the numbers of its sequences in order, the loss sums of
    its micro-batches (if it computes them), and its parameters that contain NaN or infinity. If it cannot be written
    (a full disk), a line says so and training continues: no result depends on it.
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
    try:
        folder.mkdir(exist_ok=True)
        if len(list(folder.glob("step-*.json"))) < _DUMPS:
            value = {"step": step, "batch_hash": digest, "ranks": parts}
            write_json(folder / f"step-{step:010d}.json", value)
    except OSError as e:
        say(f"NO DUMP of the skipped step {step} in {folder}: {e}; training goes on")


def _median(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
