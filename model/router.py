"""What routed mechanisms share: usage statistics and the f.P balancing loss.

Legend: B batch, S sequence, G groups, N routed experts per group, k selected ones.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from headway.model.base import RouterStats


def chosen_mask(logits: Tensor, idx: Tensor) -> Tensor:
    """1 where an expert was selected: logits [B, S, G, N], idx [B, S, G, k] -> [B, S, G, N], dtype of logits."""
    return torch.zeros_like(logits).scatter(-1, idx, 1.0)


def balance_loss(p: Tensor, chosen: Tensor, *, slots: int, scope: Literal["sequence", "micro_batch"]) -> Tensor:
    """f.P loss of the Switch Transformer (Fedus et al., 2022, arXiv 2101.03961, eq. 4-6), mean over groups.

    p [B, S, G, N] sums to 1 over N and carries the gradient; chosen [B, S, G, N] is 0/1. With f = share of the slots
    and P = mean p of an expert, the loss of a group is N sum_n f_n P_n: 1 at uniform use, N at collapse with k = 1.

    sequence: f and P are taken within each sequence and the products averaged over sequences. The value for a batch is
    then the same however it is cut into micro-batches and ranks. micro_batch: f and P over all tokens of the forward
    pass, the published form; it asks less of each sequence, but depends on how the batch is cut.
    """
    over = 1 if scope == "sequence" else (0, 1)
    f = chosen.mean(over) / slots
    per_group = p.shape[-1] * (f * p.mean(over)).sum(-1)  # [B, G] or [G]
    return per_group.mean()


class RouterMeter:
    """Accumulates `RouterStats` on the device, without waiting for it."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._sums: RouterStats | None = None

    @torch.no_grad()
    def update(self, logits: Tensor, chosen: Tensor) -> None:
        """logits, chosen [B, S, G, N]."""
        logits, picked = logits.float(), chosen > 0
        log_p = torch.log_softmax(logits, -1)
        margin = logits.new_zeros(())
        if self._slots < logits.shape[-1]:
            lowest = logits.masked_fill(~picked, float("inf")).amin(-1)
            margin = (lowest - logits.masked_fill(picked, float("-inf")).amax(-1)).sum()
        sums = RouterStats(
            load=picked.sum((0, 1)).float(),
            tokens=logits.new_full((), logits.shape[0] * logits.shape[1]),
            entropy=-(log_p.exp() * log_p).sum(),
            margin=margin,
            slots=self._slots,
        )
        if self._sums is not None:
            for name in ("load", "tokens", "entropy", "margin"):
                getattr(sums, name).add_(getattr(self._sums, name))
        self._sums = sums

    def stats(self) -> RouterStats | None:
        """None before the first update."""
        return self._sums

    def reset(self) -> None:
        self._sums = None
