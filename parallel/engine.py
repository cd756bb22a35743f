"""The interface of all engines: `train_step`, `evaluate`, and access to logical tensors for checkpoints.

`headway.parallel.single_engine` is for one process, `headway.parallel.zero_engine` for several ranks (DeepSpeed), and
`headway.parallel.pipeline` for pipelines. `headway.parallel.build` chooses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headway.kernels.loss import IGNORED
from headway.model.base import Attention
from headway.model.decoder import Block, ByToken
from headway.model.dropout import Dropout
from headway.model.router import Router
from headway.model.seq2seq.build import Model
from headway.parallel.fault_points import passing, watch
from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalBuffer, LogicalParameter
from headway.parallel.phases import BACKWARD, FORWARD, OPTIMIZER, NamedClock, PhaseClock, clock_of
from headway.parallel.tensors.spans import Span
from headway.parallel.transfer import transfer_to

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = ("param", *MOMENTS)
"""What a checkpoint holds of each parameter, in fp32."""


class MicroBatch(Protocol):
    """Inputs of one forward pass: tokens and labels [B, S] int64, segments [B, S] int32 or None.

    Of an encoder-decoder also source [B, s] int64, and source_segments [B, s] int32 or None; else both are None.
    """

    @property
    def tokens(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def segments(self) -> Tensor | None: ...
    @property
    def source(self) -> Tensor | None: ...
    @property
    def source_segments(self) -> Tensor | None: ...


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """Statistics of one optimizer step over all ranks. Losses are in nats per target token, times in seconds."""

    loss: float
    aux_loss: float
    grad_norm: float
    targets: int
    forward_s: float | None  # None in a pipeline, where passes overlap
    backward_s: float | None
    optimizer_s: float | None
    skipped: bool


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of an evaluation over all ranks: mean loss in nats per target token, accuracy (fraction of targets that
    are the argmax of the logits), number of targets.

    `standard_error`: of the loss as an estimate of that on all text of this kind, from the spread of `groups` groups of
    targets over all ranks; None with fewer than two. Groups are documents, or micro-batches if none are given.
    """

    loss: float
    accuracy: float
    targets: int
    standard_error: float | None
    groups: int


def evaluation_of(sums: Tensor) -> Evaluation:
    """The result from sums of loss, hits and targets of each group of targets, [N, 3] float64.

    The standard error is that of a ratio of sums (Cochran 1977, section 2.11): groups differ in their targets. A group
    without targets does not count.
    """
    sums = sums[sums[:, 2] > 0]
    total, count = sums.sum(0).tolist(), len(sums)
    loss_sum, hits, targets = total
    some = max(1.0, targets)
    loss = loss_sum / some
    residual = sums[:, 0] - loss * sums[:, 2]
    error = None if count < 2 else math.sqrt(count / (count - 1) * float(residual.square().sum())) / some
    return Evaluation(loss=loss, accuracy=hits / some, targets=int(targets), standard_error=error, groups=count)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices (including embedding, head, routers), none for vectors (gains)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


