"""Whole blocks compiled by Inductor, for training on a CPU (`speed.compile: block`).

All blocks of one shape share a compiled function: parameters are inputs of the graph, and so are the boundaries of
documents (`headway.kernels.attention.Packed`) and the seeds of dropout. Only training passes are compiled. Validation
and generation run the same functions as without this option.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.attention import Packed
from headway.kernels.levers import LeverError
from headway.kernels.operations import SHAPES, short
from headway.model.base import AttentionOutput, Context
from headway.model.decoder import Block
from headway.model.dropout import Drops


class CompiledPass:
    """The forward pass of a block, and with it the backward pass, as one compiled graph."""

    def __init__(self) -> None:
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, SHAPES)
        # Random numbers of routers are those of PyTorch's generator, as without a compiler.
        options: Any = {"fallback_random": True}
        self._function: Any = torch.compile(Block.plain, dynamic=False, fullgraph=True, options=options)
        self._ran = False

    def __call__(self, block: Block, x: Tensor, context: Context, drops: Drops | None) -> AttentionOutput:
        """Raises LeverError (64) if the block cannot be compiled."""
        if context.documents is not None:
            context = replace(context, documents=Packed.of(context.documents, x.device))
        try:
            out = self._function(block, x, context, None if drops is None else drops.of_one_layer())
        except Exception as error:  # in the first pass, any error of a compiler or a linker
            if self._ran and not _of_compiler(error):
                raise
            raise LeverError(
                f"speed.compile: block does not compile a block of {type(block.attn).__name__} here ({short(error)}); "
                "use speed.compile: none, or install a C++ compiler (g++) if none was found"
            ) from error
        self._ran = True
        return out


def _of_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return isinstance(error, (TorchDynamoException, FailOnRecompileLimitHit))


def compile_blocks(module: nn.Module) -> None:
    """Compile the training passes of all blocks in `module`, at their first use."""
    compiled = CompiledPass()
    for block in module.modules():
        if isinstance(block, Block):
            block.compiled = compiled
