"""The engine for several ranks: DeepSpeed's ZeRO stages behind the interface of `headway.parallel.engine`.

DeepSpeed's options are in `headway.parallel.deepspeed_options`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.model.seq2seq.build import Model
from headway.parallel.adamw import AdamW
from headway.parallel.config import OptimizerConfig, ParallelConfig
from headway.parallel.deepspeed_options import deepspeed_config, quiet_deepspeed
from headway.parallel.engine import MOMENTS, STATE, Engine, parameter_groups
from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalParameter, part_span, prepare_tensor_parallel
from headway.parallel.tensors.reader import copy_span
from headway.parallel.tensors.spans import Span


class ZeroEngine(Engine):
    """A DeepSpeed ZeRO engine for a decoder, for all layouts without pipeline parallelism.

    `micro_batch`: sequences per forward pass. `accumulation`: forward passes per optimizer step and rank.
    """

    def __init__(
        self,
        model: Model,
        *,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        layout: Layout,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        self.layout, self.accumulation = layout, accumulation
        self._adopt(model)
        self._start(model, parallel, optimizer, micro_batch)

    def _start(self, model: nn.Module, parallel: ParallelConfig, optimizer: OptimizerConfig, micro_batch: int) -> None:
        layout, self._zero_stage = self.layout, parallel.zero
        deepspeed = quiet_deepspeed(cpu=layout.device.type == "cpu")
        model.to(layout.device)
        prepare_tensor_parallel(self._logical, layout, sequence_parallel=parallel.sequence_parallel)
        self._prepare()
        inner = AdamW(
            parameter_groups(model, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        config = deepspeed_config(
            parallel,
            optimizer,
            micro_batch=micro_batch,
            accumulation=self.accumulation,
            data_ranks=layout.data_ranks,
            device=layout.device.type,
            largest=max(p.parameter.numel() for p in self._logical),
        )
        # DeepSpeed stores the grid of the process's previous engine globally, and would use it for this engine.
        deepspeed.utils.groups.mpu = None
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints memory reports; stdout is for the console line
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=inner, config=config, dist_init_required=False, mpu=self._grid()
            )
        self._inner = inner
        self._gate = _Gate(inner)
        self._deepspeed = deepspeed
        self._create_optimizer_state()

    def _grid(self) -> Any:
        """DeepSpeed's view of the process grid; None without tensor parallelism."""
        return None if self.layout.tp_size == 1 else _Grid(self.layout)

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def _begin(self, lr: float, ask: Callable[[], bool] | None) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._skipped_before = self._engine.skipped_steps
        self._gate.close(ask)

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def _advance(self) -> None:
        self._engine.step()

    def _outcome(self) -> tuple[bool, float]:
        skipped = self._engine.skipped_steps != self._skipped_before or self._gate.refused
        return not skipped, float(self._engine.get_global_grad_norm() or 0.0)

    # ------------------------------------------------------------ logical tensors, for checkpoints

    def read_spans(self) -> Iterator[tuple[str, Span, Tensor]]:
        layout = self.layout
        for position, logical in enumerate(self._logical):
            if logical.copy:
                continue
            span, held = self._held(logical)
            # Tensor-parallel ranks that hold the same parameter take turns.
            if logical.dim is None and position % layout.tp_size != layout.tp_rank:
                span = replace(span, stop=span.start)
            for part, tensor in zip(STATE, held, strict=True):
                yield f"{part}/{logical.name}", span, tensor[: span.size]

    def _held(self, logical: LogicalParameter) -> tuple[Span, list[Tensor]]:
        """The span of a parameter that ZeRO gives to this rank, and views of its fp32 elements for each of `STATE`."""
        parameter, part = logical.parameter, self._part(logical)
        mapping: Any = getattr(parameter, "_hp_mapping", None)  # DeepSpeed's, under ZeRO-1 and 2
        if self._zero_stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            held = [safe_get_local_fp32_param(parameter)]
            held += [safe_get_local_optimizer_state(parameter, key) for key in MOMENTS]
            # All ranks have ranges of the same size, padded where the parameter ends.
            size, rank = held[0].numel(), self._optimizer._get_param_partition_rank(parameter)
            start, stop = (min(i * size, part.part_size) for i in (rank, rank + 1))
        elif mapping is None:  # other ranks hold it
            empty = torch.empty(0, device=self.layout.device)
            start, stop, held = 0, 0, [empty] * len(STATE)
        else:
            start = mapping.lp_fragment_address.start
            stop = start + mapping.lp_fragment_address.numel
            held = [mapping.get_hp_fragment(key) for key in (None, *MOMENTS)]
        return replace(part, start=start, stop=stop), [tensor.detach()[: stop - start] for tensor in held]

    def _part(self, logical: LogicalParameter) -> Span:
        """The part of a parameter that this rank computes with."""
        return part_span(logical.whole_shape(self.layout.tp_size), logical.dim, self.layout)

    @torch.no_grad()
    def write_logical(self, tensors: Mapping[str, Tensor], *, applied_steps: int) -> None:
        for logical in self._logical:
            span, held = self._held(logical)
            for part, tensor in zip(STATE, held, strict=True):
                copy_span(tensors, f"{part}/{logical.name}", span, tensor)
            self._write_low_precision(logical, tensors)
        for state in self._inner.state.values():
            state["step"].fill_(float(applied_steps))
        self.applied_steps = applied_steps

    def _write_low_precision(self, logical: LogicalParameter, tensors: Mapping[str, Tensor]) -> None:
        """Set what the passes use. Collective under ZeRO-3."""
        parameter, key, part = logical.parameter, f"param/{logical.name}", self._part(logical)
        if self._zero_stage < 3:
            copy_span(tensors, key, part, parameter.data.view(-1))
            return
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self.layout.data_index == 0:
                copy_span(tensors, key, part, parameter.data.view(-1))

    def _create_optimizer_state(self) -> None:
        """Create Adam's moments now instead of in the first step.

        Loading a checkpoint needs existing moments. In addition, DeepSpeed (0.19) links moments to parameters after the
        step of the first parameter group, so the moments of later groups (norm gains) would not be linked.
        """
        # DeepSpeed's attribute with this rank's fp32 partitions: ZeRO-1/2, ZeRO-3, bf16 ZeRO-1 (it fills them itself).
        partitions = (
            getattr(self._optimizer, "single_partition_of_fp32_groups", None)
            or getattr(self._optimizer, "fp32_partitioned_groups_flat", None)
            or self._optimizer.fp32_groups_flat_partition
        )
        for partition in partitions:
            state = self._inner.state[partition]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
                for key in MOMENTS:
                    state[key] = torch.zeros_like(partition, requires_grad=False)
        link = getattr(self._optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()


class _Gate:
    """Wraps the optimizer's `step` so that an update can be skipped. DeepSpeed calls it once per parameter group."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._update, self._ask = optimizer.step, None
        self._answer: bool | None = None
        optimizer.step = self._step

    def close(self, ask: Callable[[], bool] | None) -> None:
        """Apply the next update only if `ask` (collective) returns True; None: apply it in any case."""
        self._ask, self._answer = ask, None

    @property
    def refused(self) -> bool:
        return self._answer is False

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if self._ask is not None and self._answer is None:
            self._answer = self._ask()
        return None if self.refused else self._update(*args, **kwargs)


class _Grid:
    """The process grid with the methods that DeepSpeed calls for tensor parallelism."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        # DeepSpeed reduces over this group, and would take None for all ranks.
        self._data_group = layout.data_group if layout.data_ranks > 1 else _alone(layout)

    def get_model_parallel_rank(self) -> int:
        return self._layout.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._layout.tp_size

    def get_model_parallel_group(self) -> Any:
        return self._layout.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self._layout.data_index

    def get_data_parallel_world_size(self) -> int:
        return self._layout.data_ranks

    def get_data_parallel_group(self) -> Any:
        return self._data_group


def _alone(layout: Layout) -> Any:
    """The group that contains only this rank. Collective: every rank creates the groups of all ranks."""
    groups = [dist.new_group([rank]) for rank in range(layout.world_size)]
    return groups[layout.rank]
