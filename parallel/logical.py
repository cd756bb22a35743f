"""Single-device names and whole shapes of what a rank holds: for checkpoints, and for what cut parameters need."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.model.base import Shard
from headway.parallel.layout import Layout

_SHARED_LAYER = re.compile(r"\.(attn|mlp)\.")


class LogicalParameter(NamedTuple):
    """A trained parameter under its single-device name."""

    name: str
    parameter: nn.Parameter
    shard: Shard | None  # how it is cut over tensor-parallel ranks
    copy: bool = False  # another stage holds it too, and speaks for it

    @property
    def dim(self) -> int | None:
        """The dimension it is cut along."""
        return None if self.shard is None else self.shard.dim

    def whole_shape(self, tp_size: int) -> tuple[int, ...]:
        # Under ZeRO-3 the parameter itself is an empty placeholder and `ds_shape` is its shape.
        shape = list(getattr(self.parameter, "ds_shape", self.parameter.shape))
        if self.dim is not None:
            shape[self.dim] *= tp_size
        return tuple(shape)


class LogicalBuffer(NamedTuple):
    """A persistent buffer, and the dimension it is cut along."""

    tensor: Tensor
    dim: int | None


def gathered(part: Tensor, dim: int | None, layout: Layout) -> Tensor:
    """The whole tensor, of the parts that tensor-parallel ranks hold; collective over them."""
    if dim is None or layout.tp_size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(layout.tp_size)]
    dist.all_gather(parts, part.contiguous(), group=layout.tensor_group)
    return torch.cat(parts, dim)


def own_part(whole: Tensor, dim: int | None, layout: Layout) -> Tensor:
    """The inverse: this rank's part."""
    return whole if dim is None else whole.chunk(layout.tp_size, dim)[layout.tp_rank].contiguous()


def prepare_tensor_parallel(logical: Sequence[LogicalParameter], layout: Layout, *, sequence_parallel: bool) -> None:
    """Mark what is cut, so that its gradient norm is added up over ranks; and add up gradients of what is not.

    A parameter that is whole on every rank has partial gradients where each rank uses it for its own groups (the gain
    of QK-norm, GQE's mixing output) or its own tokens (the norms, under sequence parallelism).
    """
    if layout.tp_size == 1:
        return
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    for name, parameter, shard, _ in logical:
        if shard is not None:
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=shard.dim, stride=1)
        elif sequence_parallel or _SHARED_LAYER.search(name):
            # Before the gradient is accumulated, whatever the engine then does with it.
            parameter.register_hook(partial(_summed, layout.tensor_group))


def _summed(group: Any, gradient: Tensor) -> Tensor:
    total = gradient.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total
