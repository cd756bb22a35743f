"""Logical tensors: a rank's parameters and buffers with their single-device names and unsharded shapes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.model.base import Shard
from headway.model.hidden import hidden
from headway.parallel.layout import Layout
from headway.parallel.tensors.spans import Span, whole

_SHARED_LAYER = re.compile(r"\.(attn|cross|mlp)\.")


class LogicalParameter(NamedTuple):
    """A trainable parameter with its single-device name."""

    name: str
    parameter: nn.Parameter
    shard: Shard | None  # how tensor parallelism shards it; None: replicated
    copy: bool = False  # True if an earlier pipeline stage has the same (tied) parameter and saves it

    @property
    def dim(self) -> int | None:
        """The sharded dimension, or None."""
        return None if self.shard is None else self.shard.dim

    @property
    def own_values(self) -> Tensor:
        """This rank's values. Under ZeRO-3, the parameter is an empty placeholder outside of the passes, and its
        `ds_tensor` holds this rank's part.
        """
        parameter: Any = self.parameter
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return (parameter if parameter.shape == shape else parameter.ds_tensor).detach()

    def whole_shape(self, tp_size: int) -> tuple[int, ...]:
        # Under ZeRO-3, the parameter is an empty placeholder with its shape in `ds_shape`.
        shape = list(getattr(self.parameter, "ds_shape", self.parameter.shape))
        if self.dim is not None:
            shape[self.dim] *= tp_size
        return tuple(shape)


class LogicalBuffer(NamedTuple):
    """A persistent buffer and its sharded dimension (None: replicated)."""

    tensor: Tensor
    dim: int | None


def part_span(shape: tuple[int, ...], dim: int | None, layout: Layout) -> Span:
    """This rank's tensor-parallel part of an unsharded tensor of this shape."""
    span = whole(shape)
    if dim is None or layout.tp_size == 1:
        return span
    return replace(span, dim=dim, ranks=layout.tp_size, rank=layout.tp_rank, stop=span.stop // layout.tp_size)


def own_part(whole: Tensor, dim: int | None, layout: Layout) -> Tensor:
    """This rank's shard of an unsharded tensor."""
    return whole if dim is None else whole.chunk(layout.tp_size, dim)[layout.tp_rank].contiguous()


def prepare_tensor_parallel(logical: Sequence[LogicalParameter], layout: Layout, *, sequence_parallel: bool) -> None:
    """Prepare parameters for tensor parallelism.

    Sharded parameters are marked, so that their gradient norms are summed over ranks. Replicated parameters get a hook
    that all-reduces their gradients. Those gradients are partial if each rank uses the parameter for its own groups
    (the gain of QK-norm, GQE's mixing output) or its own tokens (norms under sequence parallelism).
    """
    if layout.tp_size == 1:
        return
    with hidden("wandb"):  # as in `headway.parallel.collectives`
        from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    for name, parameter, shard, _ in logical:
        if shard is not None:
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=shard.dim, stride=1)
        elif sequence_parallel or _SHARED_LAYER.search(name):
            # The hook runs before the gradient is accumulated, so it works with every ZeRO stage.
            parameter.register_hook(partial(_summed, layout.tensor_group))


def _summed(group: Any, gradient: Tensor) -> Tensor:
    """The sum over the ranks of a group, computed in fp32 and rounded once."""
    total = gradient.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    dist.all_reduce(total, group=group)
    return total.to(gradient.dtype)
