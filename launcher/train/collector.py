"""Python's garbage collector during training: frozen after the first steps, then run at chosen steps only.

An automatic collection stops a rank at any allocation, for longer the more objects exist, and all other ranks then wait
for it in their next exchange. Collections at the same steps on all ranks take place at the same time (torchtitan does
the same).
"""

from __future__ import annotations

import gc
import time
from typing import Any

from headway.launcher.train.session import Hook, Session
from headway.parallel.engine import StepStats

FIRST_STEPS = 3
"""Steps of this process after which what exists stays: modules, parameters, optimizer states, kernels, hooks."""

EVERY_STEPS = 50
"""Steps between collections: what cycles refer to, such as tensors, is freed at the latest after as many steps."""


class Collector(Hook):
    """Freeze the objects that exist after the first steps, and collect the others at fixed steps, at validations and
    before saves. The record of a step with a collection has its time in seconds, `collect_s`.
    """

    def __init__(self) -> None:
        self._steps = 0  # of this process
        self._was_enabled = gc.isenabled()

    @property
    def active(self) -> bool:
        """Whether automatic collections are off."""
        return self._steps >= FIRST_STEPS

    def after_step(self, s: Session, stats: StepStats, record: dict[str, Any]) -> None:
        self._steps += 1
        begin = time.perf_counter()
        if self._steps == FIRST_STEPS:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif self.active and s.step % EVERY_STEPS == 0:
            gc.collect()
        else:
            return
        record["collect_s"] = time.perf_counter() - begin

    def after_validation(self, s: Session) -> None:
        self._collect()

    def before_save(self, s: Session) -> None:
        self._collect()

    def on_close(self, s: Session) -> None:
        if self.active:
            gc.unfreeze()
            if self._was_enabled:
                gc.enable()

    def _collect(self) -> None:
        if self.active:
            gc.collect()
