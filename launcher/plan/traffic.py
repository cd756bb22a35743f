"""Bytes that one rank sends in one optimizer step, by kind, and between whom.

Rings: an all-reduce of b bytes over R ranks sends 2 (R-1)/R b from each, a gather or a reduce-scatter (R-1)/R b of the
whole. Legend: n tokens of a micro-batch on a rank, d width, m micro-batches per step, L blocks of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass

from headway.launcher.plan.memory import LIVE_ELEMENTS
from headway.launcher.plan.stages import Grid, Stage


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One kind of exchange of one rank. `every`: ranks from one member of the group to the next in rank order."""

    kind: str
    bytes_per_step: float
    exchanges_per_step: float
    ranks: int
    every: int


def flows(grid: Grid, stage: Stage) -> list[Flow]:
    """Of a rank of one stage, without those that send nothing."""
    found = [
        *_tensor(grid, stage),
        _context(grid, stage),
        _pipeline(grid, stage),
        *_data(grid, stage),
        _tied(grid, stage),
    ]
    return [flow for flow in found if flow.bytes_per_step > 0]


def _tensor(grid: Grid, stage: Stage) -> list[Flow]:
    """Into and out of attention and MLP: an all-reduce out, forward, and one in, backward; under sequence parallelism a
    gather in and a reduce-scatter out, either way. What a mechanism adds up within a layer goes both ways.
    """
    spec, m, ranks = grid.spec, grid.accumulation, grid.spec.parallel.tensor
    share, recomputes = (ranks - 1) / ranks, spec.parallel.recompute == "block"
    residual = grid.tokens * spec.model.width * grid.element_bytes
    # A gather or a reduce-scatter is half an all-reduce. Out of the recomputed pass nothing comes: autograd stops it
    # before the MLP's result is added up.
    halves = 8 + (3 if spec.parallel.sequence_parallel else 2) * recomputes
    borders = (halves * len(stage.blocks) + 2 * stage.first + 2 * stage.last) / 2
    calls = borders * (2 if spec.parallel.sequence_parallel else 1)
    passes = 3 if recomputes else 2  # of blocks: forward, backward, and forward again
    within = sum(grid.footprint(block).sums_per_token for block in stage.blocks) * grid.tokens
    loss = 3 * 4 * grid.tokens if stage.last else 0  # largest logit, sum of exponentials, the label's logit
    # Parameters that every rank holds whole have partial gradients; norms only where each rank has its own tokens.
    whole = stage.replicated + stage.parameters["norm"] * spec.parallel.sequence_parallel
    common = {"ranks": ranks, "every": 1}
    return [
        Flow(
            kind="tensor: layers' inputs and outputs",
            bytes_per_step=m * borders * residual * 2 * share,
            exchanges_per_step=m * calls,
            **common,
        ),
        Flow(
            kind="tensor: sums within attention",
            bytes_per_step=m * passes * within * 2 * share,
            exchanges_per_step=m * passes * 2 * len(stage.blocks) if within else 0,
            **common,
        ),
        Flow(
            kind="tensor: loss over the vocabulary",
            bytes_per_step=m * loss * 2 * share,
            exchanges_per_step=2 * m * stage.last,
            **common,
        ),
        Flow(
            kind="tensor: gradients of whole parameters",
            bytes_per_step=m * whole * grid.element_bytes * 2 * share,
            exchanges_per_step=m * len(stage.blocks) if whole else 0,
            **common,
        ),
    ]


def _context(grid: Grid, stage: Stage) -> Flow:
    """Ulysses: queries, keys, values in, outputs out, and their gradients back; of one KV head, keys and values are
    gathered instead.
    """
    parallel, m = grid.spec.parallel, grid.accumulation
    ranks = parallel.context
    dealt = sum(grid.footprint(block).dealt_per_token for block in stage.blocks) * grid.tokens
    passes = 3 if parallel.recompute == "block" else 2
    return Flow(
        kind="context: queries, keys, values, outputs",
        bytes_per_step=m * passes * dealt * (ranks - 1) / ranks,
        exchanges_per_step=m * passes * 4 * len(stage.blocks),
        ranks=ranks,
        every=parallel.tensor,
    )


def _pipeline(grid: Grid, stage: Stage) -> Flow:
    """Residual streams to the next stage and gradients to the one before."""
    spec, m = grid.spec, grid.accumulation
    sends = m * ((not stage.last) + (not stage.first))
    return Flow(
        kind="pipeline: activations and their gradients",
        bytes_per_step=float(sends * grid.residual_tokens * spec.model.width * grid.element_bytes),
        exchanges_per_step=sends,
        ranks=spec.parallel.pipeline,
        every=spec.parallel.tensor * grid.data_ranks,
    )


def _data(grid: Grid, stage: Stage) -> list[Flow]:
    """DeepSpeed all-reduces gradients in the parameters' precision: once a step under ZeRO-1, after every micro-batch
    under ZeRO-2 (each rank keeps its part of the result), reduce-scattered under ZeRO-3, whose parameters are gathered
    for every micro-batch, and for its backward pass again where there are too many to stay. ZeRO-1 and 2 gather the new
    parameters after the step.
    """
    parallel, m, ranks = grid.spec.parallel, grid.accumulation, grid.data_ranks
    share, size = (ranks - 1) / ranks, float(stage.num_params * grid.element_bytes)
    times = 1 if parallel.zero == 1 else m
    per_gradient = size * share * (1 if parallel.zero == 3 else 2)
    stay = stage.num_params <= LIVE_ELEMENTS
    gathers = (m if stay else 2 * m) if parallel.zero == 3 else 1
    layers = len(stage.blocks) if parallel.zero == 3 else 1
    common = {"ranks": ranks, "every": parallel.tensor}
    return [
        Flow(kind="data: gradients", bytes_per_step=times * per_gradient, exchanges_per_step=times * layers, **common),
        Flow(
            kind="data: parameters",
            bytes_per_step=gathers * size * share,
            exchanges_per_step=gathers * layers,
            **common,
        ),
    ]


def _tied(grid: Grid, stage: Stage) -> Flow:
    """The gradient, in fp32, of a matrix that is embedding and head, between the stages that have it."""
    spec = grid.spec
    shares = spec.model.tied_embeddings and spec.parallel.pipeline > 1 and (stage.first or stage.last)
    return Flow(
        kind="pipeline: gradient of the tied embedding",
        bytes_per_step=float(grid.vocab_rows * spec.model.width * 4) if shares else 0.0,
        exchanges_per_step=1,
        ranks=2,
        every=(spec.parallel.pipeline - 1) * spec.parallel.tensor * grid.data_ranks,
    )
