"""The process grid: this process's ranks and its process groups. Created once and passed as an argument.

The tensor-parallel rank varies fastest, then context, data and pipeline: rank = t + T (c + C (d + D p)). This is the
default order of megatron-core and, with context and data as one dimension, that of DeepSpeed's
`PipeModelDataParallelTopology`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from headway.parallel.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """This process's place in the grid.

    rank: Global rank, over all hosts.
    device: This process's device.
    dp_rank, dp_size: Data parallelism: the sequences of a batch that it trains on.
    cp_rank, cp_size: Context parallelism: the part of each sequence.
    tp_rank, tp_size: Tensor parallelism: the part of each layer.
    pp_rank, pp_size: Pipeline parallelism: the layers.
    tensor_group, context_group: The ranks of that dimension; None for a single rank.
    data_group: The ranks with the same parameters, over which gradients are averaged (data- and context-parallel
        ranks); None for a single rank.
    """

    rank: int
    local_rank: int
    device: torch.device
    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    tensor_group: Any = field(default=None, compare=False)
    context_group: Any = field(default=None, compare=False)
    data_group: Any = field(default=None, compare=False)

    @property
    def world_size(self) -> int:
        return self.tp_size * self.cp_size * self.dp_size * self.pp_size

    @property
    def data_ranks(self) -> int:
        """Ranks in `data_group`."""
        return self.cp_size * self.dp_size

    @property
    def data_index(self) -> int:
        """This rank's index in `data_group`."""
        return self.cp_rank + self.cp_size * self.dp_rank

    @property
    def is_main(self) -> bool:
        """True on the one process that writes logs, metrics and manifests."""
        return self.rank == 0

    @property
    def is_data_lead(self) -> bool:
        """True on exactly one of the ranks that read the same sequences."""
        return self.tp_rank == 0 and self.cp_rank == 0 and self.pp_rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place; every rank must call it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over `data_group`, in place; all ranks of the group must call it."""
        if self.data_ranks > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def gather_json(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order; every rank must call it. Values are sent as JSON, not as pickles."""
        if self.world_size == 1:
            return [value]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        length = torch.tensor([payload.numel()], device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.world_size)]
        dist.all_gather(lengths, length)
        sizes = torch.stack(lengths).flatten().tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: payload.numel()] = payload
        parts = [torch.zeros_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return [json.loads(p[:n].cpu().numpy().tobytes()) for p, n in zip(parts, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def init_layout(
    *,
    device: str,
    timeout_s: int,
    parallel: ParallelConfig | None = None,
    check: Callable[[Layout], None] | None = None,
) -> Layout:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; create subgroups.

    timeout_s: Timeout of collectives. It becomes the default of all groups that are created later: DeepSpeed passes no
        timeout to its groups, so a hanging rank would be detected only after torch's default.
    parallel: None for data parallelism only.
    check: Called with a purely data-parallel layout before subgroups are created. Ranks with different specs would
        create different subgroups and hang.
    """
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    timeout = timedelta(seconds=timeout_s)
    _set_default_group_timeout(timeout)
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timeout)
    if check is not None:
        check(Layout(rank=rank, local_rank=local_rank, device=where, dp_rank=rank, dp_size=dist.get_world_size()))
    return arrange(parallel or ParallelConfig(), local_rank=local_rank, device=where)


def arrange(parallel: ParallelConfig, *, local_rank: int, device: torch.device) -> Layout:
    """Create the layout of an existing process group. Collective. `parallel.model_ranks` must divide the world size."""
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world % parallel.model_ranks == 0, "the launcher checks the world size"
    t, c, p = parallel.tensor, parallel.context, parallel.pipeline
    d = world // parallel.model_ranks
    tp_rank, cp_rank = rank % t, rank // t % c
    dp_rank, pp_rank = rank // (t * c) % d, rank // (t * c * d)
    return Layout(
        rank=rank,
        local_rank=local_rank,
        device=device,
        dp_rank=dp_rank,
        dp_size=d,
        tp_rank=tp_rank,
        tp_size=t,
        pp_rank=pp_rank,
        pp_size=p,
        cp_rank=cp_rank,
        cp_size=c,
        tensor_group=_subgroup(rank, world, t, lambda r: r // t),
        context_group=_subgroup(rank, world, c, lambda r: (r % t, r // (t * c))),
        data_group=_subgroup(rank, world, c * d, lambda r: (r % t, r // (t * c * d))),
    )


def _subgroup(rank: int, world: int, size: int, key: Callable[[int], Any]) -> Any:
    """The group of the ranks with this rank's key. Every rank creates all groups, in the same order."""
    if size == 1:
        return None
    if size == world:
        return dist.group.WORLD
    mine = None
    for value in dict.fromkeys(key(r) for r in range(world)):
        ranks = [r for r in range(world) if key(r) == value]
        group = dist.new_group(ranks)
        mine = group if rank in ranks else mine
    return mine


_new_group = dist.new_group


def _set_default_group_timeout(timeout: timedelta) -> None:
    def new_group(*args, **kwargs):
        # Positional order of torch.distributed.new_group: ranks, timeout, ...
        if len(args) < 2 and kwargs.get("timeout") is None:
            kwargs["timeout"] = timeout
        return _new_group(*args, **kwargs)

    for module in (dist, distributed_c10d):
        setattr(module, "new_group", new_group)  # noqa: B010 (an assignment would need the exact signature)
