"""Builds the engine for a layout: this rank's part of the decoder, and the engine that trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headway.model.base import AttentionSection
from headway.model.config import ModelConfig
from headway.model.cost import layer_configs
from headway.model.decoder import BranchScale, Placement
from headway.model.seq2seq.build import build_model
from headway.parallel.collectives import sequence_ranks, tensor_ranks
from headway.parallel.config import OptimizerConfig, ParallelConfig, SpeedConfig
from headway.parallel.deepspeed_options import quiet_deepspeed
from headway.parallel.engine import Engine
from headway.parallel.layout import Layout
from headway.parallel.operations import operations_of
from headway.parallel.partition import layer_costs, stage_bounds, stage_pieces
from headway.parallel.single_engine import SingleEngine


def make_engine(
    model: ModelConfig,
    attention: AttentionSection,
    *,
    vocab_size: int,
    seed: int,
    seq_len: int,
    parallel: ParallelConfig,
    speed: SpeedConfig | None = None,
    optimizer: OptimizerConfig,
    layout: Layout,
    micro_batch: int,
    accumulation: int,
    scales: Sequence[BranchScale] | None = None,
) -> Engine:
    """Build the engine. Initial parameters are equal in every layout; a rank stores only its part of them.

    `seq_len`: used to partition layers into pipeline stages by cost. `micro_batch`, `accumulation`: see `Engine`.
    `scales`: factors on the initial output matrices, one pair per block of the model.
    Raises LeverError if an option of `speed` is not available on this machine.
    """
    speed = speed or SpeedConfig()
    single = parallel.is_single(layout.world_size)
    if not single:
        # This must be the first import of DeepSpeed, which selects its device on import.
        deepspeed = quiet_deepspeed(cpu=layout.device.type == "cpu")
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    operations = operations_of(speed, parallel, layout.device)
    placement = Placement(
        ranks=tensor_ranks(layout, sequence_parallel=parallel.sequence_parallel),
        sequence=sequence_ranks(layout, operations.core),
        recompute=parallel.recompute,
        operations=operations,
    )
    if layout.pp_size == 1:
        built = build_model(model, attention, vocab_size=vocab_size, seed=seed, placement=placement, scales=scales)
        if speed.compile == "block":
            from headway.model.compiled import compile_blocks

            compile_blocks(built)
        common: dict[str, Any] = {"parallel": parallel, "optimizer": optimizer, "layout": layout}
        common["accumulation"] = accumulation
        if single:
            return SingleEngine(built, **common)
        from headway.parallel.zero_engine import ZeroEngine

        return ZeroEngine(built, micro_batch=micro_batch, **common)
    from headway.parallel.pipeline import PipelineEngine

    costs = layer_costs(
        model, attention, vocab_size=vocab_size, seq_len=seq_len, recompute=parallel.recompute == "block"
    )
    return PipelineEngine(
        model,
        attention,
        vocab_size=vocab_size,
        seed=seed,
        placement=placement,
        bounds=stage_bounds(
            costs, layout.pp_size, stage_pieces(layer_configs(model, attention, vocab_size=vocab_size))
        ),
        parallel=parallel,
        optimizer=optimizer,
        layout=layout,
        micro_batch=micro_batch,
        accumulation=accumulation,
        scales=scales,
    )
