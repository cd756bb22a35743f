"""Activation recomputation: a block keeps only its input and its routers' selections, and recomputes the rest.

The selections are kept because they are discrete. A recomputed logit may differ by rounding (another kernel, another
number of threads) and could move a token to another expert. The gradient would then not match the forward pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headway.model.base import AttentionOutput, Context, RoutingMemory


def recomputed(block: nn.Module, x: Tensor, context: Context, *others: Any) -> AttentionOutput:
    """Compute block(x, context, *others) with activation checkpointing.

    x [B, S, d], or the part of it that a rank holds between layers. In the recomputation, routers replay their
    selections, statistics are not counted again (`RoutingMemory`), and the block's collectives run again, in the same
    order on every rank. The state of the random number generator is not restored: routers do not draw in a
    recomputation, masks of dropout are a function of indices, and nothing else in a block may draw random numbers.
    """
    memory = RoutingMemory()

    def run(x: Tensor) -> AttentionOutput:
        memory.begin()
        return block(x, replace(context, memory=memory), *others)

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
