"""Faults that the comparison must detect. Each removes one part of the code that makes a layout exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from torch import Tensor

from headway.parallel import build, engine, logical, pipeline
from headway.parallel.layout import Layout


@contextlib.contextmanager
def partial_gradients() -> Iterator[None]:
    """Gradients of parameters that are replicated over tensor-parallel ranks are not all-reduced."""
    with mock.patch.object(logical, "_summed", lambda group, gradient: gradient):
        yield


@contextlib.contextmanager
def unmarked_parameters() -> Iterator[None]:
    """DeepSpeed is not told which parameters are sharded, so their gradients are missing from the norm."""
    from megatron.core.tensor_parallel import layers

    with mock.patch.object(layers, "set_tensor_model_parallel_attributes", lambda *args, **kwargs: None):
        yield


@contextlib.contextmanager
def stages_apart() -> Iterator[None]:
    """The two pipeline stages with the tied matrix do not all-reduce its gradient."""
    with (
        mock.patch.object(pipeline.PipelineModule, "allreduce_tied_weight_gradients", lambda self: None),
        mock.patch.object(pipeline.PipelineModule, "get_tied_weights_and_groups", lambda self: []),
    ):
        yield


@contextlib.contextmanager
def own_mean() -> Iterator[None]:
    """Each context-parallel rank computes router losses from its own part of the sequences."""

    def ranks(layout: Layout, core: Callable[..., Tensor]) -> Any:
        return replace(real(layout, core), mean=lambda tensor: tensor)

    real = build.sequence_ranks
    with mock.patch.object(build, "sequence_ranks", ranks):
        yield


@contextlib.contextmanager
def rank_average() -> Iterator[None]:
    """Every rank computes the mean over its own targets, so ranks with few targets have the same weight as others."""

    def passes(self: engine.Engine, micro: Any, per_target: float) -> Any:
        own = sum(int((batch.labels != -100).sum()) for batch in micro)
        return real(self, micro, self.accumulation / own)

    real = engine.Engine._passes
    with mock.patch.object(engine.Engine, "_passes", passes):
        yield


@contextlib.contextmanager
def own_load() -> Iterator[None]:
    """Router biases are updated from this rank's tokens only."""

    def own(self: Layout, tensor: Tensor) -> Tensor:
        return tensor

    with mock.patch.object(Layout, "sum_data", own):
        yield


@contextlib.contextmanager
def own_masks() -> Iterator[None]:
    """Every data-parallel rank drops by the masks of the first sequences of the global batch."""

    def keys(self: engine.Engine, index: int, batch: Any) -> list[Tensor]:
        with mock.patch.object(self, "layout", replace(self.layout, dp_rank=0)):
            return real(self, index, batch)

    real = engine.Engine._dropout_keys
    with mock.patch.object(engine.Engine, "_dropout_keys", keys):
        yield


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    fault.__name__: fault
    for fault in (partial_gradients, unmarked_parameters, stages_apart, own_mean, rank_average, own_load, own_masks)
}
