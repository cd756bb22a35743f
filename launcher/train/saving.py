"""Checkpoint schedule of a run, events about checkpoints, and handling of failed checkpoints."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any

from headway.launcher.run import heartbeat
from headway.launcher.run.identity import identity_hash, run_identity
from headway.launcher.run.machine import git_commit, versions
from headway.launcher.run.run_dir import RunDir, read_mapping, spec_hash
from headway.launcher.spec.spec import Spec
from headway.launcher.train.tracking import Tracker
from headway.parallel.config import CheckpointError
from headway.parallel.layout import Layout
from headway.parallel.saver import Saved, Saver


class Saving:
    """Checkpoints of a run, written during training. `saved_step`: step of the newest complete checkpoint."""

    def __init__(self, run: RunDir, spec: Spec, layout: Layout, engine: Saved) -> None:
        self._config, self._layout, self._tokens_per_step = spec.checkpoint, layout, spec.tokens_per_step
        self._saver = Saver(run.checkpoints, engine, layout, spec.checkpoint, about=_about(run, spec))
        self.saved_step, self.failures = 0, 0
        self._tokens, self._begun_s = 0, time.monotonic()  # tokens of the newest complete checkpoint

    def resumed(self, step: int, tokens: int) -> None:
        """Record that the run resumed from the checkpoint of `step`."""
        self.saved_step, self._tokens = step, tokens

    @property
    def overdue(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed. Only the clock of rank 0 is used."""
        minutes = self._config.every_minutes
        return self._layout.is_main and minutes is not None and time.monotonic() - self._begun_s > 60 * minutes

    @property
    def written(self) -> bool:
        """Whether this rank's part of the pending checkpoint is on disk."""
        return self._saver.written

    def begin(self, tracker: Tracker, state: Mapping[str, Any]) -> None:
        """Start saving the current state, after the pending checkpoint is committed. Collective."""
        self.settle(tracker)
        step, tokens, every = state["step"], state["tokens"], self._config.keep_every_tokens
        heartbeat.beat("save", step)
        tracker.flush()
        milestone = every is not None and tokens // every > self._tokens // every
        milestone = milestone or self._config.marked(before=tokens - self._tokens_per_step, tokens=tokens)
        self._saver.start(step, {**state, "milestone": milestone})
        self._begun_s = time.monotonic()

    def settle(self, tracker: Tracker, *, last: bool = False) -> None:
        """Commit the pending checkpoint, if there is one, and report the outcome. Collective.

        A failure is reported and training continues, until `checkpoint.max_failures` in a row have failed. `last`:
        training ends after this checkpoint. Raises CheckpointError if the last checkpoint fails or if the number of
        failures reaches the limit.
        """
        step = self._saver.pending_step
        if step is None:
            return
        heartbeat.beat("save", step)
        outcome = self._saver.commit(last=last)
        if outcome.error is None:
            self.saved_step, self.failures, self._tokens = step, 0, step * self._tokens_per_step
            record = {"kind": "checkpoint", "step": step, "stall_s": outcome.stall_s, "write_s": outcome.write_s}
            seconds = f"written in {outcome.write_s:.2f} s, training waited {outcome.stall_s:.2f} s"
            return tracker.event(record, f"checkpoint of step {step} {seconds}")
        self.failures += 1
        tracker.event(
            {"kind": "checkpoint_failed", "step": step, "in_a_row": self.failures, "error": outcome.error},
            f"CHECKPOINT OF STEP {step} FAILED ({self.failures} in a row): {outcome.error}. {outcome.mend}; "
            f"the last whole one is of step {self.saved_step}",
        )
        if self.failures >= self._config.max_failures or last:
            raise CheckpointError(
                f"checkpoint of step {step} cannot be written: {outcome.error}. {outcome.mend}, then "
                f"start the same command again: it continues from step {self.saved_step}"
            )


def _about(run: RunDir, spec: Spec) -> dict[str, Any]:
    """Origin of a checkpoint, for its readers and so that a run does not resume from a checkpoint of another run."""
    resolved = spec.model_dump(mode="json")
    fingerprint = read_mapping(run.card).get("data_fingerprint")
    return {
        "run": run.run_id(),
        "attempt": secrets.token_hex(8),
        "spec": resolved,
        "spec_hash": spec_hash(resolved),
        "data_fingerprint": fingerprint,
        "identity": identity_hash(run_identity(spec, fingerprint)),
        "git_commit": git_commit(),
        "versions": versions(),
    }
