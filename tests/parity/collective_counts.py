"""Run by test_collectives.py in 2 processes: counts the collectives of one micro-batch by kind, forward and backward.

Prints one JSON object on rank 0: layout -> mechanism -> [forward, backward]. Not a test module itself.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

KINDS = [
    name
    for name in dir(dist)
    if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "send", "recv", "isend", "irecv", "batch_"))
    and callable(getattr(dist, name))
]
COUNTS: Counter[str] = Counter()
depth: list[str] = []


def counted(name: str) -> Callable[..., Any]:
    real = getattr(dist, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        # Count a collective that calls another one only once.
        COUNTS[name] += not depth
        depth.append(name)
        try:
            return real(*args, **kwargs)
        finally:
            depth.pop()

    return call


def exchanges(name: str, layout: Any, *, sequence_parallel: bool) -> list[dict[str, int]]:
    """Of the mechanism `name` in a decoder placed in `layout`, with the hooks that its gradients get there."""
    ranks = tensor_ranks(layout, sequence_parallel=sequence_parallel)
    placement = Placement(ranks=ranks, sequence=sequence_ranks(layout))
    decoder = Decoder(cases.MODEL, MECHANISMS[name], vocab_size=cases.VOCAB, seed=cases.SEED, placement=placement)
    parameters = [LogicalParameter(n, p, decoder.shards.get(n)) for n, p in decoder.named_parameters()]
    prepare_tensor_parallel(parameters, layout, sequence_parallel=sequence_parallel)
    batch = cases.global_batch(0, packed=True)
    part = slice(
        layout.cp_rank * cases.SEQ_LEN // layout.cp_size, (layout.cp_rank + 1) * cases.SEQ_LEN // layout.cp_size
    )
    COUNTS.clear()
    out = decoder(batch.tokens[:, part], batch.labels[:, part], batch.segments)
    forward = {name: count for name, count in COUNTS.items() if count}
    COUNTS.clear()
    (out.loss_sum + out.aux_loss).backward()
    return [forward, {name: count for name, count in COUNTS.items() if count}]


def main() -> None:
    torch.set_num_threads(1)
    base = init_layout(device="cpu", timeout_s=60)
    quiet_deepspeed(cpu=True).init_distributed(auto_mpi_discovery=False, verbose=False)
    found: dict[str, dict[str, list[dict[str, int]]]] = {}
    for layout_name in ("tp2", "sp2", "cp2"):
        case = cases.Case(mechanism="gqa", layout=layout_name)
        layout = arrange(case.parallel, local_rank=base.local_rank, device=base.device)
        sequence_parallel = case.parallel.sequence_parallel
        found[layout_name] = {
            name: exchanges(name, layout, sequence_parallel=sequence_parallel)
            for name, section in MECHANISMS.items()
            if layout.cp_size == 1 or all(kind.no_context_parallel is None for _, kind in section.mechanisms())
        }
    if base.is_main:
        print("COUNTS", json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Patch before other modules import the functions under their own names.
    for kind in KINDS:
        setattr(dist, kind, counted(kind))
    import parity_cases as cases

    from headway.model.attention.gqa import GqaConfig
    from headway.model.attention.gqe import GqeConfig
    from headway.model.attention.rgqa import RgqaConfig
    from headway.model.balance import BalanceConfig
    from headway.model.decoder import Decoder, Placement
    from headway.parallel.collectives import sequence_ranks, tensor_ranks
    from headway.parallel.deepspeed_options import quiet_deepspeed
    from headway.parallel.layout import arrange, init_layout
    from headway.parallel.logical import LogicalParameter, prepare_tensor_parallel

    grouped: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 8}
    MECHANISMS = cases.MECHANISMS | {
        "gqa": GqaConfig(**grouped),
        "gqa-qk-norm": GqaConfig(**grouped, qk_norm=True),
        "rgqa": RgqaConfig(**grouped, top_k=1, balance=BalanceConfig(f_p=0.1, z=0.1, loss_free_rate=1e-3)),
        "rgqa-no-loss": RgqaConfig(**grouped, top_k=1, balance=BalanceConfig()),
        "gqe-alone": GqeConfig(**grouped, top_k=1, shared_head="none", balance=BalanceConfig()),
        "gqe": GqeConfig(**grouped, top_k=1, shared_head="mean", balance=BalanceConfig()),
    }
    main()
    # Skip the interpreter's teardown: on a loaded machine a thread of gloo has aborted a rank there, after all results.
    sys.stdout.flush()
    os._exit(0)
