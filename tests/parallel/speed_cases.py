"""Run by test_speed_levers.py in 2 processes: the same training with levers of speed, in the layouts it names.

Prints one JSON object per case on rank 0. Not a test module itself.
"""

import json
import os
import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from headway.model.attention.gqa import GqaConfig
from headway.model.config import ModelConfig
from headway.parallel.build import make_engine
from headway.parallel.config import OptimizerConfig, ParallelConfig, SpeedConfig
from headway.parallel.layout import arrange, init_layout

VOCAB, S, MICRO, STEPS = 48, 16, 2, 2
MODEL = ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.1)
ATTENTION = GqaConfig(heads=4, kv_heads=2, head_dim=8)
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero3": {"zero": 3},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "zero2": {"zero": 2},
}
COMPILED = {"zero3": "selective", "tensor": "block", "pipeline": "none", "zero2": "none"}
"""Layout -> what is computed again where pieces are compiled."""


class Micro(NamedTuple):
    tokens: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor | None
    source: torch.Tensor | None = None
    source_segments: torch.Tensor | None = None


def losses(parallel: dict[str, Any], speed: dict[str, Any], layout: Any) -> list[list[float]]:
    """[loss, gradient norm] of each step."""
    accumulation = 2
    engine = make_engine(
        MODEL,
        ATTENTION,
        vocab_size=VOCAB,
        seed=3,
        seq_len=S,
        parallel=ParallelConfig.model_validate(parallel),
        speed=SpeedConfig.model_validate(speed),
        optimizer=OptimizerConfig(lr=1e-2),
        layout=layout,
        micro_batch=MICRO,
        accumulation=accumulation,
    )
    found = []
    for step in range(STEPS):
        g = torch.Generator().manual_seed(10 * step + layout.dp_rank)
        tokens = torch.randint(0, VOCAB, (accumulation, MICRO, S), generator=g)
        micro = [Micro(part, part.roll(-1, 1), None) for part in tokens]
        stats = engine.train_step(micro, targets=tokens.numel() * layout.dp_size, lr=1e-2)
        found.append([stats.loss, stats.grad_norm])
    return found


def main() -> None:
    torch.set_num_threads(1)
    first = init_layout(device="cpu", timeout_s=120)
    # ZeRO-3 comes last: DeepSpeed then leaves torch's linear function replaced by its own.
    for name in sys.argv[1:]:
        parallel = LAYOUTS[name]
        layout = arrange(ParallelConfig.model_validate(parallel), local_rank=first.local_rank, device=first.device)
        result = {
            "plain": losses(parallel, {}, layout),
            "selective": losses({**parallel, "recompute": "selective"}, {}, layout),
        }
        options = {**parallel, "recompute": COMPILED[name]}
        result["compiled"] = losses(options, {"compile": "block" if name == "zero2" else "elementwise"}, layout)
        if name != "tensor":
            result["torch's loss"] = losses(parallel, {"loss": "torch"}, layout)
        if first.is_main:
            print("CASE", json.dumps({"layout": name, **result}), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Skip the interpreter's teardown: on a loaded machine a thread of gloo has aborted a rank there, after all results.
    sys.stdout.flush()
    os._exit(0)
