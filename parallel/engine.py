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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headway.parallel.config import OptimizerConfig, ParallelConfig
from headway.parallel.layout import Layout

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
    forward_s: float
    backward_s: float
    optimizer_s: float
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
    parallel: ParallelConfig, optimizer: OptimizerConfig, *, micro_batch: int, accumulation: int, dp_size: int
) -> dict[str, Any]:
    """The JSON DeepSpeed is driven with. Every default that ever changed between its releases is written out."""
    bf16 = parallel.precision == "bf16"
    config: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * dp_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip_norm,
        "steps_per_print": 1 << 40,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": parallel.zero, "overlap_comm": False, "contiguous_gradients": parallel.zero > 1},
        "bf16": {"enabled": bf16},
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
    gloo does the same work. `cpu`: train on the CPU even where there is a GPU, which DeepSpeed would otherwise take.
    """
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if cpu:
        table = getattr(deepspeed.ops, "__compatible_ops__", {})
        if "deepspeed_shm_comm" in table:
            table["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
    """A DeepSpeed ZeRO engine around a model whose forward returns (loss_sum, targets, aux_loss, hits).

    `micro_batch` sequences per forward pass; `accumulation` passes per optimizer step and rank.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        layout: Layout,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        deepspeed = quiet_deepspeed(cpu=layout.device.type == "cpu")
        self.layout, self.zero, self.accumulation = layout, parallel.zero, accumulation
        model.to(layout.device)
        inner = torch.optim.AdamW(
            parameter_groups(model, optimizer.weight_decay),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        config = deepspeed_config(
            parallel, optimizer, micro_batch=micro_batch, accumulation=accumulation, dp_size=layout.dp_size
        )
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints memory reports; stdout is for the console line
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=model, optimizer=inner, config=config, dist_init_required=False
            )
        self._inner = inner
        self._deepspeed = deepspeed
        self.applied_steps = 0
        self._create_optimizer_state()

    @property
    def module(self) -> Any:
        return self._engine.module

    def train_step(self, micro: Sequence[MicroBatch], *, targets: int, lr: float) -> StepStats:
        """One optimizer step over this rank's micro batches.

        `targets` is the number of target tokens of the global batch (all ranks, all micro batches): the loss is their
        mean, so a micro batch with fewer targets weighs less.
        """
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.train()
        # DeepSpeed averages gradients over ranks and micro batches; this turns that average into a mean over tokens.
        per_target = self.layout.dp_size * self.accumulation / max(1, targets)
        sums = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        forward_s = backward_s = optimizer_s = 0.0
        skipped_before = self._engine.skipped_steps
        for batch in micro:
            t0 = time.perf_counter()
            out = self._engine(*self._inputs(batch))
            loss = out.loss_sum * per_target + out.aux_loss
            t1 = time.perf_counter()
            self._engine.backward(loss)
            t2 = time.perf_counter()
            self._engine.step()
            t3 = time.perf_counter()
            sums[0] += out.loss_sum.detach()
            sums[1] += out.aux_loss.detach()
            forward_s, backward_s, optimizer_s = forward_s + t1 - t0, backward_s + t2 - t1, optimizer_s + t3 - t2
        self.layout.sum(sums)
        loss_sum, aux_sum = sums.tolist()
        skipped = self._engine.skipped_steps != skipped_before
        self.applied_steps += not skipped
        return StepStats(
            loss=loss_sum / max(1, targets),
            aux_loss=aux_sum / (self.layout.dp_size * self.accumulation),
            grad_norm=float(self._engine.get_global_grad_norm() or 0.0),
            targets=targets,
            forward_s=forward_s,
            backward_s=backward_s,
            optimizer_s=optimizer_s,
            skipped=skipped,
        )

    @torch.no_grad()
    def evaluate(self, micro: Iterable[MicroBatch]) -> Evaluation:
        """Loss and accuracy over the micro batches of all ranks.

        Ranks may bring different numbers of targets, but must bring the same number of micro batches: ZeRO-3 gathers
        parameters in every forward pass, and a rank that makes one more waits for the others until the timeout.
        """
        module = self._engine
        module.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.layout.device)
        for batch in micro:
            out = module(*self._inputs(batch))
            sums[0] += out.loss_sum
            sums[1] += out.hits
            sums[2] += out.targets
        module.train()
        self.layout.sum(sums)
        loss_sum, hits, targets = sums.tolist()
        return Evaluation(loss=loss_sum / max(1.0, targets), accuracy=hits / max(1.0, targets), targets=int(targets))

    def _inputs(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        device = self.layout.device
        segments = None if batch.segments is None else batch.segments.to(device, non_blocking=True)
        return batch.tokens.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True), segments

    # ------------------------------------------------------------ logical tensors, for checkpoints

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters under their single-device names, in the same order on every rank."""
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad)

    def read_logical(self) -> Iterator[tuple[str, Tensor]]:
        """("param/NAME" | "exp_avg/NAME" | "exp_avg_sq/NAME", full fp32 tensor). Collective: all ranks iterate."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.named_parameters():
            yield f"param/{name}", _whole(safe_get_full_fp32_param(parameter), name)
            for key in MOMENTS:
                yield f"{key}/{name}", _whole(safe_get_full_optimizer_state(parameter, key), name)

    def write_logical(self, tensors: Mapping[str, Tensor], *, applied_steps: int) -> None:
        """Set parameters, masters and moments from `tensors[key]` (keys as in `read_logical`), and Adam's counter."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        device = self.layout.device
        for name, parameter in self.named_parameters():
            value = tensors[f"param/{name}"].to(device)
            safe_set_full_fp32_param(parameter, value)
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"{key}/{name}"].to(device), key)
            self._write_low_precision(parameter, value)
        for state in self._inner.state.values():
            state["step"].fill_(float(applied_steps))
        self.applied_steps = applied_steps

    def adam_steps(self) -> set[int]:
        """Adam's own step counters; one value, equal to `applied_steps`, when all is well."""
        return {int(state["step"]) for state in self._inner.state.values()}

    @torch.no_grad()
    def _write_low_precision(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.zero < 3:
            parameter.data.copy_(value.view_as(parameter))
            return
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if self.layout.rank == 0:
                parameter.data.copy_(value.view_as(parameter))

    def _create_optimizer_state(self) -> None:
        """Create Adam's moments now instead of in the first step.

        A checkpoint can only be loaded into moments that exist; and DeepSpeed (0.19) links moments to parameters after
        stepping the first parameter group alone, which leaves every later group (the norm gains) without a link.
        """
        # Where DeepSpeed keeps this rank's fp32 partitions: ZeRO-1/2, ZeRO-3, bf16 ZeRO-1 (which fills them itself).
        partitions = (
            getattr(self._zero, "single_partition_of_fp32_groups", None)
            or getattr(self._zero, "fp32_partitioned_groups_flat", None)
            or self._zero.fp32_groups_flat_partition
        )
        for partition in partitions:
            state = self._inner.state[partition]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=partition.device)
                for key in MOMENTS:
                    state[key] = torch.zeros_like(partition, requires_grad=False)
        link = getattr(self._zero, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()


def _whole(tensor: Tensor | None, name: str) -> Tensor:
    assert tensor is not None, f"DeepSpeed returned no fp32 tensor for {name}"
    return tensor
