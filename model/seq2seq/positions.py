"""Relative positions of T5 (Raffel et al., 2020, JMLR 21, 140): a bias per head and bucket of distances.

Legend: H query heads, S queries, K keys, n buckets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from headway.model.base import Shard
from headway.model.layers import parameter


def buckets(distances: Tensor, *, count: int, largest: int, both_ways: bool) -> Tensor:
    """Bucket of each distance (place of the key minus place of the query), int64 of the same shape.

    With `both_ways`, keys after the query have the second half of the buckets; else they share bucket 0. Half of the
    buckets of a direction are for one distance each, the others grow logarithmically up to `largest`. As in the
    authors' code, logarithms are computed in fp32.
    """
    start = torch.zeros_like(distances)
    if both_ways:
        count //= 2
        start = (distances > 0).long() * count
        away = distances.abs()
    else:
        away = (-distances).clamp_min(0)
    exact = count // 2
    ratio = torch.log(away.clamp_min(1).float() / exact) / math.log(largest / exact)
    far = (exact + (ratio * (count - exact)).long()).clamp_max(count - 1)
    return start + torch.where(away < exact, away, far)


class RelativeBuckets(nn.Module):
    """The biases of one stack, which all of its layers share: `weight` [H, n]."""

    def __init__(self, heads: int, units: int, *, count: int, largest: int, both_ways: bool, init_std: float) -> None:
        """units: KV heads, whose query heads tensor parallelism keeps together."""
        super().__init__()
        self.count, self.largest, self.both_ways = count, largest, both_ways
        self.weight = parameter(heads, count)
        self.init_stds = {"weight": init_std}
        self.shards = {"weight": Shard(0, units)}

    def forward(self, queries: int, keys: int) -> Tensor:
        """The biases [H, S, K] of this rank's heads. The queries are the last of the keys' places."""
        # Row i has the distances -(K - S + i) .. S - 1 - i: a window of all distances, which begins one place earlier
        # in each row.
        distances = torch.arange(1 - keys, queries, device=self.weight.device)
        found = buckets(distances, count=self.count, largest=self.largest, both_ways=self.both_ways)
        return self.weight[:, found].unfold(1, keys, 1).flip(1)
