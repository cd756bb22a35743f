"""The process grid: who this process is and whom it talks to. Made once, passed as an argument.

Ranks are counted tensor first, then context, data and pipeline: rank = t + T (c + C (d + D p)). That is megatron-core's
default order and, with context and data taken together, the order of DeepSpeed's `PipeModelDataParallelTopology`.
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
    """This process in the grid. `device` is this process's device; ranks are global over all hosts.

    `dp_rank` of `dp_size` says which sequences of a batch it trains on, `cp` which part of each, `tp` which part of
    each layer, `pp` which layers. Groups are None where there is one rank. `data_group`: the ranks that hold the same
    parameters, over which gradients are averaged: data and context parallel ranks.
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
        """This rank's place in `data_group`."""
        return self.cp_rank + self.cp_size * self.dp_rank

    @property
    def is_main(self) -> bool:
        """True on the one process that writes logs, metrics and manifests."""
        return self.rank == 0

    @property
    def is_data_lead(self) -> bool:
        """True on one of the ranks that read the same sequences."""
        return self.tp_rank == 0 and self.cp_rank == 0 and self.pp_rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place; every rank must call it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold the same parameters, in place; every one of them must call it."""
        if self.data_ranks > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; every rank must call it. Bytes of JSON, not pickles."""
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
        """Wait until every rank has come here."""
        if self.world_size > 1:
            dist.barrier()


def init_layout(
    *,
    device: str,
    timeout_s: int,
    parallel: ParallelConfig | None = None,
    check: Callable[[Layout], None] | None = None,
) -> Layout:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and its subgroups.

    The timeout is made the default of every group created later as well: DeepSpeed passes none to the groups it makes,
    so a hanging rank would otherwise be noticed only after torch's own default. `parallel`: None for data parallel
    ranks alone. `check` is given all ranks as data parallel ones, before there are groups that ranks of different specs
    would wait for.
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
    """The grid of a process group that exists; collective. Its size must be a multiple of the model's ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world % parallel.model_ranks == 0, "the launcher refuses other world sizes"
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
    """The group of the ranks with this rank's key. Every rank makes all groups, in one order."""
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
