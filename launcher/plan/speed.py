"""Expected tokens per second: an estimate from datasheets and assumptions (`hardware`), or from measurements of a GPU
(`measured`).

A stage's time per micro-batch is the sum of matrix products and attention core at their shares of the matrix rate,
element-wise work by the bytes it moves, and exchanges within layers, without overlap. A step has m micro-batches, the
pipeline bubble, the exchange of gradients (under `parallel.overlap` without its hidden share), and the optimizer.
Legend: P stages, m micro-batches per step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from headway.launcher.plan.hardware import Assumptions, Gpu, Network
from headway.launcher.plan.measured import assumptions
from headway.launcher.plan.stages import Grid, Stage
from headway.launcher.plan.traffic import Flow, flows
from headway.model.cost import block_flops, relative_core_flops

if TYPE_CHECKING:
    from headway.launcher.spec.spec import Spec
    from headway.model.base import AttentionConfig

OPTIMIZER_BYTES = 38.0
"""Memory traffic of AdamW in bf16 per parameter of a rank's partition, in bytes.

It reads gradient, moments and master weight, and writes moments, master weight and parameter.
"""

CORE_BACKWARD = 2.5
"""Time of the attention core's backward over its forward pass: flash attention recomputes the scores (Dao, 2023, arXiv
2307.08691).
"""

NO_OVERLAP = ("data:", "pipeline: gradient of the tied")
"""Prefixes of the kinds of exchange that take place after or between the passes, not within a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one optimizer step on the slowest stage. `step_s` is their sum."""

    matmul_s: float
    core_s: float
    elementwise_s: float
    launch_s: float  # additional time because kernels cannot be launched faster
    exchange_s: float  # within layers and between stages
    bubble_s: float
    gradients_s: float  # gradients and parameters between data ranks, without what is hidden behind the passes
    optimizer_s: float

    @property
    def step_s(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class Speed:
    """An estimate as a range: with all assumptions low, and with all assumptions high."""

    tokens_per_s: tuple[float, float]
    mfu: tuple[float, float]  # useful training FLOP/s, causal, over the datasheet's FLOP/s of all GPUs
    times: tuple[Times, Times]

    @property
    def middle(self) -> float:
        """Geometric mean of the range."""
        low, high = self.tokens_per_s
        return (low * high) ** 0.5


def bubble(grid: Grid) -> float:
    """Share of a step in which a stage is idle: (P-1)/(m+P-1) (Narayanan et al., 2021, arXiv 2104.04473)."""
    stages = grid.spec.parallel.pipeline
    return (stages - 1) / (grid.accumulation + stages - 1)


def speed(grid: Grid, gpu: Gpu, network: Network, *, useful_flops_per_token: float) -> Speed:
    """Estimate speed and MFU. `useful_flops_per_token`: forward and backward FLOPs of the whole model."""
    spec = grid.spec
    low, high = (_times(grid, gpu, network, assumed) for assumed in assumptions_of(spec, gpu))
    rates = (spec.tokens_per_step / low.step_s, spec.tokens_per_step / high.step_s)
    peak = matrix_rate(grid, gpu) * spec.launch.world_size
    slow, fast = (rate * useful_flops_per_token / peak for rate in rates)
    return Speed(tokens_per_s=rates, mfu=(slow, fast), times=(low, high))


def training_s(grid: Grid, gpu: Gpu, network: Network) -> tuple[float, float]:
    """Seconds of a run's steps, with all assumptions high and with all low; of a branch, without those of its parent.

    Each stage of a `k_schedule` has its own speed.
    """
    spec, seconds = grid.spec, [0.0, 0.0]
    first, end = spec.init.start_step * spec.tokens_per_step, spec.steps * spec.tokens_per_step
    blocks = [block for stage in grid.stages for block in stage.blocks]
    begins = sorted({begin for block in blocks for begin, _ in block.stages()})
    for begin, until in pairwise([*begins, end]):
        if (tokens := min(until, end) - max(begin, first)) > 0:
            low, high = speed(_trained_from(grid, begin), gpu, network, useful_flops_per_token=0.0).tokens_per_s
            seconds = [seconds[0] + tokens / high, seconds[1] + tokens / low]
    return seconds[0], seconds[1]


def _trained_from(grid: Grid, tokens: int) -> Grid:
    """The grid with the blocks of the stage of training that has begun after `tokens` tokens."""

    def at(block: AttentionConfig) -> AttentionConfig:
        return [config for begin, config in block.stages() if begin <= tokens][-1]

    stages = tuple(replace(stage, blocks=tuple(map(at, stage.blocks))) for stage in grid.stages)
    return replace(grid, stages=stages)


def assumptions_of(spec: Spec, gpu: Gpu) -> tuple[Assumptions, Assumptions]:
    """Low and high assumptions for the spec's shape."""
    head_dim = min(mechanism.core_channels for _, mechanism in spec.attention.mechanisms())
    return assumptions(gpu, width=spec.model.width, head_dim=head_dim, seq_len=spec.data.seq_len)


