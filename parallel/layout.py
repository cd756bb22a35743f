"""The process grid: who this process is and whom it talks to. Made once, passed as an argument."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Data-parallel layout. `device` is this process's device; ranks are global over all hosts."""

    rank: int
    local_rank: int
    dp_rank: int
    dp_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes logs, metrics and manifests."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over data-parallel ranks, in place; every rank must call it."""
        if self.dp_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.dp_size > 1:
            dist.barrier()


def init_layout(*, device: str, timeout_s: int) -> Layout:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    The timeout is made the default of every group created later as well: DeepSpeed passes none to the groups it makes,
    so a hanging rank would otherwise be noticed only after torch's own default.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    timeout = timedelta(seconds=timeout_s)
    _set_default_group_timeout(timeout)
    dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timeout)
    return Layout(rank=rank, local_rank=local_rank, dp_rank=rank, dp_size=world, device=where)


_new_group = dist.new_group


def _set_default_group_timeout(timeout: timedelta) -> None:
    def new_group(*args, **kwargs):
        # Positional order of torch.distributed.new_group: ranks, timeout, ...
        if len(args) < 2 and kwargs.get("timeout") is None:
            kwargs["timeout"] = timeout
        return _new_group(*args, **kwargs)

    for module in (dist, distributed_c10d):
        setattr(module, "new_group", new_group)  # noqa: B010 (an assignment would need the exact signature)
