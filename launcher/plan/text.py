"""Format a plan as text and as JSON."""

from __future__ import annotations

from typing import Any

from headway.launcher.plan.hardware import ASSUMPTIONS, GIB, RESERVED_BYTES, USABLE, Gpu, Network, usable_bytes
from headway.launcher.plan.layouts import Layout, Search
from headway.launcher.plan.measured import measured
from headway.launcher.plan.speed import assumptions_of, bubble, training_s
from headway.launcher.plan.traffic import Flow, flows
from headway.launcher.spec.layouts import warnings
from headway.launcher.spec.spec import Spec
from headway.model.cost import two_stacks

MEMORY_WORDS = {
    "parameters": "parameters",
    "master": "fp32 master weights",
    "moments": "Adam's moments",
    "gradients": "gradients",
    "bucket": "gradient bucket of fixed size",
    "gathered": "gathered parameters of other ranks",
    "activations": "activations",
    "routing": "routers' choices, for recomputation",
    "mask": "document masks",
    "logits": "logits and gradients of the loss",
    "recomputed": "recomputed activations",
    "backward": "gradients inside a block",
    "exchange": "copies while gradients are exchanged",
}
SHOWN = 5
ON_CPU = (
    "launch.device is cpu: speeds are estimated for GPUs only. `headway bench step SPEC` measures this machine; "
    "launch.device=cuda behind the spec plans it for a GPU (--gpu)."
)


def cost_lines(spec: Spec, cost: dict[str, Any]) -> list[str]:
    """Lines about the cost of the model, which does not depend on the layout."""
    tokens = cost["training_tokens"]
    return _table(
        [
            ("attention", spec.attention.type),
            ("parameters", f"{cost['num_params']:,}"),
            *((f"  {part}", f"{n:,}") for part, n in cost["params_by_part"].items()),
            ("forward FLOPs/token, useful", f"{cost['flops_per_token_useful']:,.0f} at {spec.data.seq_len} tokens"),
            *((f"  {part}", f"{n:,.0f}") for part, n in _flops_by_part(spec, cost).items()),
            ("forward FLOPs/token, executed", f"{cost['flops_per_token_executed']:,.0f}"),
            (
                "KV cache bytes/token",
                f"{cost['kv_bytes_per_token']:,.0f} at {spec.data.seq_len} tokens ({spec.parallel.precision})",
            ),
            ("training tokens", f"{tokens:,} in {spec.steps:,} steps"),
            *_own_part(spec),
            *((f"  from token {at:,} on", f"{flops:,.0f} a token") for at, flops in cost["flops_per_token_stages"]),
            ("training FLOPs, useful", f"{cost['training_flops_useful']:.3e}"),
        ]
    )


def layout_lines(layout: Layout, gpu: Gpu, network: Network) -> list[str]:
    """Lines about memory, communication and speed of one layout, with the assumptions."""
    grid, memory = layout.grid, layout.memory
    stage = grid.stages[layout.stage]
    held = " ".join(f"{part} {n:,}" for part, n in stage.parameters.items() if n)
    parts = [
        (f"  {MEMORY_WORDS[part]}", in_gib(n)) for part, n in memory.by_part().items() if part in MEMORY_WORDS and n
    ]
    sent = _busiest(layout)
    rows = [
        ("layout", describe(layout)),
        ("parameters of a rank", f"{stage.num_params:,}  ({held})" + _which(layout)),
        ("memory of a rank", f"peak {in_gib(memory.peak)}{_which(layout)}; the parts do not all exist at once"),
        *parts,
        *([] if on_cpu(layout.spec) else [(f"  on {gpu.name}", _fit(layout, gpu))]),
        ("communication", f"bytes that a rank sends per step{'' if sent else ': none'}"),
        *(
            (f"  {flow.kind}", f"{_bytes(flow.bytes_per_step)} in {flow.exchanges_per_step:,.0f} exchange(s)")
            for flow in sent
        ),
        ("pipeline bubble", f"{bubble(grid):.1%} of a step"),
        ("training FLOPs/token, useful", f"{layout.useful_flops_per_token:,.0f}"),
        *_speed_rows(layout, gpu, network),
    ]
    assumed = [ON_CPU] if on_cpu(layout.spec) else assumption_lines(gpu, network, layout.spec)
    return [*_table(rows), "", *assumed, *(f"warning: {text}" for text in _warnings(layout, gpu))]


def on_cpu(spec: Spec) -> bool:
    """Whether the spec asks for CPUs, for which there is no estimate of speed."""
    return spec.launch.device == "cpu"


