"""DeepSpeed behind one small interface: `train_step`, `evaluate`, and access to logical tensors for checkpoints.

DeepSpeed's JSON is generated here from the strict spec and nowhere else; ZeRO-0 is never used, because its clipping and
its bf16 optimizer follow another trajectory than ZeRO-1 to 3.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.model.base import Attention, Ranks
from headway.model.decoder import Block, Decoder
from headway.parallel.config import OptimizerConfig, ParallelConfig
from headway.parallel.fault_points import passing, watch
from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalBuffer, LogicalParameter, gathered, own_part, prepare_tensor_parallel

MOMENTS = ("exp_avg", "exp_avg_sq")


class MicroBatch(Protocol):
    """What one forward pass reads: tokens and labels [B, S] int64, segments [B, S] int32 or None."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def segments(self) -> Tensor | None: ...


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """One optimizer step, over all ranks. Losses in nats per target token; times in seconds."""

    loss: float
    aux_loss: float
    grad_norm: float
    targets: int
    forward_s: float | None  # None where passes overlap in a pipeline
    backward_s: float | None
    optimizer_s: float | None
    skipped: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A pass without training, over all ranks: mean loss in nats per target, share of targets whose largest logit is
    the label's, number of targets.
    """

    loss: float
    accuracy: float
    targets: int


def deepspeed_config(
    parallel: ParallelConfig, optimizer: OptimizerConfig, *, micro_batch: int, accumulation: int, data_ranks: int
) -> dict[str, Any]:
    """The JSON DeepSpeed is driven with. Every default that ever changed between its releases is written out.

    `data_ranks`: over how many ranks gradients are averaged. DeepSpeed takes each for a reader of its own sequences, so
    where ranks share sequences its batch size is as many times ours; it is only used to check itself.
    """
    bf16 = parallel.precision == "bf16"
    config: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * data_ranks,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip_norm,
        "steps_per_print": 1 << 40,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": parallel.zero, "overlap_comm": False, "contiguous_gradients": parallel.zero > 1},
        "bf16": {"enabled": bf16},
        # By default each tensor-parallel rank sends its part of the activations, and the next stage takes the parts for
        # those of one tensor: true only as long as the ranks hold equal ones, which sequence parallelism ends.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "activation_checkpoint_interval": 0},
    }
    if bf16:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices (embedding, head and routers among them), none for gains and other vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def quiet_deepspeed(*, cpu: bool) -> Any:
    """Import DeepSpeed without its start-up chatter and without compiling its shared-memory operation on CPU.

    The operation is built by a compiler at first use (about 46 s) and only speeds up CPU collectives within a host;
    gloo does the same work. Whether it could be built stands in a table, which DeepSpeed fills by running a compiler in
    every rank; where the rank is killed meanwhile a folder stays behind. So the table is given. `cpu`: train on the CPU
    even where there is a GPU, which DeepSpeed would otherwise take.
    """
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if cpu:
        deepspeed.ops.__dict__["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    return deepspeed


class Engine:
    """A DeepSpeed ZeRO engine around a decoder placed in `layout`: every layout but a pipeline.

    `micro_batch` sequences per forward pass; `accumulation` passes per optimizer step and rank.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        layout: Layout,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        self.layout, self._zero_stage, self.accumulation = layout, parallel.zero, accumulation
        self.blocks: dict[int, Block] = {i: b for i, b in enumerate(model.blocks) if isinstance(b, Block)}
        self._logical = [
            LogicalParameter(name, parameter, model.shards.get(name)) for name, parameter in model.named_parameters()
        ]
        self._start(model, parallel, optimizer, micro_batch)

    def _start(self, model: nn.Module, parallel: ParallelConfig, optimizer: OptimizerConfig, micro_batch: int) -> None:
        layout = self.layout
        deepspeed = quiet_deepspeed(cpu=layout.device.type == "cpu")
        model.to(layout.device)
        prepare_tensor_parallel(self._logical, layout, sequence_parallel=parallel.sequence_parallel)
        watch("step:gradient", self._logical[0].parameter)
        inner = torch.optim.AdamW(
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
        )
        # DeepSpeed keeps the grid of the last engine of the process, and would take it for this one's.
        deepspeed.utils.groups.mpu = None
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints memory reports; stdout is for the console line
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=inner, config=config, dist_init_required=False, mpu=self._grid()
            )
        self._inner = inner
        self._gate = _Gate(inner)
        self._loss_sums: list[Tensor] = []  # of the last step's micro-batches
        self._aux_losses: list[Tensor] = []
        self._summed: tuple[float, float] | None = None
        self._deepspeed = deepspeed
        self.applied_steps = 0
        self._create_optimizer_state()

    def _grid(self) -> Any:
        """What DeepSpeed asks about tensor-parallel ranks; None: there are data-parallel ones alone."""
        return None if self.layout.tp_size == 1 else _Grid(self.layout)

    @property
    def attention_layers(self) -> dict[int, Attention]:
        """Of this rank's blocks, by the index of the block in the model."""
        return {index: block.attn for index, block in self.blocks.items()}

    @property
    def module(self) -> Any:
        return self._engine.module

    def before_step(self, tokens: int) -> None:
        """Tell every layer how many training tokens are done: before each optimizer step, and after loading."""
        for layer in self.attention_layers.values():
            layer.before_step(tokens)

    def train_step(
        self,
        micro: Sequence[MicroBatch],
        *,
        targets: int,
        lr: float,
        allows: Callable[[float], bool] | None = None,
    ) -> StepStats:
        """One optimizer step over this rank's micro batches.

        A step whose gradient is not finite anywhere changes nothing on any rank (`StepStats.skipped`); neither does one
        whose loss `allows` refuses, which is asked on every rank before the update.

        `targets` is the number of target tokens of the global batch (all ranks, all micro batches): the loss is their
        mean, so a micro batch with fewer targets weighs less.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        skipped_before = self._engine.skipped_steps
        self._gate.close(allows and (lambda: allows(self._sum_losses()[0] / max(1, targets))))
        times = self._passes(micro, self._per_target(targets))
        loss_sum, aux_sum = self._sum_losses()
        skipped = self._engine.skipped_steps != skipped_before or self._gate.refused
        self.applied_steps += not skipped
        return StepStats(
            loss=loss_sum / max(1, targets),
            aux_loss=aux_sum / (self.layout.data_ranks * self.accumulation),
            grad_norm=float(self._engine.get_global_grad_norm() or 0.0),
            targets=targets,
            forward_s=times[0] if times else None,
            backward_s=times[1] if times else None,
            optimizer_s=times[2] if times else None,
            skipped=skipped,
        )

    def _per_target(self, targets: int) -> float:
        """DeepSpeed averages gradients over data ranks and micro batches; this makes a mean over tokens of it."""
        return self.layout.data_ranks * self.accumulation / max(1, targets)

    def _sum_losses(self) -> tuple[float, float]:
        """Sums of the step's losses and router losses over all ranks; they meet once a step."""
        if self._summed is None:
            loss_sum, aux_sum = self.layout.sum(self._own_losses()).tolist()
            self._summed = (loss_sum, aux_sum)
        return self._summed

    def _own_losses(self) -> Tensor:
        """This rank's share of the sums of the losses and the router losses, [2] float64."""
        mine = self._loss_sums if self.layout.tp_rank == 0 else []  # it is the same on all that share the layers
        zero = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        return torch.stack([sum((t.double() for t in part), zero) for part in (mine, self._aux_losses)])

    def last_losses(self) -> list[float]:
        """Sum of the losses of each micro-batch of the last step, where this rank computes them."""
        return [float(loss) for loss in self._loss_sums]

    def not_finite(self) -> list[str]:
        """Names of the parameters that hold NaN or infinity, as far as this rank holds them."""
        return [p.name for p in self._logical if not bool(torch.isfinite(p.parameter.detach()).all())]

    def _passes(self, micro: Sequence[MicroBatch], per_target: float) -> list[float] | None:
        """Forward, backward and optimizer step; seconds of each where they can be told apart."""
        self._engine.train()
        layout, times = self.layout, [0.0, 0.0, 0.0]
        self._loss_sums, self._aux_losses, self._summed = [], [], None
        for batch in micro:
            t0 = time.perf_counter()
            out = self._engine(*self._inputs(batch))
            # Each rank's routers say the mean over its own groups.
            aux_loss = out.aux_loss / layout.tp_size
            out_loss = passing("step:loss", out.loss_sum)
            loss = out_loss * per_target + aux_loss
            t1 = time.perf_counter()
            self._engine.backward(loss)
            self._loss_sums.append(out_loss.detach())
            self._aux_losses.append(aux_loss.detach())
            t2 = time.perf_counter()
            self._engine.step()
            t3 = time.perf_counter()
            times = [a + b for a, b in zip(times, (t1 - t0, t2 - t1, t3 - t2), strict=True)]
        return times

    @torch.no_grad()
    def evaluate(self, micro: Sequence[MicroBatch]) -> Evaluation:
        """Loss and accuracy over the micro batches of all ranks.

        Ranks may bring different numbers of targets, but must bring the same number of micro batches: ZeRO-3 gathers
        parameters in every forward pass, and a rank that makes one more waits for the others until the timeout.
        """
        sums = self._evaluation_sums(micro)
        if self.layout.tp_rank:
            sums.zero_()
        loss_sum, hits, targets = self.layout.sum(sums).tolist()
        return Evaluation(loss=loss_sum / max(1.0, targets), accuracy=hits / max(1.0, targets), targets=int(targets))

    def _evaluation_sums(self, micro: Sequence[MicroBatch]) -> Tensor:
        """Loss, hits and targets of this rank's micro batches, float64."""
        module = self._engine
        module.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.layout.device)
        for batch in micro:
            out = module(*self._inputs(batch))
            sums += torch.stack([out.loss_sum.double(), out.hits.double(), out.targets.double()])
        module.train()
        return sums

    def _inputs(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens and labels of this rank's part of the sequences, and segments of the whole."""
        device, layout = self.layout.device, self.layout
        tokens, labels = (t.chunk(layout.cp_size, 1)[layout.cp_rank] for t in (batch.tokens, batch.labels))
        segments = None if batch.segments is None else batch.segments.to(device, non_blocking=True)
        return tokens.to(device, non_blocking=True), labels.to(device, non_blocking=True), segments

    # ------------------------------------------------------------ logical tensors, for checkpoints

    @property
    def logical(self) -> Sequence[LogicalParameter]:
        """Every trained parameter of this rank's layers, in the model's order."""
        return self._logical

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of every trained parameter of this rank's layers, under its single-device name."""
        return {p.name: p.whole_shape(self.layout.tp_size) for p in self._logical}

    def read_logical(self) -> Iterator[tuple[str, Tensor]]:
        """("param/NAME" | "exp_avg/NAME" | "exp_avg_sq/NAME", full fp32 tensor) of this rank's layers.

        Collective: all ranks of a stage iterate alike. A parameter that two stages share is the first one's.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for logical in self._logical:
            if logical.copy:
                continue
            name, parameter = logical.name, logical.parameter
            yield f"param/{name}", self._whole(safe_get_full_fp32_param(parameter), logical)
            for key in MOMENTS:
                yield f"{key}/{name}", self._whole(safe_get_full_optimizer_state(parameter, key), logical)

    def _whole(self, tensor: Tensor | None, logical: LogicalParameter) -> Tensor:
        assert tensor is not None, f"DeepSpeed returned no fp32 tensor for {logical.name}"
        return gathered(tensor, logical.dim, self.layout)

    def write_logical(self, tensors: Mapping[str, Tensor], *, applied_steps: int) -> None:
        """Set parameters, masters and moments from `tensors[key]` (keys as in `read_logical`), and Adam's counter."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        device = self.layout.device
        for logical in self._logical:
            parameter = logical.parameter

            def part(key: str, logical: LogicalParameter = logical) -> Tensor:
                return own_part(tensors[f"{key}/{logical.name}"], logical.dim, self.layout).to(device)

            value = part("param")
            safe_set_full_fp32_param(parameter, value)
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, part(key), key)
            self._write_low_precision(parameter, value)
        for state in self._inner.state.values():
            state["step"].fill_(float(applied_steps))
        self.applied_steps = applied_steps

    def buffers(self) -> dict[str, LogicalBuffer]:
        """Buffers that are state (router biases) of this rank's layers, by their single-device names."""
        found: dict[str, LogicalBuffer] = {}
        for index, layer in self.attention_layers.items():
            names = set(layer.state_dict(keep_vars=True))
            for name, buffer in layer.named_buffers():
                if name in names:
                    owner = layer.get_submodule(name.rpartition(".")[0])
                    is_cut = getattr(owner, "ranks", Ranks()).count > 1
                    found[f"blocks.{index}.attn.{name}"] = LogicalBuffer(buffer, 0 if is_cut else None)
        return found

    def adam_steps(self) -> set[int]:
        """Adam's own step counters; one value, equal to `applied_steps`, when all is well."""
        return {int(state["step"]) for state in self._inner.state.values()}

    @torch.no_grad()
    def _write_low_precision(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self._zero_stage < 3:
            parameter.data.copy_(value.view_as(parameter))
            return
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self.layout.data_index == 0:
                parameter.data.copy_(value.view_as(parameter))

    def _create_optimizer_state(self) -> None:
        """Create Adam's moments now instead of in the first step.

        A checkpoint can only be loaded into moments that exist; and DeepSpeed (0.19) links moments to parameters after
        stepping the first parameter group alone, which leaves every later group (the norm gains) without a link.
        """
        # Where DeepSpeed keeps this rank's fp32 partitions: ZeRO-1/2, ZeRO-3, bf16 ZeRO-1 (which fills them itself).
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
    """Before the optimizer's update: whether it is made. DeepSpeed calls it once for each of its parameter groups."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._update, self._ask = optimizer.step, None
        self._answer: bool | None = None
        optimizer.step = self._step

    def close(self, ask: Callable[[], bool] | None) -> None:
        """Until `ask`, which is collective, allows the next step; None: it is made without a question."""
        self._ask, self._answer = ask, None

    @property
    def refused(self) -> bool:
        return self._answer is False

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if self._ask is not None and self._answer is None:
            self._answer = self._ask()
        return None if self.refused else self._update(*args, **kwargs)


class _Grid:
    """What DeepSpeed asks of a tensor-parallel grid, under the names it uses."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        # DeepSpeed reduces over what it is given, and None would be all ranks.
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
    """The group of this rank by itself; every rank makes all of them."""
    groups = [dist.new_group([rank]) for rank in range(layout.world_size)]
    return groups[layout.rank]
