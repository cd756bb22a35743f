"""Agreement of all ranks before each step: batch, stop and save."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headway.data.config import DataError
from headway.data.loader import StepBatch
from headway.parallel.layout import Layout

_UINT64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Requests of one rank: stop; save, because a checkpoint is due by the clock of rank 0. `written`: its part of the
    pending checkpoint is written and can be committed.
    """

    stop: bool
    save: bool
    written: bool


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """Number of targets and hash of the global batch. `stop`: a rank requests a stop. `save`: a checkpoint is due by
    the clock of rank 0. `written`: all ranks have written their parts of the pending checkpoint.
    """

    targets: int
    digest: str
    stop: bool
    save: bool
    written: bool


def agree(batch: StepBatch, wishes: Wishes, layout: Layout, *, step: int, global_batch: int) -> Agreed:
    """Run one small all-reduce before each step. `step`: completed steps; `global_batch`: sequences of all ranks.

    The hash is the sum of the parts of the data-parallel ranks modulo 2^64, added in two halves that cannot overflow.
    Raises DataError if ranks that must process the same sequences have read different ones, or if the ranks together
    have not read the whole global batch of this step.
    """
    low, high = batch.digest & 0xFFFFFFFF, batch.digest >> 32
    part = [batch.targets, low, high, batch.sequences] if layout.is_data_lead else [0, 0, 0, 0]
    asked = [int(wishes.stop), int(wishes.save), int(wishes.written)]
    mine = torch.tensor([*part, low, high, batch.step, *asked], dtype=torch.int64, device=layout.device)
    targets, low, high, sequences, all_low, all_high, steps, stop, save, written = layout.sum(mine).tolist()
    digest, world = (low + (high << 32)) & _UINT64, layout.world_size
    if (all_low + (all_high << 32)) & _UINT64 != digest * (world // layout.dp_size) & _UINT64:
        raise DataError(
            f"step {step + 1}: ranks that share a model have read different sequences; "
            "every host must see the same dataset (data.source), whole and of one version"
        )
    if sequences != global_batch or steps != step * world:
        raise DataError(
            f"step {step + 1}: all ranks together have read {sequences} sequences of step {steps / world + 1:g} on "
            f"average, instead of {global_batch} of this one: a rank has skipped or repeated data; start the same "
            "command again"
        )
    return Agreed(targets=targets, digest=f"{digest:016x}", stop=stop > 0, save=save > 0, written=written == world)
