"""Bytes that one rank sends in one optimizer step, by kind, and the ranks of each exchange.

For ring algorithms: in an all-reduce of b bytes over R ranks, each rank sends 2 (R-1)/R b. In an all-gather or a
reduce-scatter of b bytes in total, each rank sends (R-1)/R b.
Legend: n tokens of a micro-batch on a rank, d width, m micro-batches per step, L blocks of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass

from headway.launcher.plan.memory import LIVE_ELEMENTS
from headway.launcher.plan.stages import Grid, Stage


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One kind of exchange of one rank. `every`: distance in rank order between neighbours in the group."""

    kind: str
    bytes_per_step: float
    exchanges_per_step: float
    ranks: int
    every: int


def flows(grid: Grid, stage: Stage) -> list[Flow]:
    """The flows of a rank of one stage, without those that send nothing."""
    found = [
        *_tensor(grid, stage),
        _context(grid, stage),
        _pipeline(grid, stage),
        *_data(grid, stage),
        _tied(grid, stage),
    ]
    return [flow for flow in found if flow.bytes_per_step > 0]


def _tensor(grid: Grid, stage: Stage) -> list[Flow]:
    """Tensor parallelism of attention and MLP.

    Their outputs are all-reduced in the forward pass, and the gradients of their inputs in the backward pass. Under
    sequence parallelism, each pass has an all-gather and a reduce-scatter instead. Sums that a mechanism forms within a
    layer are exchanged in both passes.
    """
    spec, m, ranks = grid.spec, grid.accumulation, grid.spec.parallel.tensor
    share, recomputes = (ranks - 1) / ranks, spec.parallel.recompute == "block"
    residual = grid.tokens * spec.model.width * grid.element_bytes
    # An all-gather or a reduce-scatter sends half as much as an all-reduce. A recomputed pass lacks the last exchange,
    # because autograd stops it before the MLP's result is reduced.
    halves = 8 + (3 if spec.parallel.sequence_parallel else 2) * recomputes
    borders = (halves * len(stage.blocks) + 2 * stage.first + 2 * stage.last) / 2
    calls = borders * (2 if spec.parallel.sequence_parallel else 1)
    passes = 3 if recomputes else 2  # of blocks: forward, backward, and forward again
    within = sum(grid.footprint(block).sums_per_token for block in stage.blocks) * grid.tokens
    loss = 3 * 4 * grid.tokens if stage.last else 0  # largest logit, sum of exponentials, the label's logit
    # Parameters that every rank holds in full have partial gradients; norms only under sequence parallelism.
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
            bytes_per_step=m * whole * 4 * 2 * share,  # summed in fp32
            exchanges_per_step=m * len(stage.blocks) if whole else 0,
            **common,
        ),
    ]


def _context(grid: Grid, stage: Stage) -> Flow:
    """Ulysses: an all-to-all of queries, keys and values, one of the outputs, and the same for their gradients.

    With one KV head, keys and values are all-gathered instead.
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
    """Residual streams to the next stage, and their gradients to the previous stage."""
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
    """Data parallelism: gradients in `parallel.gradient_reduction`, parameters in the precision of the parameters.

    Under ZeRO-1, DeepSpeed all-reduces gradients once per step; under ZeRO-2 after every micro-batch, and each rank
    keeps its part of the result; under ZeRO-3 it reduce-scatters them after every micro-batch. ZeRO-3 all-gathers
    parameters for every micro-batch, and again for the backward pass if they exceed `LIVE_ELEMENTS`. ZeRO-1 and 2
    all-gather the new parameters after the step.
    """
    parallel, m, ranks = grid.spec.parallel, grid.accumulation, grid.data_ranks
    share, size = (ranks - 1) / ranks, float(stage.num_params * grid.element_bytes)
    times = 1 if parallel.zero == 1 else m
    reduced = float(stage.num_params * (4 if parallel.gradient_reduction == "fp32" else 2))
    per_gradient = reduced * share * (1 if parallel.zero == 3 else 2)
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
    """The fp32 gradient of tied embeddings, exchanged between the first and the last stage."""
    spec = grid.spec
    shares = spec.model.tied_embeddings and spec.parallel.pipeline > 1 and (stage.first or stage.last)
    return Flow(
        kind="pipeline: gradient of the tied embedding",
        bytes_per_step=float(grid.vocab_rows * spec.model.width * 4) if shares else 0.0,
        exchanges_per_step=1,
        ranks=2,
        every=(spec.parallel.pipeline - 1) * spec.parallel.tensor * grid.data_ranks,
    )