def _speed_rows(layout: Layout, gpu: Gpu, network: Network) -> list[tuple[str, str]]:
    if on_cpu(layout.spec):
        return [("tokens/s, estimated", "none on a CPU")]
    speed = layout.speed
    low, high = speed.tokens_per_s
    seconds = training_s(layout.grid, gpu, network)
    times = " ".join(
        f"{name.removesuffix('_s')} {share:.0%}" for name, share in _shares(layout).items() if share >= 0.005
    )
    return [
        (
            "tokens/s, estimated",
            f"{rounded(low)} to {rounded(high)} on {layout.spec.launch.world_size} {gpu.name}, {network.name}",
        ),
        ("  MFU, causal", f"{speed.mfu[0]:.0%} to {speed.mfu[1]:.0%} of the datasheet's FLOP/s"),
        ("  share of step time (low estimate)", times),
        (
            "  whole training" if layout.spec.init.run is None else "  training of the branch",
            f"{_between(*seconds)}, without start-up, validation and saves",
        ),
    ]


def _between(low_s: float, high_s: float) -> str:
    """`2.1 to 4.6 days`, in the largest unit of which the upper value is at least 1."""
    for unit, size in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if high_s >= size:
            return f"{low_s / size:,.3g} to {high_s / size:,.3g} {unit}"
    return f"{low_s:,.3g} to {high_s:,.3g} seconds"


def assumption_lines(gpu: Gpu, network: Network, spec: Spec | None = None) -> list[str]:
    """Lines about the assumptions. For a measured GPU, the shares are those of the spec's shape."""
    entry = measured().get(gpu.name)
    low, high = ASSUMPTIONS if spec is None else assumptions_of(spec, gpu)
    basis = "from datasheets, not measured. Assumed" if entry is None else f"from {entry.source}. Used"
    if entry is not None and spec is None:
        basis = f"from {entry.source}, for each model's shape. Used for what is not measured"
    return [
        f"Speeds are estimates {basis}, low to high: matrix products at {low.matmul:.0%} to {high.matmul:.0%}",
        f"of the datasheet's rate, attention core {low.core:.0%} to {high.core:.0%} (within documents "
        f"{low.document_core:.0%} to {high.document_core:.0%}), memory {low.memory:.0%} to {high.memory:.0%}, links "
        "and network",
        f"{low.exchange:.0%} to {high.exchange:.0%}; of the exchanges that overlap with the passes (parallel.overlap), "
        f"{low.hidden:.0%} to {high.hidden:.0%} are",
        "hidden (assumed), and of all others nothing. Of the GPU's memory, "
        f"{in_gib(RESERVED_BYTES)} are reserved and {USABLE:.0%} of the rest can be used.",
        f"{gpu.name}: {gpu.source}. {network.name}: {network.source}.",
    ]


def search_lines(found: Search, gpus: int, gpu: Gpu) -> list[str]:
    """Lines about the best layouts with their overrides, and about layouts that do not fit or are not legal."""
    lines = [f"layouts for {gpus} {gpu.name}, fastest first by the same estimate:"]
    if not found.best and not found.too_big:
        lines = [
            f"no layout on {gpus} {gpu.name} is legal; use fewer GPUs, or change the keys below, such as a larger "
            "train.global_batch"
        ]
    elif not found.best:
        lines = [
            f"no layout for {gpus} {gpu.name} fits; use more GPUs, GPUs with more memory, or a shorter data.seq_len"
        ]
    for number, layout in enumerate(found.best[:SHOWN], 1):
        low, high = layout.speed.tokens_per_s
        lines += [
            f"{number:>2}. {rounded(low)} to {rounded(high)} tokens/s, peak {in_gib(layout.memory.peak)}, "
            f"bubble {bubble(layout.grid):.1%}: {describe(layout)}",
            f"    {' '.join(layout.overrides)}",
        ]
    for layout in found.too_big[:SHOWN]:
        lines.append(f"does not fit: {describe(layout)}: {_fit(layout, gpu)}")
    if len(found.too_big) > SHOWN:
        lines.append(f"              and {len(found.too_big) - SHOWN} more")
    for key, count in found.illegal.most_common():
        lines.append(f"not legal: {count} layout(s) because of {key}")
    return lines


def layout_figures(layout: Layout, gpu: Gpu, network: Network) -> dict[str, Any]:
    """One layout as a mapping for JSON, in bytes, seconds and tokens. What needs a GPU is None for a spec on CPUs."""
    grid, cpu = layout.grid, on_cpu(layout.spec)
    return {
        "layout": {
            **layout.spec.parallel.model_dump(),
            "hosts": layout.spec.launch.hosts,
            "processes": layout.spec.launch.processes,
            "data": grid.data_parallel,
            "micro_batch": layout.spec.train.micro_batch,
            "accumulation": grid.accumulation,
        },
        "overrides": layout.overrides,
        "gpu": None if cpu else gpu.name,
        "network": None if cpu else network.name,
        "params_per_rank": layout.grid.stages[layout.stage].parameters,
        "fullest_stage": layout.stage,
        "memory_bytes": {**layout.memory.by_part(), "peak": layout.memory.peak},
        "usable_bytes": None if cpu else usable_bytes(gpu),
        "fits": None if cpu else layout.fits(gpu),
        "sent_bytes_per_step": {flow.kind: flow.bytes_per_step for flow in _busiest(layout)},
        "pipeline_bubble": bubble(grid),
        "training_flops_per_token_useful": layout.useful_flops_per_token,
        "tokens_per_s_estimated": None if cpu else list(layout.speed.tokens_per_s),
        "mfu_causal_estimated": None if cpu else list(layout.speed.mfu),
        "step_seconds_estimated": None if cpu else [vars(times) for times in layout.speed.times],
        "warnings": [*_warnings(layout, gpu), *([ON_CPU] if cpu else [])],
    }


