"""Sums over tokens that routers collect in training. Legend: G KV heads (= groups), N experts of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RouterDetail:
    """Statistics of a router in training, as sums over tokens. Sums of micro-batches, steps and ranks can be added.

    Top-1 margin: best logit minus second-best, without bias and noise; 0 with a single expert.
    `headway.model.measure.router_meter` computes the figures from the sums. Under context parallelism, a rank does not
    see the token before the first one of its part. `switches` and `followers` both omit that pair, so their ratio is
    unbiased.
    """

    tokens: Tensor  # []: tokens measured
    entropy: Tensor  # [G]: entropy (nats) of the softmax of the logits
    choices: Tensor  # [G]: selected experts, k per token
    gate: Tensor  # [G]: gates of the selected experts
    top1_margin: Tensor  # [G]
    close: Tensor  # [G]: tokens whose top-1 margin is below 0.1
    switches: Tensor  # [G]: selected experts that the previous token of the sequence did not select
    followers: Tensor  # [G]: selected experts of all tokens except the first of each sequence
    token_load: Tensor  # [buckets, G, N]: times an expert was selected, by token id modulo the number of buckets

    def tensors(self) -> list[Tensor]:
        """In the order of the fields."""
        return [getattr(self, f.name) for f in fields(self)]

    def like(self, tensors: Sequence[Tensor]) -> RouterDetail:
        """The same fields with other values, in the order of `tensors()`."""
        return RouterDetail(**{f.name: t for f, t in zip(fields(self), tensors, strict=True)})

    def __add__(self, other: RouterDetail) -> RouterDetail:
        return self.like([a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)])


class RouterStats(NamedTuple):
    """Statistics of a router in training since the last reset: fp32 sums, detached."""

    load: Tensor  # [G, N]: times each of the group's N routed experts was selected
    detail: RouterDetail | None  # None if `Attention.watch_routers` turned details off
    cut: bool = False  # True if G covers only the groups of this tensor-parallel rank
