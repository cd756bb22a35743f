"""Router statistics, accumulated on the device without waiting for it.

Legend: B batch, S sequence, G groups, N experts per group, k selected ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.model.base import RouterStats


class RouterMeter:
    """Accumulates `RouterStats`."""

    def __init__(self) -> None:
        self._sums: RouterStats | None = None

    @torch.no_grad()
    def update(self, logits: Tensor, chosen: Tensor, gate: Tensor, tokens: Tensor | None) -> None:
        """logits, chosen [B, S, G, N]; gate [B, S, G, k]; tokens [B, S] ids, where the caller has them."""
        slots = gate.shape[-1]
        logits, picked = logits.float(), chosen > 0
        log_p = torch.log_softmax(logits, -1)
        margin = logits.new_zeros(())
        if slots < logits.shape[-1]:
            lowest = logits.masked_fill(~picked, float("inf")).amin(-1)
            margin = (lowest - logits.masked_fill(picked, float("-inf")).amax(-1)).sum()
        sums = RouterStats(
            load=picked.sum((0, 1)).float(),
            tokens=logits.new_full((), logits.shape[0] * logits.shape[1]),
            entropy=-(log_p.exp() * log_p).sum(),
            margin=margin,
            slots=slots,
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
