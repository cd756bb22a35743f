"""Run by test_supervisor_groups.py: builds the engines of several layouts as one of many ranks, and prints the timeout
of every process group that is created. Collective operations do nothing, because there is only this process.
"""

import inspect
import json
import os
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from headway.model.attention.gqa import GqaConfig
from headway.model.config import ModelConfig
from headway.parallel.build import make_engine
from headway.parallel.config import OptimizerConfig, ParallelConfig
from headway.parallel.layout import init_layout

TIMEOUT_S = 77
LAYOUTS = {
    "tp2 pp2 dp2": (8, ParallelConfig(tensor=2, pipeline=2)),
    "tp2 dp2 zero 3": (4, ParallelConfig(tensor=2, zero=3)),
    "cp2 dp2 zero 2": (4, ParallelConfig(context=2, zero=2)),
}

groups: list[tuple[list[int], float | None]] = []
really_make: Any = distributed_c10d._new_process_group_helper
really_init: Any = dist.init_process_group


def make(*args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(really_make).bind(*args, **kwargs).arguments
    timeout = given.get("timeout")
    groups.append((list(given["global_ranks_in_group"]), timeout and timeout.total_seconds()))
    return really_make(*args, **kwargs)


def init(backend: str, *, timeout: Any) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    really_init("fake", rank=0, world_size=world_size, store=FakeStore(), timeout=timeout)


def main() -> None:
    found = {}
    with (
        mock.patch.object(distributed_c10d, "_new_process_group_helper", make),
        mock.patch.object(dist, "init_process_group", init),
    ):
        for name, (world_size, parallel) in LAYOUTS.items():
            found[name] = groups_of(world_size, parallel)
    print("GROUPS", json.dumps(found))


def groups_of(world_size: int, parallel: ParallelConfig) -> list[tuple[list[int], float | None]]:
    """(ranks, timeout in seconds) of the groups of one engine. The group of all ranks has an empty list."""
    groups.clear()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    layout = init_layout(device="cpu", timeout_s=TIMEOUT_S, parallel=parallel)
    make_engine(
        ModelConfig(width=32, layers=2, ffn_width=48, init_std=0.05),
        GqaConfig(type="gqa", heads=4, kv_heads=2, head_dim=8),
        vocab_size=32,
        seed=1,
        seq_len=32,
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-3),
        layout=layout,
        micro_batch=2,
        accumulation=2,
    )
    dist.destroy_process_group()
    return list(groups)


if __name__ == "__main__":
    main()