def matrix_rate(grid: Grid, gpu: Gpu) -> float:
    """FLOP/s of matrix products in the run's precision, from the datasheet."""
    return gpu.bf16_flops if grid.spec.parallel.precision == "bf16" else gpu.fp32_flops


def _times(grid: Grid, gpu: Gpu, network: Network, assumed: Assumptions) -> Times:
    """Times of a step: passes on the stage with the slowest micro-batch, gradients and optimizer each on their slowest
    stage.
    """
    each = [_micro_batch(grid, stage, gpu, network, assumed) for stage in grid.stages]
    slowest = max(each, key=sum)
    matmul, core, elementwise, launch, exchange = slowest
    m = grid.accumulation
    return Times(
        matmul_s=m * matmul,
        core_s=m * core,
        elementwise_s=m * elementwise,
        launch_s=m * launch,
        exchange_s=m * exchange,
        bubble_s=(grid.spec.parallel.pipeline - 1) * sum(slowest),
        gradients_s=max(
            _exposed(grid, stage, gpu, network, assumed, passes_s=m * (matmul + core + elementwise))
            for stage in grid.stages
        ),
        optimizer_s=max(
            OPTIMIZER_BYTES * stage.num_params / grid.data_ranks / (gpu.memory_bytes_per_s * assumed.memory)
            for stage in grid.stages
        ),
    )


def _micro_batch(
    grid: Grid, stage: Stage, gpu: Gpu, network: Network, assumed: Assumptions
) -> tuple[float, float, float, float, float]:
    """Seconds of a forward and backward pass: matrix products, attention core, element-wise work, additional time for
    kernel launches, exchanges.
    """
    spec, model = grid.spec, grid.spec.model
    parallel, rate = spec.parallel, matrix_rate(grid, gpu)
    again = 1 if parallel.recompute == "block" else 0
    # What every tensor-parallel rank computes in full is not shared: 2 FLOPs per token and parameter.
    products = (3 + again) * 2.0 * stage.replicated * (parallel.tensor - 1)
    cores = kept = 0.0
    for block in stage.blocks:
        core = block.core_flops_per_token(seq_len=spec.data.seq_len)
        core += relative_core_flops(model, block, seq_len=spec.data.seq_len)
        whole = block_flops(model, block, seq_len=spec.data.seq_len).executed
        products += (3 + again) * (whole - core)
        cores += (1 + again + CORE_BACKWARD) * core
        kept += grid.footprint(block).kept(grid.tokens) * (1 + again / 3) + grid.dropped(block) * (1 + 1 / 3)
    if stage.last:
        products += 3 * 2 * grid.vocab_size * model.width
        kept += 12.0 * grid.tokens * grid.vocab_rows  # the logits
    core_rate = assumed.document_core if spec.data.document_mask else assumed.core
    matmul_s = products * grid.tokens / parallel.tensor / (rate * assumed.matmul)
    core_s = cores * grid.tokens / parallel.tensor / (rate * core_rate)
    elementwise_s = kept * assumed.passes_over_kept / (gpu.memory_bytes_per_s * assumed.memory)
    launch_s = max(0.0, assumed.launch_s * len(stage.blocks) * (1 + again / 3) - matmul_s - core_s - elementwise_s)
    within = [flow for flow in flows(grid, stage) if not _is_late(flow)]
    exchange_s = sum(_seconds(grid, flow, gpu, network, assumed) for flow in within) / grid.accumulation
    return matmul_s, core_s, elementwise_s, launch_s, exchange_s


def _exposed(grid: Grid, stage: Stage, gpu: Gpu, network: Network, assumed: Assumptions, *, passes_s: float) -> float:
    """Seconds of the exchanges between data ranks that are not hidden. They cannot be hidden longer than `passes_s`."""
    total = overlapping = 0.0
    for flow in filter(_is_late, flows(grid, stage)):
        seconds = _seconds(grid, flow, gpu, network, assumed)
        total += seconds
        # ZeRO-1 and 2 gather the new parameters after the update, when no pass runs.
        if flow.kind == "data: gradients" or (flow.kind == "data: parameters" and grid.spec.parallel.zero == 3):
            overlapping += seconds
    return total - min(assumed.hidden * overlapping, passes_s) * grid.overlaps


def _is_late(flow: Flow) -> bool:
    return flow.kind.startswith(NO_OVERLAP)


def _seconds(grid: Grid, flow: Flow, gpu: Gpu, network: Network, assumed: Assumptions) -> float:
    """Seconds of a step's exchanges of one kind. A group across hosts uses its members' network adapters."""
    on_host = max(1, min(flow.ranks, grid.spec.launch.processes // flow.every))
    rate = gpu.link_bytes_per_s
    if on_host < flow.ranks:
        rate = min(rate, on_host * network.bytes_per_s)
    return flow.bytes_per_step / (rate * assumed.exchange) + flow.exchanges_per_step * assumed.latency_s
