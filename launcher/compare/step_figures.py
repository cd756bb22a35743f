"""What a report needs of the training steps of a run: figures whose size does not grow with the number of steps.

They are computed from a run folder, or read from a cell record (`headway.launcher.compare.cell_record`), which keeps
them. Both give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from headway.launcher.compare.batch_hashes import Hashes
from headway.launcher.compare.stats import Speed, steady_speed
from headway.launcher.run.records import Curve, RunRecord
from headway.launcher.run.run_dir import flatten

POINTS = 200
"""Largest number of points of a running mean."""

WINDOWS = 40
"""Number of windows of the running mean in one run."""


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Figures of the recorded steps of a run. `count`: their number. `last_loss`: of the last one's batch.

    `skipped`: steps whose update was not applied. `spikes`: steps with a loss spike. `clipped`: steps with a gradient
    norm above `clip_norm`; None if either is not known. `step_s`, `data_s`: seconds of all steps, and those of waiting
    for data. `speed`: None without timed steps. `window`: steps in one point of `curve`, the running mean of the loss.
    """

    count: int
    last_loss: float | None
    skipped: int
    spikes: int
    clip_norm: float | None
    clipped: int | None
    step_s: float
    data_s: float
    speed: Speed | None
    window: int
    curve: Curve
    hashes: Hashes = field(repr=False)


def step_figures(record: RunRecord) -> StepFigures:
    """Compute the figures from the records of a run folder."""
    limit = flatten(record.spec).get("optimizer.clip_norm")
    limit = float(limit) if isinstance(limit, int | float) else None
    norms = record.grad_norm
    known = norms.size > 0 and not np.isnan(norms).any()
    tokens_per_step = record.run.get("tokens_per_step")
    window, curve = running_mean(record.train)
    return StepFigures(
        count=len(record.train),
        last_loss=float(record.train.loss[-1]) if len(record.train) else None,
        skipped=record.skipped,
        spikes=record.spikes,
        clip_norm=limit,
        clipped=int((norms > limit).sum()) if known and limit is not None else None,
        step_s=float(record.step_s.sum()),
        data_s=float(record.data_s.sum()),
        speed=steady_speed(record.step_s.tolist(), tokens_per_step) if tokens_per_step else None,
        window=window,
        curve=curve,
        hashes=record.batch_hash,
    )


def running_mean(curve: Curve) -> tuple[int, Curve]:
    """(window, curve): means of the loss over `window` steps, at most `POINTS` of them, the last at the last step.

    A point has the step of the latest loss in its mean, so it uses no later ones. Losses are rounded to 1e-6 nats per
    token and times to 1e-3 s, because a cell record keeps these numbers as text.
    """
    window = max(1, len(curve) // WINDOWS)
    if not len(curve):
        return window, curve
    loss = np.convolve(curve.loss, np.ones(window) / window, mode="valid")
    keep = np.unique(np.linspace(0, loss.size - 1, min(POINTS, loss.size)).round().astype(int))
    step, tokens, train_s = (getattr(curve, key)[window - 1 :][keep] for key in ("step", "tokens", "train_s"))
    return window, Curve(step=step, tokens=tokens, loss=loss[keep].round(6), train_s=train_s.round(3))
