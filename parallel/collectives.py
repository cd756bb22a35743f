"""Collectives inside a forward and backward pass: implementations of `Ranks` and `SequenceRanks`.

Tensor-parallel collectives run once at the input and once at the output of each sharded layer, not per matrix. Queries,
keys, values and router rows read the same input, so its gradient is reduced once.

Without sequence parallelism, the mappings of megatron-core are used. They reduce in place, and do not reduce a tensor
that is not contiguous, so they get contiguous copies. The megatron-core mappings for sequence parallelism shard
dimension 0 and allocate on a CUDA device. Ours shard dimension 1 of [B, S, d] and run on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.kernels.attention import core
from headway.kernels.documents import Documents
from headway.model.base import Ranks, SequenceRanks
from headway.model.hidden import hidden
from headway.parallel.layout import Layout

_OverGroup = Callable[[Tensor, Any], Tensor]


def tensor_ranks(layout: Layout, *, sequence_parallel: bool) -> Ranks:
    """The tensor-parallel ranks of `layout`. `sequence_parallel`: shard the sequence between layers."""
    if layout.tp_size == 1:
        return Ranks()
    # Imported lazily: this takes as long as importing torch. Its timers import W&B where it is installed, which takes
    # seconds and leaves folders in the temporary one when the rank is killed.
    with hidden("wandb"):
        from megatron.core.tensor_parallel import mappings

    group = layout.tensor_group
    if sequence_parallel:
        enter, leave = partial(_gather, group), partial(_scatter, group)
    else:
        enter = partial(_enter, partial(mappings.copy_to_tensor_model_parallel_region, group=group))
        leave = partial(_leave, partial(mappings.reduce_from_tensor_model_parallel_region, group=group))
    return Ranks(
        index=layout.tp_rank,
        count=layout.tp_size,
        enter=enter,
        leave=leave,
        sum=partial(_sum, group),
        largest=partial(_largest, group),
    )


def sequence_ranks(layout: Layout, core: Callable[..., Tensor] = core) -> SequenceRanks:
    """The context-parallel ranks of `layout`. `core`: the attention core of each rank."""
    if layout.cp_size == 1:
        return SequenceRanks(attend=core)
    return SequenceRanks(
        index=layout.cp_rank,
        count=layout.cp_size,
        mean=lambda tensor: _sum(layout.context_group, tensor) / layout.cp_size,
        attend=_Ulysses(layout, core),
        gather=lambda tensor: _gathered(tensor.detach(), layout.context_group),
    )


class _Ulysses:
    """Ulysses attention (Jacobs et al., 2023, arXiv 2309.14509) with DeepSpeed's `DistributedAttention`.

    Each rank holds a part of the sequence. An all-to-all gives it whole sequences for some of the heads. If the ranks
    do not divide the KV heads (a single one, for example), keys and values are all-gathered instead, and each rank
    attends with its own queries.
    """

    def __init__(self, layout: Layout, core: Callable[..., Tensor]) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self._group, self._index, self._count = layout.context_group, layout.cp_rank, layout.cp_size
        self._core = core
        self._dealt = DistributedAttention(_Core(core), self._group, scatter_idx=2, gather_idx=1)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, *, window: int | None = None
    ) -> Tensor:
        """q [B, S/C, H, D]; k, v [B, S/C, G, D]; documents of the whole sequence -> output [B, S/C, H, D]."""
        if k.shape[2] % self._count == 0:
            return self._dealt(q, k, v, 0, None, documents, window=window)
        rows = q.shape[1]
        first, last = self._index * rows, (self._index + 1) * rows
        # Drop keys after this rank's last query, so that the queries are at the last positions, as the core requires.
        k, v = (_gather(self._group, t)[:, :last] for t in (k, v))
        return self._core(q, k, v, documents and documents.part(first, last), window=window)


class _Core(nn.Module):
    """The attention core as a module, as DeepSpeed expects it."""

    def __init__(self, core: Callable[..., Tensor]) -> None:
        super().__init__()
        self._core = core

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, *, window: int | None) -> Tensor:
        return self._core(q, k, v, documents, window=window)


def _enter(copy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return _Fresh.apply(copy(x))


def _leave(reduce: Callable[[Tensor], Tensor], partial_sum: Tensor) -> Tensor:
    return reduce(partial_sum.clone(memory_format=torch.contiguous_format))


class _Fresh(torch.autograd.Function):
    """Identity whose gradient is a contiguous copy, as megatron-core's in-place reduction requires."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].clone(memory_format=torch.contiguous_format)


class _Exchange(torch.autograd.Function):
    """Apply `there` over the ranks of a group in the forward pass, and `back` to the gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, there: _OverGroup, back: _OverGroup, group: Any, tensor: Tensor) -> Tensor:
        ctx.back, ctx.group = back, group
        return there(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor]:
        return None, None, None, ctx.back(grads[0], ctx.group)


def _sum(group: Any, tensor: Tensor) -> Tensor:
    """All-reduce in the forward and in the backward pass."""
    return _Exchange.apply(_reduced, _reduced, group, tensor)


def _gather(group: Any, tensor: Tensor) -> Tensor:
    """All-gather [B, S/n, ...] -> [B, S, ...]; the backward is a reduce-scatter."""
    return _Exchange.apply(_gathered, _scattered, group, tensor)


def _scatter(group: Any, tensor: Tensor) -> Tensor:
    """Reduce-scatter of partial sums [B, S, d] -> [B, S/n, d]; the backward is an all-gather."""
    return _Exchange.apply(_scattered, _gathered, group, tensor)


def _reduced(tensor: Tensor, group: Any) -> Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _largest(group: Any, tensor: Tensor) -> Tensor:
    most = tensor.detach().contiguous().clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return most


def _gathered(tensor: Tensor, group: Any) -> Tensor:
    """All-gather along dimension 1."""
    ranks = dist.get_world_size(group)
    parts = tensor.new_empty(ranks * len(tensor), *tensor.shape[1:])  # the ranks' parts along dimension 0
    dist.all_gather_into_tensor(parts, tensor.contiguous(), group=group)
    return parts.unflatten(0, (ranks, -1)).movedim(0, 1).flatten(1, 2)


def _scattered(tensor: Tensor, group: Any) -> Tensor:
    """Reduce-scatter along dimension 1."""
    ranks = dist.get_world_size(group)
    parts = tensor.unflatten(1, (ranks, -1)).movedim(1, 0).flatten(0, 1)
    mine = tensor.new_empty(len(tensor), *parts.shape[1:])
    dist.reduce_scatter_tensor(mine, parts.contiguous(), group=group)
    return mine