def search_figures(found: Search, gpu: Gpu, network: Network) -> dict[str, Any]:
    return {
        "best": [layout_figures(layout, gpu, network) for layout in found.best[:SHOWN]],
        "too_big": [layout_figures(layout, gpu, network) for layout in found.too_big[:SHOWN]],
        "illegal": dict(found.illegal),
    }


def describe(layout: Layout) -> str:
    """`tensor 2, data 4, ZeRO-1, 2 x 8 sequences`: the sizes above 1, and the micro-batches."""
    parallel, grid = layout.spec.parallel, layout.grid
    sizes = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "data": grid.data_parallel,
    }
    words = [f"{name} {n}" for name, n in sizes.items() if n > 1] or ["one process"]
    words += ["sequence parallel"] * parallel.sequence_parallel + [f"ZeRO-{parallel.zero}"] * (not grid.single)
    words += [parallel.precision]
    words += [f"recompute {parallel.recompute}"] * (parallel.recompute != "none")
    return ", ".join([*words, f"{grid.accumulation} x {layout.spec.train.micro_batch} sequences a step and data rank"])


def in_gib(nbytes: float) -> str:
    """`1.5 GiB`, or MiB for small models."""
    if nbytes < GIB / 10:
        return f"{nbytes / (1 << 20):.1f} MiB"
    return f"{nbytes / GIB:.1f} GiB"


def rounded(number: float) -> str:
    """Round to three digits; the estimates are not more precise."""
    return f"{float(f'{number:.3g}'):,.0f}"


def _own_part(spec: Spec) -> list[tuple[str, str]]:
    if spec.init.run is None:
        return []
    steps = spec.steps - spec.init.start_step
    return [("  of the branch itself", f"{steps * spec.tokens_per_step:,} in {steps:,} steps, after {spec.init.run}")]


def _busiest(layout: Layout) -> list[Flow]:
    """The flows of the stage whose ranks send most."""
    each = [flows(layout.grid, stage) for stage in layout.grid.stages]
    return max(each, key=lambda sent: sum(flow.bytes_per_step for flow in sent))


def _which(layout: Layout) -> str:
    stages = len(layout.grid.stages)
    return f" (stage {layout.stage + 1} of {stages}, which needs most)" if stages > 1 else ""


def _fit(layout: Layout, gpu: Gpu) -> str:
    peak, usable = layout.memory.peak, usable_bytes(gpu)
    if peak <= usable:
        return f"fits: {in_gib(peak)} of {in_gib(usable)} usable memory"
    return f"DOES NOT FIT: {in_gib(peak)} of {in_gib(usable)} usable memory, {in_gib(peak - usable)} too much"


def _warnings(layout: Layout, gpu: Gpu) -> list[str]:
    found = warnings(layout.spec)
    if not on_cpu(layout.spec) and not layout.fits(gpu):
        found.append(f"{_fit(layout, gpu)}; headway plan SPEC --gpus N searches for a layout that fits")
    return found


def _shares(layout: Layout) -> dict[str, float]:
    low = layout.speed.times[0]
    return {name: seconds / low.step_s for name, seconds in vars(low).items()}


def _flops_by_part(spec: Spec, cost: dict[str, Any]) -> dict[str, float]:
    """Useful FLOPs per token by part of the model."""
    assert spec.model.vocab_size is not None
    core = cost["flops_per_token_attention_core"]
    if (source := spec.data.encoder_tokens) is not None:
        length, lengths = spec.data.seq_len, (source, spec.data.seq_len - source)
        one = spec.attention.layer(0, spec.model.layers)
        both = two_stacks(spec.model, one, lengths, vocab_size=spec.model.vocab_size)
        mlp, head = both.mlp / length, both.head / length
    else:
        mlp = float(spec.model.layers * spec.model.mlp_flops)
        head = 2.0 * spec.model.vocab_size * spec.model.width
    projections = cost["flops_per_token_useful"] - core - mlp - head
    return {"attention projections, routers": projections, "attention core": core, "mlp": mlp, "head": head}


def _bytes(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n / 1e3:,.2f} kB"


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{name:<42} {value}" for name, value in rows]
