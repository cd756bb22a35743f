"""Run by test_overlap.py: one training with exchanges that overlap and one without, for every case. Not a test module.

With beta1 = 0, AdamW's first moment after a step is the gradient of that step, after clipping.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import GLOBAL, Micro, S, global_batch
from whole_tensors import whole_tensors

from headway.model.attention.rgqa import RgqaConfig
from headway.model.balance import BalanceConfig
from headway.model.config import ModelConfig
from headway.parallel import deepspeed_options
from headway.parallel.build import make_engine
from headway.parallel.config import OptimizerConfig, ParallelConfig
from headway.parallel.engine import Engine
from headway.parallel.layout import Layout, arrange, init_layout

deepspeed = deepspeed_options.quiet_deepspeed(cpu=True)

STEPS = 3
MODEL = ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.1)
ATTENTION = RgqaConfig(type="rgqa", heads=4, kv_heads=2, head_dim=8, top_k=1, balance=BalanceConfig(f_p=0.05))
OPTIMIZER = OptimizerConfig(lr=3e-3, betas=(0.0, 0.9), clip_norm=0.5)


def engine(parallel: ParallelConfig, layout: Layout, accumulation: int) -> Engine:
    return make_engine(
        MODEL,
        ATTENTION,
        vocab_size=60,
        seed=3,
        seq_len=S,
        parallel=parallel,
        optimizer=OPTIMIZER,
        layout=layout,
        micro_batch=GLOBAL // layout.dp_size // accumulation,
        accumulation=accumulation,
    )


@contextlib.contextmanager
def early_exchanges(e: Engine) -> Iterator[list[int]]:
    """Counts the collectives between the first and the last gradient of each backward pass."""
    counts, calls, first = [0], [0], [-1]
    # ZeRO-1 and 2 call torch's function, ZeRO-3 DeepSpeed's.
    places: list[tuple[Any, str]] = [(dist, "all_reduce"), (deepspeed.comm, "reduce_scatter_fn")]
    originals = [getattr(owner, name) for owner, name in places]

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return original(*args, **kwargs)

        return call

    named = {p.name: p.parameter for p in e.logical}
    norm, embedding = named["norm.gain"], named["embedding"]

    def begin(_: torch.Tensor) -> None:
        first[0] = calls[0]

    def end(_: torch.Tensor) -> None:
        counts[0] += calls[0] - first[0]

    hooks = [norm.register_hook(begin), embedding.register_hook(end)]
    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, counted(original))
    try:
        yield counts
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
        for hook in hooks:
            hook.remove()


def train(parallel: ParallelConfig, layout: Layout, accumulation: int) -> dict[str, Any]:
    e = engine(parallel, layout, accumulation)
    losses, gradients = [], []
    per_rank = GLOBAL // layout.dp_size
    size = per_rank // accumulation
    with early_exchanges(e) as early:
        for step in range(STEPS):
            b = global_batch(step)
            tokens, labels = b.tokens % 60, torch.where(b.labels < 0, b.labels, b.labels % 60)
            rows = [
                range(layout.dp_rank * per_rank + a * size, layout.dp_rank * per_rank + (a + 1) * size)
                for a in range(accumulation)
            ]
            assert b.segments is not None
            parts = [Micro(tokens[list(r)], labels[list(r)], b.segments[list(r)]) for r in rows]
            stats = e.train_step(parts, targets=int((labels != -100).sum()), lr=OPTIMIZER.lr)
            losses.append(stats.loss)
            tensors = dict(whole_tensors(e))
            gradients.append({k: t.clone() for k, t in tensors.items() if k.startswith("exp_avg/")})
    parameters = {k: t.clone() for k, t in whole_tensors(e) if k.startswith("param/")}
    return {"losses": losses, "gradients": gradients, "parameters": parameters, "early": early[0]}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).norm() / other[k].norm().clamp_min(1e-30)) for k in one)


def legal(zero: int, precision: str) -> bool:
    return not (zero == 1 and precision == "bf16")


def main() -> None:
    """Argument: tensor-parallel ranks."""
    torch.set_num_threads(1)
    deepspeed_options.OVERLAP_BUCKET = 1  # a bucket then holds the largest parameter, and a step has several buckets
    sizes = {"tensor": int(sys.argv[1])}
    base = init_layout(device="cpu", timeout_s=120)
    layout = arrange(ParallelConfig.model_validate(sizes), local_rank=base.local_rank, device=base.device)
    for zero, precision, accumulation in itertools.product((1, 2, 3), ("fp32", "bf16"), (1, 2)):
        if not legal(zero, precision):
            continue
        common = {**sizes, "zero": zero, "precision": precision}
        off = train(ParallelConfig.model_validate({**common, "overlap": False}), layout, accumulation)
        on = train(ParallelConfig.model_validate({**common, "overlap": True}), layout, accumulation)
        found = {
            "zero": zero,
            "precision": precision,
            "accumulation": accumulation,
            "loss": max(abs(a - b) / abs(b) for a, b in zip(on["losses"], off["losses"], strict=True)),
            "gradient": max(difference(a, b) for a, b in zip(on["gradients"], off["gradients"], strict=True)),
            "parameters": difference(on["parameters"], off["parameters"]),
            "early": [off["early"], on["early"]],
            "learned": off["losses"][-1] < off["losses"][0],
        }
        if layout.is_main:
            print("CASE", json.dumps(found), flush=True)
    layout.barrier()


if __name__ == "__main__":
    main()
    # Skip the interpreter's teardown: on a loaded machine a thread of gloo has aborted a rank there, after all results.
    sys.stdout.flush()
    os._exit(0)
