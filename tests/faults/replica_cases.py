"""Run by test_replicas.py in 4 processes: flips bits in engines of many layouts. Not a test module itself.

Prints one JSON object per case on rank 0: the flipped bit, and the result of `compare` on each rank.
"""

import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from headway.data.loader import MicroBatch
from headway.model.attention.rgqa import RgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.config import ModelConfig
from headway.parallel.build import make_engine
from headway.parallel.config import OptimizerConfig, ParallelConfig
from headway.parallel.layout import arrange, init_layout
from headway.parallel.replicas import compare

VOCAB, S = 60, 16
MODEL = ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.1)
ATTENTION = RgqaConfig(
    heads=8, kv_heads=4, head_dim=8, top_k=1, qk_norm=True, balance=BalanceConfig(f_p=0.05, loss_free_rate=1e-3)
)
TP, PP, CP, SP = {"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"tensor": 2, "sequence_parallel": True}
CASES = [
    ({"zero": 1, "precision": "bf16"}, ["matrix@1", "gain@1", "bias@1", "embedding@3"]),
    ({"zero": 1}, ["matrix@1", "bias@2"]),
    ({"zero": 2, "precision": "bf16"}, ["matrix@1"]),
    ({"zero": 2}, ["gain@0"]),
    ({"zero": 3}, ["gain@1", "bias@1"]),
    ({"zero": 3, "precision": "bf16", **TP}, ["bias@1"]),
    ({**TP}, ["gain@1", "matrix@3", "bias@0"]),
    ({**SP, "precision": "bf16"}, ["gain@2"]),
    ({**PP}, ["embedding@3", "gain@1"]),
    ({**PP, "precision": "bf16"}, ["embedding@0"]),
    ({**TP, **PP}, ["gain@1"]),
    ({**CP}, ["matrix@2"]),
]


def tensor_of(engine, what):
    """(name, tensor) of one kind of tensor that this rank holds, or None."""
    if what == "bias":
        return next(iter((n, b.tensor) for n, b in engine.buffers().items()), None)
    for p in engine.logical:
        small = p.dim is None and len(p.whole_shape(1)) == 1
        kinds = {"embedding": p.name == "embedding", "gain": small, "matrix": not small and p.name != "embedding"}
        if kinds[what] and p.parameter.numel():
            return p.name, p.parameter.data
    return None


def flip(tensor, bit):
    words = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).view(-1)
    words[words.numel() // 3] ^= 1 << bit


def train(engine, layout, steps):
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (8, S + 1), generator=g)
    rows = 8 // layout.dp_size
    mine = tokens[layout.dp_rank * rows : (layout.dp_rank + 1) * rows]
    micro = [
        MicroBatch(tokens=mine[i : i + 2, :-1].contiguous(), labels=mine[i : i + 2, 1:].contiguous(), segments=None)
        for i in range(0, rows, 2)
    ]
    for _ in range(steps):
        engine.train_step(micro, targets=8 * S, lr=1e-2)


def main() -> None:
    torch.set_num_threads(1)
    world = init_layout(device="cpu", timeout_s=60)
    for sizes, flips in CASES:
        parallel = ParallelConfig.model_validate(sizes)
        layout = arrange(parallel, local_rank=world.local_rank, device=world.device)
        engine = make_engine(
            MODEL,
            ATTENTION,
            vocab_size=VOCAB,
            seed=3,
            seq_len=S,
            parallel=parallel,
            optimizer=OptimizerConfig(lr=1e-2, clip_norm=0.5),
            layout=layout,
            micro_batch=2,
            accumulation=8 // layout.dp_size // 2,
        )
        false_alarms = [str(compare(engine, layout))]
        for _ in range(3):
            train(engine, layout, 2)
            false_alarms.append(str(compare(engine, layout)))
        found = []
        for bit, case in enumerate(flips):
            what, rank = case.split("@")
            held = tensor_of(engine, what) if layout.rank == int(rank) else None
            if held is not None:
                flip(held[1], bit)
            t0 = time.perf_counter()
            mismatch = compare(engine, layout)
            seconds = time.perf_counter() - t0
            said: dict[str, Any] = {
                "said": None if mismatch is None else [mismatch.name, mismatch.odd, mismatch.replicas]
            }
            if held is not None:
                flip(held[1], bit)
                said["name"] = held[0]
            reports = layout.gather_json(said)
            found.append({"case": case, "seconds": seconds, "ranks": reports, "after": str(compare(engine, layout))})
        if layout.is_main:
            print("CASE", json.dumps({"sizes": sizes, "normal": false_alarms, "found": found}), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
    # Skip the interpreter's teardown: on a loaded machine a thread of gloo has aborted a rank there, after all results.
    sys.stdout.flush()
    os._exit(0)
