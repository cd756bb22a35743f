"""Choose a micro-batch from the plan's estimate of memory if nothing can be measured."""

from __future__ import annotations

from headway.launcher.plan.layouts import PASS_TOKENS
from headway.launcher.plan.memory import Memory, worst
from headway.launcher.plan.micro_batch.search import Choice, Trial
from headway.launcher.plan.stages import Grid, grid_of
from headway.launcher.spec.layouts import micro_batches
from headway.launcher.spec.spec import Spec


def with_number(spec: Spec, micro_batch: int) -> Spec:
    return spec.model_copy(update={"train": spec.train.model_copy(update={"micro_batch": micro_batch})})


def memory_of(spec: Spec, micro_batch: int) -> Memory:
    """Memory of the rank that needs most, with this micro-batch. The vocabulary size of `spec` must be set."""
    return worst(grid_of(with_number(spec, micro_batch)))[1]


def by_plan(spec: Spec, limit_bytes: float) -> Choice:
    """The smallest micro-batch that fits and whose passes have `PASS_TOKENS` tokens, else the largest that fits.

    Prefers sizes with at least one micro-batch per pipeline stage. Does not estimate speed.
    """
    grids = {size: grid_of(with_number(spec, size)) for size in micro_batches(spec)}
    trials = [_trial(size, grid, limit_bytes) for size, grid in grids.items()]
    fit = [trial.micro_batch for trial in trials if trial.fits]
    if not fit:
        return Choice(micro_batch=None, trials=tuple(trials), why="the plan needs more memory than there is")
    fed = [size for size in fit if grids[size].accumulation >= spec.parallel.pipeline]
    enough = [size for size in fed or fit if grids[size].tokens >= PASS_TOKENS]
    if enough:
        chosen, why = min(enough), f"the smallest whose passes have {PASS_TOKENS:,} tokens"
    elif fed and max(fed) < max(fit):
        chosen, why = max(fed), f"the largest that fits and gives each of {spec.parallel.pipeline} stages work"
    else:
        chosen, why = max(fit), "the largest that fits"
    return Choice(micro_batch=chosen, trials=tuple(trials), why=f"{why}, by the plan's estimate of memory")


def _trial(size: int, grid: Grid, limit_bytes: float) -> Trial:
    peak = worst(grid)[1].peak
    too_much = None if peak <= limit_bytes else "the plan needs more memory than there is"
    return Trial(micro_batch=size, memory_bytes=peak, why_not=too_much)
