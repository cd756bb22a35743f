"""The training loop of one rank: load, then step, log, validate, save until all tokens are trained.

All ranks run the same code in the same order, because most of it is collective. Optional features are in
`headway.launcher.train.hooks`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from headway.data.mixture import MixedText
from headway.launcher.base.intervals import interval
from headway.launcher.run import heartbeat
from headway.launcher.run.records import step_seconds
from headway.launcher.run.run_dir import RunDir, write_json
from headway.launcher.train.agreement import Agreed, Wishes, agree
from headway.launcher.train.load import open_session
from headway.launcher.train.session import Session, seed_step
from headway.launcher.train.stop import Preempted, StopFlag
from headway.launcher.train.tracking import say
from headway.parallel.engine import Evaluation, StepStats
from headway.parallel.fault_points import memory


@dataclass(frozen=True, kw_only=True)
class Step:
    """A completed step: agreement of the ranks before it, statistics, seconds for reading data and in total."""

    agreed: Agreed
    stats: StepStats
    data_s: float
    step_s: float


def train(run: RunDir, stop: StopFlag) -> None:
    """Train the run to its end. If `stop` is set on any rank, saves the state and raises Preempted."""
    with open_session(run) as s:
        spec = s.spec
        if spec.train.validate_first and s.step == 0:
            validate(s)
        while s.step < spec.steps:
            agreed = train_step(s, stop=stop.raised).agreed
            if s.is_due(spec.train.validate_every_tokens):
                validate(s)
            if s.checkpoint_due or agreed.save or agreed.stop:
                save(s, last=agreed.stop or s.step == spec.steps)
            elif agreed.written:
                s.saving.settle(s.tracker)
            if agreed.stop and s.step < spec.steps:
                raise Preempted(f"stopped after step {s.step} by a signal; the same command continues from there")
        finish(s)


def train_step(s: Session, *, stop: bool = False) -> Step:
    """Read a batch, take one optimizer step and log it. `stop`: this rank was asked to stop."""
    heartbeat.beat("data", s.step + 1)
    start = time.perf_counter()
    for hook in s.hooks:
        hook.before_data(s)
    batch = s.batches.take()
    data_s = time.perf_counter() - start
    heartbeat.beat("step", s.step + 1)
    wishes = Wishes(stop=stop, save=s.saving.overdue, written=s.saving.written)
    agreed = agree(batch, wishes, s.layout, step=s.step, global_batch=s.spec.train.global_batch)
    seed_step(s.spec, s.layout, s.step + 1)
    s.engine.before_step(s.tokens)
    for hook in s.hooks:
        hook.before_step(s)
    lr, allows = s.lr, s.guard.allows if s.guard.vetoes else None
    stats = s.engine.train_step(batch.micro, targets=agreed.targets, lr=lr, allows=allows, meanwhile=s.batches.fetch)
    step = Step(agreed=agreed, stats=stats, data_s=data_s, step_s=time.perf_counter() - start)
    s.count_step(step.step_s)
    memory("step:weights", s.engine.logical[0].parameter.data)
    record = _record(s, step, lr)
    for hook in s.hooks:
        hook.after_step(s, stats, record)
    s.tracker.train(record, seconds_left=s.seconds_left)
    for hook in s.hooks:
        hook.after_log(s, stats, record)
    return step


def _record(s: Session, step: Step, lr: float) -> dict[str, Any]:
    stats = step.stats
    return {
        "kind": "train",
        "step": s.step,
        "tokens": s.tokens,
        "loss": stats.loss,
        "aux_loss": stats.aux_loss,
        "grad_norm": stats.grad_norm,
        "lr": lr,
        "targets": stats.targets,
        "skipped": stats.skipped,
        "batch_hash": step.agreed.digest,
        "step_s": step.step_s,
        "data_s": step.data_s,
        "forward_s": stats.forward_s,
        "backward_s": stats.backward_s,
        "optimizer_s": stats.optimizer_s,
        "train_s": s.train_s,
        "tokens_per_s": s.spec.tokens_per_step / step.step_s,
    }


def validate(s: Session) -> None:
    """Log loss and accuracy on the fixed validation tokens, and on each set of them."""
    heartbeat.beat("validate", s.step)
    start = time.perf_counter()
    s.engine.before_step(s.tokens)  # set schedules to the current state, also if a stage just ended
    data = s.validation
    result, *of_sets = s.engine.evaluate_parts(data.batches, data.documents, data.parts)
    s.validation_loss, s.validation_step = result.loss, s.step
    s.tracker.validation(
        {
            "kind": "validation",
            "step": s.step,
            "tokens": s.tokens,
            **_result(s, "", result),
            "train_s": s.train_s,
            "seconds": time.perf_counter() - start,
            **({"sets": {n: _result(s, n, e) for n, e in zip(data.sets, of_sets, strict=True)}} if of_sets else {}),
            **_mixed(s),
        }
    )
    for hook in s.hooks:
        hook.after_validation(s)


def _result(s: Session, name: str, found: Evaluation) -> dict[str, Any]:
    """The entries of a record for one validation set; "" is the main one."""
    return {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "targets": found.targets,
        "standard_error": found.standard_error,
        "documents": found.groups,
        **_interval(found),
        **_bits_per_byte(s, name, found.loss),
    }


def _interval(found: Evaluation) -> dict[str, float]:
    """Of the loss, over documents; none with fewer than two."""
    if found.standard_error is None:
        return {}
    low, high = interval(found.loss, found.standard_error, groups=found.groups)
    return {"loss_low": low, "loss_high": high}


def _bits_per_byte(s: Session, name: str, loss: float) -> dict[str, float]:
    """In the record where the bytes of a token are known: not for synthetic data, nor if the tokenizer loses text."""
    per_token = s.bytes_per_token.get(name)
    return {"bits_per_byte": loss / (math.log(2) * per_token)} if per_token else {}


def _mixed(s: Session) -> dict[str, Any]:
    """What has been trained of each dataset of a mixture: tokens, and passes over it."""
    mixed = s.loader.source
    if not isinstance(mixed, MixedText):
        return {}
    return {"mix": mixed.trained(s.step * s.spec.train.global_batch)}


def save(s: Session, *, last: bool = False) -> None:
    """Start a checkpoint. Training continues while its files are written; with `last` the call waits for them.

    Raises CheckpointError under the conditions of `Saving.settle`.
    """
    for hook in s.hooks:
        hook.before_save(s)
    s.saving.begin(s.tracker, s.state())
    if last:
        s.saving.settle(s.tracker, last=True)


def finish(s: Session) -> None:
    """Write summary.json, which marks the run as complete. Raises OSError if records are missing on the disk."""
    if s.validation_loss is None:
        validate(s)
    heartbeat.beat("finish", s.step)
    if not s.layout.is_main:
        return
    s.tracker.require()
    steady = np.sort(step_seconds(s.run, after=2))
    median = float(steady[len(steady) // 2]) if len(steady) else None
    summary = {
        "complete": True,
        "exit": "complete",
        "steps": s.step,
        "tokens": s.tokens,
        "final_validation_loss": s.validation_loss,
        "train_s": s.train_s,
        "tokens_per_s_median": s.spec.tokens_per_step / median if median else None,
        "resumes": s.resumes,
        "records": s.tracker.end(),
        **_mixed(s),
    }
    write_json(s.run.summary, summary)
    s.tracker.finish(summary)
    say(
        f"done: {s.tokens:,} tokens in {s.train_s:.1f} s of training, validation loss {s.validation_loss:.4f}; "
        f"records in {s.run.path}",
    )