class Engine(ABC):
    """Trains and evaluates this rank's part of a model: what all engines share.

    `_engine`: the module, or DeepSpeed's engine around it; both are called with what `_inputs` returns and keys of
    dropout.
    `accumulation`: forward passes per optimizer step and rank.
    """

    layout: Layout
    accumulation: int
    blocks: dict[int, Block]
    _logical: list[LogicalParameter]
    _engine: Any
    _inner: torch.optim.Optimizer  # AdamW, with this rank's fp32 state
    _dropout: Dropout | None = None

    def _adopt(self, model: Model) -> None:
        """Take the blocks, the parameters and the dropout of a model. Of an encoder-decoder, the decoder's blocks."""
        self._dropout = model.dropout
        self.blocks = {i: b for i, b in enumerate(model.blocks) if isinstance(b, Block)}
        self._logical = [
            LogicalParameter(name, parameter, model.shards.get(name)) for name, parameter in model.named_parameters()
        ]

    def _prepare(self) -> None:
        """Set up what the passes record. Call it before the parameters are wrapped or cast."""
        watch("step:gradient", self._logical[0].parameter)
        self._clock: PhaseClock = clock_of(self.layout.device)
        self._transfer = transfer_to(self.layout.device)
        self._loss_sums: list[Tensor] = []  # of the last step's micro-batches
        self._aux_losses: list[Tensor] = []
        self._summed: tuple[float, float] | None = None
        self.applied_steps = 0
        self._tokens = 0  # trained before the next step

    @abstractmethod
    def _begin(self, lr: float, ask: Callable[[], bool] | None) -> None:
        """Begin an optimizer step. `ask` (collective): whether to apply the update; None: apply it in any case."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch. `loss`: scaled as by `_per_target`."""

    @abstractmethod
    def _advance(self) -> None:
        """End a micro-batch. After the last one of the step, apply the update."""

    @abstractmethod
    def _outcome(self) -> tuple[bool, float]:
        """Of the last step: whether its update was applied, and the gradient norm before clipping."""

    def name_phases(self, named: bool) -> None:
        """Whether the phases of the following steps are ranges in the trace of a profiler. Not in a pipeline."""
        clock = self._clock.inner if isinstance(self._clock, NamedClock) else self._clock
        self._clock = NamedClock(clock, self.accumulation) if named else clock

    @property
    def attention_layers(self) -> dict[int, Attention]:
        """Of this rank's blocks, by the index of the block in the model."""
        return {index: block.attn for index, block in self.blocks.items()}

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """This rank's part of the decoder."""

    def before_step(self, tokens: int) -> None:
        """Update the schedules of all layers. Call it before each optimizer step and after loading.

        `tokens`: training tokens so far. With the seed of the run, they determine the masks of dropout.
        """
        self._tokens = tokens
        for layer in self.attention_layers.values():
            layer.before_step(tokens)

    def train_step(
        self,
        micro: Sequence[MicroBatch],
        *,
        targets: int,
        lr: float,
        allows: Callable[[float], bool] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> StepStats:
        """Run one optimizer step over this rank's micro-batches: its contiguous part of the global batch, in order.
        Collective.

        The step is skipped on every rank (`StepStats.skipped`) if a gradient on any rank is not finite, or if `allows`
        returns False. `allows` is called on every rank before the update with the mean loss of the global batch.

        `targets`: number of target tokens of the global batch (all ranks and micro-batches). The loss is the mean over
        them, so a micro-batch with fewer targets has less weight.
        `meanwhile`: called when all work of the step is queued on a GPU, before the host waits for it.
        """
        self._begin(lr, allows and (lambda: allows(self._sum_losses()[0] / max(1, targets))))
        timed = self._passes(micro, self._per_target(targets))
        if meanwhile is not None:
            meanwhile()
        loss_sum, aux_sum = self._sum_losses()
        applied, grad_norm = self._outcome()
        self.applied_steps += applied
        forward_s, backward_s, optimizer_s = self._clock.read() if timed else (None, None, None)
        return StepStats(
            loss=loss_sum / max(1, targets),
            aux_loss=aux_sum / (self.layout.data_ranks * self.accumulation),
            grad_norm=grad_norm,
            targets=targets,
            forward_s=forward_s,
            backward_s=backward_s,
            optimizer_s=optimizer_s,
            skipped=not applied,
        )

    def _per_target(self, targets: int) -> float:
        """Factor on summed losses: converts a mean over ranks and micro-batches to a mean over targets."""
        return self.layout.data_ranks * self.accumulation / max(1, targets)

    def _sum_losses(self) -> tuple[float, float]:
        """Sums of the step's losses and auxiliary losses over all ranks. Cached: one all-reduce per step."""
        if self._summed is None:
            loss_sum, aux_sum = self.layout.sum(self._own_losses()).tolist()
            self._summed = (loss_sum, aux_sum)
        return self._summed

    def _own_losses(self) -> Tensor:
        """This rank's contribution to the sums of losses and of auxiliary losses, [2] float64."""
        mine = self._loss_sums if self.layout.tp_rank == 0 else []  # equal on all tensor-parallel ranks: count it once
        zero = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        return torch.stack([sum((t.double() for t in part), zero) for part in (mine, self._aux_losses)])

    def last_losses(self) -> list[float]:
        """Loss sum of each micro-batch of the last step; empty if this rank does not compute losses."""
        return [float(loss) for loss in self._loss_sums]

    def not_finite(self) -> list[str]:
        """Names of parameters with NaN or Inf in this rank's part."""
        return [p.name for p in self._logical if not bool(torch.isfinite(p.own_values).all())]

    def _passes(self, micro: Sequence[MicroBatch], per_target: float) -> bool:
        """Run forward, backward and optimizer step. Returns whether the clock has the times of each phase."""
        self._engine.train()
        layout, clock = self.layout, self._clock
        self._loss_sums, self._aux_losses, self._summed = [], [], None
        clock.start()
        for index, batch in enumerate(micro):
            out = self._engine(*self._inputs(batch), *self._dropout_keys(index, batch))
            # aux_loss is the mean over this rank's groups. After the division, the sum over ranks is the overall mean.
            aux_loss = out.aux_loss / layout.tp_size
            out_loss = passing("step:loss", out.loss_sum)
            loss = out_loss * per_target + aux_loss
            clock.end(FORWARD)
            self._backward(loss)
            self._loss_sums.append(out_loss.detach())
            self._aux_losses.append(aux_loss.detach())
            clock.end(BACKWARD)
            self._advance()
            clock.end(OPTIMIZER)
        return True

    def _dropout_keys(self, index: int, batch: MicroBatch) -> list[Tensor]:
        """Keys [B] of dropout of this rank's `index`-th micro-batch, all of which have B sequences. Empty without."""
        if self._dropout is None:
            return []
        count = len(batch.tokens)
        first = (self.layout.dp_rank * self.accumulation + index) * count
        return [self._dropout.keys(tokens=self._tokens, first=first, count=count, device=self.layout.device)]

    def evaluate(self, micro: Sequence[MicroBatch]) -> Evaluation:
        """Loss and accuracy over the micro-batches of all ranks, which are the groups of targets. Collective."""
        first = self.layout.dp_rank * len(micro)
        groups = [torch.full_like(batch.labels, first + place) for place, batch in enumerate(micro)]
        return self.evaluate_parts(micro, groups, [range(self.layout.dp_size * len(micro))])[0]

    @torch.no_grad()
    def evaluate_parts(
        self, micro: Sequence[MicroBatch], groups: Sequence[Tensor], parts: Sequence[range]
    ) -> list[Evaluation]:
        """Loss and accuracy of each part, which is a range of groups of targets, over all ranks. Collective.

        groups: For each micro-batch [B, S] int64, the group of each label, equal on all ranks: such as its document.
        Parts may share groups, and each micro-batch is evaluated once. The number of targets may differ between ranks.
        The number of micro-batches must not: ZeRO-3 gathers parameters in every forward pass, so a rank with an extra
        micro-batch would wait for the others until the timeout.
        """
        layout = self.layout
        # Added up on the host, where the order of the additions is fixed.
        sums = torch.zeros(max(part.stop for part in parts), 3, dtype=torch.float64)
        for batch, of_batch, scored in zip(micro, groups, self._scored(micro), strict=True):
            # Ranks that share sequences add up; tensor-parallel ranks have equal losses.
            if scored is None or layout.tp_rank:
                continue
            own, labels = (t.chunk(layout.cp_size, 1)[layout.cp_rank].cpu() for t in (of_batch, batch.labels))
            found = torch.stack([t.cpu().double() for t in (scored.losses, scored.hits, labels != IGNORED)], -1)
            sums.index_add_(0, own.flatten(), found.flatten(0, 1))
        sums = layout.sum(sums.to(layout.device)).cpu()
        return [evaluation_of(sums[part.start : part.stop]) for part in parts]

    def _scored(self, micro: Sequence[MicroBatch]) -> list[ByToken | None]:
        """Losses and hits of this rank's part of each micro-batch; None on ranks that do not compute them."""
        module = self._engine
        module.eval()
        found = [module(*self._inputs(batch)).by_token for batch in micro]
        module.train()
        return found

    @property
    def copies_ahead(self) -> bool:
        """Whether `copy_ahead` saves time. If not, it does nothing."""
        return self._transfer.ahead

    def copy_ahead(self, micro: Sequence[MicroBatch]) -> None:
        """Start to copy the inputs of the next step to the device. The step must get the same objects."""
        self._transfer.drop()
        for batch in micro:
            self._transfer.begin(batch, self._host_inputs(batch))

    def _inputs(self, batch: MicroBatch) -> tuple[Tensor | None, ...]:
        """Tokens and labels of this rank's part of the sequences, and segments of the whole sequences; of an
        encoder-decoder the source before them, and its segments before segments.

        Segments stay on the host, where the model reads them.
        """
        inputs = self._transfer.take(batch, self._host_inputs(batch))
        return *inputs, *([] if batch.source is None else [batch.source_segments]), batch.segments

    def _host_inputs(self, batch: MicroBatch) -> list[Tensor]:
        """This rank's part of a micro-batch that the device needs."""
        layout = self.layout
        if batch.source is not None:
            assert layout.cp_size == 1, "the spec check refuses parallel.context with an encoder-decoder"
            return [batch.source, batch.tokens, batch.labels]
        return [t.chunk(layout.cp_size, 1)[layout.cp_rank] for t in (batch.tokens, batch.labels)]

    # ------------------------------------------------------------ logical tensors, for checkpoints

    @property
    def logical(self) -> Sequence[LogicalParameter]:
        """All trainable parameters of this rank's layers, in the order of the model."""
        return self._logical

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Single-device name -> unsharded shape, for all trainable parameters of this rank's layers."""
        return {p.name: p.whole_shape(self.layout.tp_size) for p in self._logical}

    @abstractmethod
    def read_spans(self) -> Iterator[tuple[str, Span, Tensor]]:
        """Yield ("param/NAME" | "exp_avg/NAME" | "exp_avg_sq/NAME", span, its fp32 elements) of this rank's layers.

        Nothing is exchanged. The spans of all ranks hold each element of each tensor exactly once. A rank also yields
        the tensors of its layers that others hold, with an empty span. A parameter that two stages share belongs to the
        first one. The elements are those of the optimizer, not copies.
        """

    @abstractmethod
    def write_logical(self, tensors: Mapping[str, Tensor], *, applied_steps: int) -> None:
        """Set parameters, fp32 master weights, moments (keys as in `read_spans`) and Adam's step counters."""

    def buffers(self) -> dict[str, LogicalBuffer]:
        """Persistent buffers (router biases) of this rank's layers, by single-device name.

        Those of routers are sharded with the router, others as the mechanism declares.
        """
        found: dict[str, LogicalBuffer] = {}
        for index, block in self.blocks.items():
            layer = block.attn
            names = set(layer.state_dict(keep_vars=True))
            for name, buffer in layer.named_buffers():
                if name in names:
                    owner = layer.get_submodule(name.rpartition(".")[0])
                    shard = block.shards.get(f"attn.{name}") if layer.ranks.count > 1 else None
                    in_router = isinstance(owner, Router) and owner.ranks.count > 1
                    dim = 0 if in_router else None if shard is None else shard.dim
                    found[f"blocks.{index}.attn.{name}"] = LogicalBuffer(buffer, dim)
        return found

    def adam_steps(self) -> set[int]:
        """The distinct step counters of Adam's states. If correct, they are all equal to `applied_steps`."""
        return {int(state["step"]) for state in self._inner.state.values()}
