"""Run by test_gradients.py: writes the gradient that AdamW receives in one step of a bf16 run, for several engines.

With beta1 = 0, AdamW's first moment after a step is the gradient of that step. Every micro-batch is one sequence, so
each layout sums the same bf16 gradients, and only the summation differs. Not a test module itself.
"""

import os
import sys
from pathlib import Path

import torch
from engine_cases import GLOBAL, VOCAB, Micro, global_batch
from whole_tensors import whole_tensors

from headway.model.attention.rgqa import RgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.config import ModelConfig
from headway.model.decoder import Decoder
from headway.parallel.build import make_engine
from headway.parallel.config import OptimizerConfig, ParallelConfig, SpeedConfig
from headway.parallel.engine import Engine
from headway.parallel.layout import Layout, init_layout

OPTIMIZER = OptimizerConfig(lr=1e-6, betas=(0.0, 0.5), clip_norm=1e6)  # the first moment is the gradient, unclipped
MODEL = ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.1)
ATTENTION = RgqaConfig(type="rgqa", heads=4, kv_heads=2, head_dim=8, top_k=1, balance=BalanceConfig(f_p=0.05))
PREFIX = "exp_avg/"


def engine(parallel: ParallelConfig, layout: Layout) -> Engine:
    return make_engine(
        MODEL,
        ATTENTION,
        vocab_size=VOCAB,
        seed=3,
        seq_len=24,
        parallel=parallel,
        speed=SpeedConfig(),
        optimizer=OPTIMIZER,
        layout=layout,
        micro_batch=1,
        accumulation=GLOBAL // layout.dp_size,
    )


def gradient(e: Engine, layout: Layout) -> dict[str, torch.Tensor]:
    batch = global_batch(0)
    mine = range(layout.dp_rank * GLOBAL // layout.dp_size, (layout.dp_rank + 1) * GLOBAL // layout.dp_size)
    e.train_step([row(batch, i) for i in mine], targets=int((batch.labels != -100).sum()), lr=1e-6)
    return {key.removeprefix(PREFIX): t.clone() for key, t in whole_tensors(e) if key.startswith(PREFIX)}


def row(batch: Micro, i: int) -> Micro:
    assert batch.segments is not None
    return Micro(batch.tokens[i : i + 1], batch.labels[i : i + 1], batch.segments[i : i + 1])


def exact_sum(*, apart: bool) -> dict[str, torch.Tensor]:
    """The same gradient by plain PyTorch: bf16 gradients of single sequences, summed in fp64.

    `apart`: the embedding's gradients as input and as output matrix are rounded to bf16 apart and then summed.
    """
    model = Decoder(MODEL.model_copy(update={"tied_embeddings": not apart}), ATTENTION, vocab_size=VOCAB, seed=3)
    if apart:
        head, embedding = model.get_parameter("head"), model.get_parameter("embedding")
        head.data.copy_(embedding.data)
    model.bfloat16()
    batch = global_batch(0)
    targets = int((batch.labels != -100).sum())
    total: dict[str, torch.Tensor] = {}
    for i in range(GLOBAL):
        model.zero_grad()
        out = model(*row(batch, i)[:3])
        (out.loss_sum * (GLOBAL / targets) + out.aux_loss).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            name = "embedding" if name == "head" else name
            total[name] = total.get(name, torch.zeros_like(p, dtype=torch.float64)) + p.grad.double()
    return {name: t / GLOBAL for name, t in total.items()}


def main() -> None:
    """Arguments: folder for the results, pipeline stages, gradient reduction, then ZeRO stages such as `1 2 3`."""
    folder, stages, reduction = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    common = {"precision": "bf16", "pipeline": stages, "gradient_reduction": reduction}
    layout = init_layout(device="cpu", timeout_s=120, parallel=ParallelConfig.model_validate(common))
    for stage in map(int, sys.argv[4:]):
        found = gradient(engine(ParallelConfig.model_validate({**common, "zero": stage}), layout), layout)
        if layout.dp_rank == 0:
            torch.save(found, folder / f"{stage}.{layout.pp_rank}.pt")
    layout.barrier()


if __name__ == "__main__":
    main()
    # Skip the interpreter's teardown: on a loaded machine a thread of gloo has aborted a rank there, after all results.
    sys.stdout.flush()
    os._exit(0)
