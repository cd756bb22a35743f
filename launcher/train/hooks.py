"""Hooks of the training loop: traces, router statistics, guard, comparison of replicas, branch start, head diversity,
garbage collection.

The loop calls the methods of `Hook` in the order of `run_hooks` and identically on all ranks, so that a hook may be
collective.
"""

from __future__ import annotations

import time
from typing import Any

from headway.launcher.train.branch_start import measure_start
from headway.launcher.train.collector import Collector
from headway.launcher.train.guard import NumericError, dump
from headway.launcher.train.heads import HeadProbe, probe_batch
from headway.launcher.train.profile import Profile
from headway.launcher.train.router import RouterMonitor
from headway.launcher.train.session import Hook, Session
from headway.parallel import replicas
from headway.parallel.engine import StepStats


class RouterStatistics(Hook):
    """Update router biases, and add the figures of all routers to the records for which they are due."""

    def __init__(self, s: Session) -> None:
        self._monitor = RouterMonitor(
            s.engine.attention_layers,
            s.layout,
            every_steps=s.spec.tracking.router_every_steps,
            total_steps=s.spec.steps,
            tokens_per_step=s.spec.tokens_per_step,
        )

    def before_step(self, s: Session) -> None:
        self._monitor.before_step(s.step + 1)

    def after_step(self, s: Session, stats: StepStats, record: dict[str, Any]) -> None:
        if figures := self._monitor.after_step(s.step, applied=not stats.skipped):
            record["router"] = figures


class GuardSteps(Hook):
    """Check each step with the guard of the session, and record the inputs of skipped steps."""

    def after_log(self, s: Session, stats: StepStats, record: dict[str, Any]) -> None:
        if stats.skipped:
            s.saving.settle(s.tracker)  # the run may end here, and the pending checkpoint must not be lost
            dump(s.run.path / "skipped", s.step, record["batch_hash"], s.loader, s.engine, s.layout)
        s.guard.after_step(s.step, stats, s.tracker, saved_step=s.saving.saved_step)


class CompareReplicas(Hook):
    """Compare replicated state across ranks, at most once per step. Raises NumericError (70) if it differs.

    The comparison also runs before the first step and before each checkpoint, so that every checkpoint follows a
    successful comparison. Reading the weights costs less than the subsequent copy of weights, master weights and
    moments.
    """

    def __init__(self) -> None:
        self._compared_step: int | None = None  # step of the last successful comparison

    def on_start(self, s: Session) -> None:
        self._compare(s)

    def after_log(self, s: Session, stats: StepStats, record: dict[str, Any]) -> None:
        every = s.spec.guard.replicas_every_steps
        if every and s.step % every == 0:
            self._compare(s)

    def before_save(self, s: Session) -> None:
        self._compare(s)

    def _compare(self, s: Session) -> None:
        if not s.spec.guard.replicas_every_steps or self._compared_step == s.step:
            return
        mismatch = replicas.compare(s.engine, s.layout)
        if mismatch is None:
            self._compared_step = s.step
            return
        s.saving.settle(s.tracker)  # the pending checkpoint was started after a successful comparison
        begun = "before the first step" if self._compared_step is None else f"after step {self._compared_step}"
        raise NumericError(
            f"step {s.step}: {mismatch} (guard.replicas_every_steps): memory, a processor or a link is at fault, "
            f"look at the hosts named. The last good comparison was {begun}; the checkpoint of step "
            f"{s.saving.saved_step} was saved by then, and the same command continues from it. Anything written "
            "later, exports and validation losses, is suspect"
        )


class BranchStart(Hook):
    """Record the initial scale of the residual branches before the first step of a run."""

    def on_start(self, s: Session) -> None:
        if s.step == 0:
            layers = measure_start(s.engine, s.layout, probe_batch(s.spec.data, parts=_parts(s)))
            s.tracker.start({"kind": "start", "step": 0, "tokens": 0, "layers": layers})


class HeadDiversity(Hook):
    """Measure the similarity of the heads in each pool, before the first step of a run and at each validation."""

    def __init__(self, s: Session) -> None:
        self._probe = HeadProbe(s.engine, s.layout, probe_batch(s.spec.data, parts=_parts(s)))

    def on_start(self, s: Session) -> None:
        if s.step == 0:  # initial value: random heads are nearly orthogonal
            self._measure(s)

    def after_validation(self, s: Session) -> None:
        self._measure(s)

    def _measure(self, s: Session) -> None:
        t0 = time.perf_counter()
        layers = self._probe.measure()
        if layers:
            record = {"kind": "heads", "step": s.step, "tokens": s.tokens, "layers": layers}
            s.tracker.heads(record | {"seconds": time.perf_counter() - t0})


def run_hooks(s: Session) -> tuple[Hook, ...]:
    """The hooks of a run, in the order in which they are called."""
    first = Profile()  # a trace has nothing of the other hooks' work
    # Both measure a decoder's blocks: an encoder-decoder has further branches, and no figures of these kinds.
    figures = () if s.spec.model.is_encoder_decoder else (BranchStart(), HeadDiversity(s))
    return first, RouterStatistics(s), GuardSteps(), CompareReplicas(), *figures, Collector()


def _parts(s: Session) -> int:
    """Number of equal parts into which the layout splits a sequence between layers."""
    return s.layout.cp_size * (s.layout.tp_size if s.spec.parallel.sequence_parallel else 1)
