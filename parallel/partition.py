"""Partition of layers into pipeline stages of consecutive layers, which minimizes the cost of the slowest stage.

Pipeline layers are: embedding, blocks, final norm, head. Legend: n layers, P stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from headway.model.base import AttentionConfig, AttentionSection
from headway.model.config import ModelConfig
from headway.model.cost import block_flops, layer_configs


def layer_costs(
    model: ModelConfig,
    attention: AttentionSection,
    *,
    vocab_size: int,
    seq_len: int,
    recompute: bool = False,
) -> list[float]:
    """Executed training FLOPs per token of [embedding, each block, norm, head] (`headway.model.cost`).

    Training costs three times the forward FLOPs; a block with activation recomputation (`recompute`) four times. The
    embedding and the norm count as 0, the head as 2dV forward.
    """
    width = model.width
    blocks = [
        block_flops(model, config, seq_len=seq_len).executed
        for config in layer_configs(model, attention, vocab_size=vocab_size)
    ]
    passes = 4 if recompute else 3
    return [0.0, *(float(passes * block) for block in blocks), 0.0, float(3 * 2 * width * vocab_size)]


def stage_pieces(layers: Sequence[AttentionConfig]) -> list[int]:
    """Numbers of consecutive blocks that lie in one stage, in order: a layer and all that take heads from it."""
    last = {config.takes_from: taker for taker, config in enumerate(layers)}
    ends: list[int] = []  # last block of each piece
    for index in range(len(layers)):
        end = last.get(index, index)
        if ends and index <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            ends.append(end)
    return [end - before for before, end in pairwise([-1, *ends])]


def stage_bounds(costs: Sequence[float], stages: int, together: Sequence[int] | None = None) -> list[int]:
    """`balanced` for the layers of `layer_costs`: stage p has layers bounds[p] to bounds[p + 1] - 1.

    Each stage has at least one block: the embedding stays with the first block, norm and head with the last.
    together: `stage_pieces`, which are not cut; None: every block alone.
    Raises ValueError if there are more stages than blocks or pieces.
    """
    embedding, *blocks, norm, head = costs
    blocks[0] += embedding
    blocks[-1] += norm + head
    starts = [0, *accumulate(together or [1] * len(blocks))]
    inner = balanced([sum(blocks[first:end]) for first, end in pairwise(starts)], stages)[1:-1]
    return [0, *(starts[bound] + 1 for bound in inner), len(costs)]


def balanced(costs: Sequence[float], parts: int) -> list[int]:
    """Partition into consecutive, nonempty pieces that minimizes the largest cost of a piece.

    Returns the bounds b_0 = 0 < b_1 < ... < b_parts = n. Ties are broken by the smallest sum of squared costs (the most
    even partition), then by the earliest bounds. The result is exact: dynamic programming on integers, O(parts n^2).
    `costs` [n] are finite and >= 0. Raises ValueError unless 1 <= parts <= n.
    """
    n = len(costs)
    if not 1 <= parts <= n:
        raise ValueError(f"parts: {n} layers cannot be split into {parts} stages; use 1 to {n}")
    total = [0]  # total[j]: cost of the first j layers, in a unit that makes every cost an integer
    for cost in _whole(costs):
        total.append(total[-1] + cost)

    # bottleneck[i]: smallest possible largest cost of the layers from i on, in the current number of pieces
    bottleneck = [total[n] - start for start in total[:n]]
    for pieces in range(2, parts + 1):
        bottleneck = [
            min(max(total[j] - total[i], bottleneck[j]) for j in range(i + 1, n - pieces + 2))
            for i in range(n - pieces + 1)
        ]
    return _most_even(total, parts, bottleneck[0])


def _most_even(total: list[int], parts: int, limit: int) -> list[int]:
    """Bounds of pieces that cost at most `limit`, with the smallest sum of squared costs, then the earliest bounds.

    `total` [n + 1]: cost of the first j layers.
    """
    n, none = len(total) - 1, total[-1] ** 2 + 1  # larger than every sum of squares
    best = [(total[n] - start) ** 2 if total[n] - start <= limit else none for start in total[:n]]
    cuts: list[list[int]] = []  # cuts[p][i]: end of the first piece if the layers from i on form p + 2 pieces
    for pieces in range(2, parts + 1):
        rows = []
        for i in range(n - pieces + 1):
            ends = [j for j in range(i + 1, n - pieces + 2) if total[j] - total[i] <= limit]
            squares = [((total[j] - total[i]) ** 2 + best[j], j) for j in ends]
            rows.append(min(squares, default=(none, i + 1)))
        best, cut = [square for square, _ in rows], [end for _, end in rows]
        cuts.append(cut)
    bounds = [0]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return [*bounds, n]


def _whole(costs: Sequence[float]) -> list[int]:
    """Scale the costs to integers with exactly the same proportions, so that ties are exact."""
    exact = [Fraction(cost) for cost in costs]
    unit = math.lcm(*(cost.denominator for cost in exact))
    return [int(cost * unit) for cost in exact]


def imbalance(costs: Sequence[float], bounds: Sequence[int]) -> float:
    """Largest cost of a stage divided by the mean; 1 if all are equal. Costs must not all be 0."""
    stages = [sum(costs[first:end]) for first, end in pairwise(bounds)]
    return max(stages) * len(stages) / sum(stages)
