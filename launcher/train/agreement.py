"""What all ranks must know of a step before they take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headway.data.config import DataError
from headway.data.loader import StepBatch
from headway.parallel.layout import Layout

_UINT64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What one rank wants: to stop, to save because rank 0's clock asks for it, to commit the pending save, of which
    its own part is written.
    """

    stop: bool
    save: bool
    written: bool


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """Targets and hash of the global batch; whether any rank wants to stop, rank 0's clock asks for a checkpoint, every
    rank has written its part of the pending one.
    """

    targets: int
    digest: str
    stop: bool
    save: bool
    written: bool


def agree(batch: StepBatch, wishes: Wishes, layout: Layout, *, step: int, global_batch: int) -> Agreed:
    """One small all-reduce before each step. `step`: steps done; `global_batch`: sequences of all ranks together.

    The hash is the sum of the data-parallel ranks' parts modulo 2^64, added in two halves that cannot overflow.
    Raises DataError where ranks that work on the same sequences have read different ones, and where the ranks
    together have not read the whole global batch of this step.
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
