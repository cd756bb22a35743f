"""Run by test_engine.py in 1 and 2 processes: trains a tiny decoder under every ZeRO stage and precision.

With 1 process, the engine for one process also continues the checkpoints that 2 ranks saved.

Prints one JSON object per case on rank 0. Not a test module itself.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from headway.model.attention.rgqa import RgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.parallel import checkpoint
from headway.parallel.config import OptimizerConfig, ParallelConfig
from headway.parallel.engine import Engine
from headway.parallel.layout import Layout, init_layout
from headway.parallel.single_engine import SingleEngine
from headway.parallel.zero_engine import ZeroEngine

VOCAB, S, GLOBAL, STEPS = 61, 24, 8, 5


class Micro(NamedTuple):
    tokens: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor | None
    source: torch.Tensor | None = None
    source_segments: torch.Tensor | None = None


def global_batch(step: int) -> Micro:
    g = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCAB, (GLOBAL, S + 1), generator=g)
    labels = tokens[:, 1:].clone()
    labels[0, 3:] = -100  # very different numbers of targets per sequence: averaging by micro batch would show
    labels[5, :9] = -100
    segments = (torch.arange(S) >= 11).int().expand(GLOBAL, S).contiguous()
    return Micro(tokens[:, :-1].contiguous(), labels, segments)


def decoder() -> Decoder:
    model = ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.1)
    attention = RgqaConfig(type="rgqa", heads=4, kv_heads=2, head_dim=8, top_k=1, balance=BalanceConfig(f_p=0.05))
    return Decoder(model, attention, vocab_size=VOCAB, seed=3)


def engine(zero: int, precision: str, layout: Layout, accumulation: int) -> Engine:
    micro = GLOBAL // layout.dp_size // accumulation
    return ZeroEngine(
        decoder(),
        parallel=ParallelConfig.model_validate({"zero": zero, "precision": precision}),
        optimizer=OptimizerConfig(lr=1e-2, clip_norm=0.5),
        layout=layout,
        micro_batch=micro,
        accumulation=accumulation,
    )


def run(e: Engine, layout: Layout, accumulation: int, first: int, last: int) -> list[tuple[float, float, float]]:
    out = []
    for step in range(first, last):
        b = global_batch(step)
        per_rank, micro = GLOBAL // layout.dp_size, GLOBAL // layout.dp_size // accumulation
        parts = []
        for a in range(accumulation):
            lo = layout.dp_rank * per_rank + a * micro
            rows = slice(lo, lo + micro)
            parts.append(Micro(b.tokens[rows], b.labels[rows], None if b.segments is None else b.segments[rows]))
        stats = e.train_step(parts, targets=int((b.labels != -100).sum()), lr=1e-2 * (step + 1) / STEPS)
        out.append((stats.loss, stats.aux_loss, stats.grad_norm))
    return out


def single_from(root: Path, layout: Layout) -> dict[str, list[tuple[float, float, float]]]:
    """Losses of the engine for one process that continues the checkpoints of 2 ranks, by the name of the checkpoint."""
    found = {}
    for source in sorted(path for path in root.iterdir() if path.name.endswith("dp2")):
        precision = source.name.split("-")[0]
        e = SingleEngine(
            decoder(),
            parallel=ParallelConfig.model_validate({"precision": precision}),
            optimizer=OptimizerConfig(lr=1e-2, clip_norm=0.5),
            layout=layout,
            accumulation=2,
        )
        saved = checkpoint.newest_valid(source, layout, warn=print)
        assert saved is not None
        checkpoint.load(saved, e, layout)
        found[source.name] = run(e, layout, 2, 3, STEPS)
    return found


def main() -> None:
    layout = init_layout(device="cpu", timeout_s=60)
    root = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    torch.set_num_threads(1)
    for precision in ("fp32", "bf16"):
        for zero in (1, 2, 3):
            accumulation = 2
            e = engine(zero, precision, layout, accumulation)
            losses = run(e, layout, accumulation, 0, 3)
            where = root / f"{precision}-z{zero}-dp{layout.dp_size}"
            error = checkpoint.save(
                where, e, layout, step=3, state={"applied_steps": e.applied_steps, "step": 3}, keep=2
            )
            losses += run(e, layout, accumulation, 3, STEPS)
            fresh = engine(zero, precision, layout, accumulation)
            found = checkpoint.newest_valid(where, layout, warn=print)
            assert found is not None, error
            checkpoint.load(found, fresh, layout)
            resumed = run(fresh, layout, accumulation, 3, STEPS)
            if layout.is_main:
                result = {"zero": zero, "precision": precision, "dp": layout.dp_size, "losses": losses}
                print("CASE", json.dumps(result | {"resumed": resumed, "save_error": error}), flush=True)
            dist.barrier()
    # A checkpoint of ZeRO-1 read by ZeRO-3 (and, under 1 process, one that 2 processes wrote).
    source = sorted(p for p in root.iterdir() if p.name.startswith("fp32-z1"))[-1]
    other = engine(3, "fp32", layout, 2)
    found = checkpoint.newest_valid(source, layout, warn=print)
    assert found is not None
    checkpoint.load(found, other, layout)
    crossed = run(other, layout, 2, 3, STEPS)
    if layout.is_main:
        print("CROSS", json.dumps({"from": source.name, "dp": layout.dp_size, "losses": crossed}), flush=True)
    if layout.world_size == 1:
        print("SINGLE", json.dumps(single_from(root, layout)), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Skip the interpreter's teardown: on a loaded machine a thread of gloo has aborted a rank there, after all results.
    sys.stdout.flush()
    os._exit(0)
