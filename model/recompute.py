"""Activation recomputation: a block keeps its input and its routers' choices, and computes the rest again.

What a router chooses is discrete: a logit that comes out otherwise by one rounding (another kernel, another number of
threads) would move a token to another expert, and its gradient would belong to a pass that never was.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headway.model.base import AttentionOutput, Context, RoutingMemory


def recomputed(block: nn.Module, x: Tensor, context: Context) -> AttentionOutput:
    """block(x, context), and the same again for each backward pass, in place of the tensors it would keep.

    x [B, S, d], or the part of it that a rank keeps between layers. Routers repeat their choices and statistics count
    once (`RoutingMemory`); collectives within the block happen again, in the same order on every rank. Nothing else
    in a block may draw random numbers: the generator's state is not put back, since no router draws when it repeats.
    """
    memory = RoutingMemory()

    def run(x: Tensor) -> AttentionOutput:
        memory.begin()
        return block(x, replace(context, memory=memory))

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
