"""Shards a layer over tensor-parallel ranks according to its sharding declaration."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from headway.model.base import Attention, Ranks, Shard
from headway.model.router import Router


@torch.no_grad()
def cut(module: nn.Module, shards: Mapping[str, Shard], ranks: Ranks) -> None:
    """Replace each parameter or buffer named in `shards` by this rank's shard. The full tensor is freed."""
    if ranks.count == 1:
        return
    for name, shard in shards.items():
        owner, _, own_name = name.rpartition(".")
        holder = module.get_submodule(owner)
        whole = getattr(holder, own_name)
        assert shard.units % ranks.count == 0 and whole.shape[shard.dim] % shard.units == 0, (name, shard)
        part = whole.chunk(ranks.count, shard.dim)[ranks.index].clone(memory_format=torch.contiguous_format)
        if isinstance(whole, nn.Parameter):
            holder.register_parameter(own_name, nn.Parameter(part))
        else:
            setattr(holder, own_name, part)  # stays a buffer, persistent or not


def cut_attention(attention: Attention, shards: Mapping[str, Shard], ranks: Ranks) -> None:
    """Shard an attention module: what `shards` names (`cut`), and the buffers of its routers, which it need not name.

    Sets `ranks` on the module and on these routers. Every other buffer is replicated.
    """
    if ranks.count == 1:
        return
    cut(attention, shards, ranks)
    attention.ranks = ranks
    for path, router in attention.named_modules():
        if not isinstance(router, Router) or not is_cut(path, router, shards):
            continue
        router.ranks = ranks
        for name, buffer in list(router.named_buffers(recurse=False)):
            router.register_buffer(name, buffer.chunk(ranks.count)[ranks.index].clone())


def is_cut(path: str, router: Router, shards: Mapping[str, Shard]) -> bool:
    """Whether a router's groups are sharded. True if all of its parameters are, or if it has none."""
    own = [f"{path}.{name}" for name, _ in router.named_parameters()]
    return all(name in shards for name in own)
