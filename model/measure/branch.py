"""How strongly each residual branch starts: rms of what it adds over the rms of the stream it is added to.

The standard deviation of a mechanism's output matrix does not fix that ratio: it depends on fan-in, on gates in front
of the matrix, and on the number of slots. Two mechanisms whose branches start differently strong train differently for
that reason alone, so a comparison of mechanisms needs one ratio for all (`model.branch_start` of a spec).

`branch_scales` finds the factors on output matrices that give every attention branch a target ratio on a probe batch.
The MLP is the same in every mechanism and stays as drawn. The function builds
one block at a time in fp32 on the CPU, on one process, so the factors are a function of the configs, the seed and the
probe batch, whatever the layout.

Legend: B batch, S sequence, d width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headway.model.base import AttentionSection, Ranks, SequenceRanks
from headway.model.config import ModelConfig
from headway.model.contexts import Contexts
from headway.model.cost import layer_configs
from headway.model.decoder import (
    Block,
    BranchScale,
    Placement,
    add_positions,
    embed,
    make_positions,
)
from headway.model.init import draw, initialise

_MANTISSA = 1 << 12
"""Factors keep 12 binary digits: rounding errors of another processor do not reach them, and a power of two in the
initial matrix changes their exponent alone."""


@torch.no_grad()
def branch_scales(
    model: ModelConfig,
    attention: AttentionSection,
    *,
    vocab_size: int,
    seed: int,
    tokens: Tensor,
    segments: Tensor | None,
    target: float,
) -> list[BranchScale]:
    """One `BranchScale` for each block: with them attention adds `target` times the rms of its stream at step 0.

    tokens [B, S] int64; segments [B, S] int32 numbers the documents, None: one each. Block after block, as a scaled
    branch changes the stream that later blocks see. `target` 0 makes the output matrices of attention and MLP zero.
    Raises ValueError where attention adds zero or a number that is not finite, so that no factor gives it the ratio.
    """
    mechanisms = layer_configs(model, attention, vocab_size=vocab_size)
    if target == 0:
        return [BranchScale(attention=0.0, mlp=0.0)] * len(mechanisms)
    shape = torch.Size((vocab_size, model.width))
    x = embed(draw("embedding", shape, std=model.init_std, seed=seed), tokens, Ranks())
    contexts = Contexts(model, attention, SequenceRanks()).of(tokens, segments, dtype=x.dtype)
    if (positions := make_positions(model)) is not None:
        initialise(positions, seed=seed, prefix="positions.")
        x = add_positions(positions, x, tokens, Placement())
    scales = []
    for index, mechanism in enumerate(mechanisms):
        block = Block(model, mechanism).eval()
        initialise(block, seed=seed, prefix=f"blocks.{index}.")
        block.attn.before_step(0)
        y, _, handed = block.attn(block.attn_norm(x), block.with_positions(contexts.at(index)))
        contexts.hand_on(index, handed)
        ratio = rms(y) / rms(x)
        if not math.isfinite(ratio) or ratio == 0:
            raise ValueError(
                f"blocks.{index}.attn: its output is {ratio:g} times the stream, and no factor makes that {target:g}"
            )
        factor = _rounded(target / ratio)
        x, normed = block.mlp_norm(x, factor * y)
        x = x + block.mlp(normed)
        scales.append(BranchScale(attention=factor))
    return scales


def rms(x: Tensor) -> float:
    """Root of the mean square of all elements, in float64."""
    return math.sqrt(float(x.double().square().mean()))


@contextlib.contextmanager
def measured_branches(blocks: Mapping[int, Block]) -> Iterator[dict[int, dict[str, float]]]:
    """While open, each forward pass of a block sums up squares: index -> "attention", "mlp" (what the branches add),
    "attention_stream" and "mlp_stream" (what they are added to).

    Sums over this rank's part of the residual stream; ratios of sums over all ranks that share the layer are right on
    every layout. With `headway.model.recompute` no pass of a block is counted twice, as gradients are off.
    """
    found: dict[int, dict[str, float]] = {index: {} for index in blocks}

    def before_mlp(index: int, norm: nn.Module, inputs: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        _sum(found[index], "attention", inputs[1])
        _sum(found[index], "attention_stream", inputs[0])
        _sum(found[index], "mlp_stream", outputs[0])
        stream[index] = outputs[0]

    def after_block(index: int, block: nn.Module, inputs: Any, outputs: Any) -> None:
        _sum(found[index], "mlp", outputs[0].double() - stream.pop(index).double())

    stream: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for index, block in blocks.items():
            stack.callback(block.mlp_norm.register_forward_hook(partial(before_mlp, index)).remove)
            stack.callback(block.register_forward_hook(partial(after_block, index)).remove)
        yield found


def branch_ratios(sums: Mapping[str, float]) -> dict[str, float]:
    """{"attention", "mlp"}: rms ratios, of sums of `measured_branches` over ranks; NaN where there is no stream."""
    return {
        name: math.sqrt(sums[name] / sums[f"{name}_stream"]) if sums.get(f"{name}_stream") else math.nan
        for name in ("attention", "mlp")
    }


def _rounded(factor: float) -> float:
    mantissa, exponent = math.frexp(factor)
    return math.ldexp(round(mantissa * _MANTISSA) / _MANTISSA, exponent)


def _sum(sums: dict[str, float], name: str, x: Tensor) -> None:
    sums[name] = sums.get(name, 0.0) + float(x.double().square().sum())
