"""Pipeline parallelism: the decoder as DeepSpeed's `PipelineModule`, with the 1F1B schedule.

Stages send each other the residual stream, the tokens (which routers may read), the labels, the keys of dropout and the
document indices. The auxiliary losses of a stage's routers stay on the stage, and their gradients are added there. So
only one floating-point tensor is sent forward, and its gradient backward. The cross-entropy is computed inside the last
layer.
Outside of the module, its gradients for the head's rows would be lost, because DeepSpeed clears the gradients of a bf16
stage when the backward pass reaches the module's outputs.

Layers that use values, or keys and values, of earlier layers lie in one stage with them
(`headway.parallel.partition.stage_pieces`), so these are not sent: the contexts of the pass hold them.

Legend: B batch, S sequence, d width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from headway.model.base import AttentionConfig, AttentionSection
from headway.model.config import ModelConfig
from headway.model.contexts import Contexts, LayerContexts
from headway.model.cost import layer_configs
from headway.model.decoder import (
    BranchScale,
    ByToken,
    Placement,
    add_positions,
    drop,
    embed,
    make_block,
    make_positions,
    run_block,
    score,
    vocabulary_shards,
)
from headway.model.dropout import Dropout, Drops
from headway.model.init import initialise
from headway.model.layers import make_norm, parameter
from headway.model.shard import cut
from headway.parallel.config import OptimizerConfig, ParallelConfig
from headway.parallel.engine import MicroBatch
from headway.parallel.fault_points import passing
from headway.parallel.layout import Layout
from headway.parallel.logical import LogicalParameter
from headway.parallel.zero_engine import ZeroEngine

Inputs = tuple[Tensor, ...]
"""x [B, S, d] (absent for the embedding); tokens, labels [B, S]; with dropout its keys [B]; optionally segments."""

EMBEDDING = "embedding"


class Stage:
    """State shared by the layers of this process: the context of the current pass, and the losses of the step."""

    def __init__(
        self, model: ModelConfig, attention: AttentionSection, placement: Placement, *, seed: int, aux_scale: float
    ) -> None:
        self.placement, self.aux_scale = placement, aux_scale
        self.dropout = Dropout.of(model, seed=seed)
        self._contexts = Contexts(model, attention, placement.sequence)
        self._last: tuple[Tensor, LayerContexts, Drops | None] | None = None
        self.per_target = 1.0
        self.losses: list[Tensor] = []  # loss sum of each pass
        self.scored: list[ByToken] = []  # of each pass of an evaluation
        self.aux_losses: list[Tensor] = []

    def of_pass(self, inputs: Inputs, *, training: bool) -> tuple[LayerContexts, Drops | None]:
        """The contexts and dropout, built once per pass. A pass is identified by its tokens, which all layers share."""
        x, tokens, _, *others = inputs
        if self._last is None or self._last[0] is not tokens:
            drops = None
            if self.dropout is not None:
                keys, *others = others
                if training:
                    start = self.placement.sequence.index * tokens.shape[1]
                    drops = self.dropout.of_pass(keys, tokens, start=start)
            contexts = self._contexts.of(tokens, others[0] if others else None, dtype=x.dtype)
            self._last = (tokens, contexts, drops)
        return self._last[1:]

    def reset(self) -> None:
        self._last, self.losses, self.scored, self.aux_losses = None, [], [], []


class Rows(nn.Module):
    """Base of embedding and head: this rank's rows of the matrix `name` [V, d], and of the head's bias with `head`."""

    def __init__(self, model: ModelConfig, name: str, *, head: bool, vocab_size: int, seed: int, stage: Stage) -> None:
        super().__init__()
        self.register_parameter(name, parameter(vocab_size, model.width))
        self.register_parameter("head_bias", parameter(vocab_size) if head and model.head_bias else None)
        self.init_stds = {name: model.init_std, "head_bias": 0.0}
        self.name, self.stage = name, stage
        initialise(self, seed=seed)
        shards = vocabulary_shards(model, vocab_size)
        cut(self, {own: shards[own] for own, _ in self.named_parameters()}, stage.placement.ranks)

    @property
    def bias(self) -> Tensor | None:
        return self._parameters["head_bias"]

    @property
    def weight(self) -> Tensor:
        return self.get_parameter(self.name)


class EmbeddingLayer(Rows):
    """The first layer. With tied embeddings, its rows are also those of the head; the last stage adds the bias."""

    def forward(self, inputs: Inputs) -> Inputs:
        return (embed(self.weight, inputs[0], self.stage.placement.ranks), *inputs)


class HeadLayer(Rows):
    """An untied head."""

    def forward(self, inputs: Inputs) -> Tensor:
        return loss(self, inputs)


def loss(layer: Rows, inputs: Inputs) -> Tensor:
    """The micro-batch's contribution to the mean loss of the global batch. Records its sums on the stage."""
    hidden, _, labels, *_ = inputs
    stage = layer.stage
    loss_sum, by_token = score(hidden, layer.weight, labels, stage.placement, bias=layer.bias)
    if torch.is_grad_enabled():
        loss_sum = passing("step:loss", loss_sum)
    if by_token is not None:
        stage.scored.append(by_token)
    stage.losses.append(loss_sum.detach().double())
    return loss_sum * stage.per_target


class BlockLayer(nn.Module):
    """One block of the decoder. The first one adds the learned positions, which are not tied as the embedding is, and
    drops the embedding.
    """

    def __init__(
        self,
        model: ModelConfig,
        attention: AttentionConfig,
        index: int,
        *,
        seed: int,
        stage: Stage,
        scale: BranchScale | None = None,
    ) -> None:
        super().__init__()
        self.block = make_block(model, attention, index, seed=seed, placement=stage.placement, scale=scale)
        self.index, self.stage = index, stage
        self.positions = make_positions(model) if index == 0 else None
        if self.positions is not None:
            initialise(self.positions, seed=seed, prefix="positions.")

    def forward(self, inputs: Inputs) -> Inputs:
        x, tokens, *others = inputs
        stage = self.stage
        if self.positions is not None:
            x = add_positions(self.positions, x, tokens, stage.placement)
        contexts, drops = stage.of_pass(inputs, training=self.training)
        if self.index == 0:
            x = drop(drops, x, "embedding", stage.placement)
        own = None if drops is None else drops.at(self.index)
        x, aux_loss, handed = run_block(self.block, x, contexts.at(self.index), stage.placement, own)
        contexts.hand_on(self.index, handed)
        if aux_loss is not None and torch.is_grad_enabled():
            stage.aux_losses.append(aux_loss.detach())
            x = _WithLoss.apply(x, aux_loss, stage.aux_scale)
        return x, tokens, *others


class NormLayer(nn.Module):
    """The norm before the head, and dropout of the head's input."""

    def __init__(self, model: ModelConfig, *, seed: int, stage: Stage) -> None:
        super().__init__()
        self.norm, self.stage = make_norm(model), stage
        self.norm.use(stage.placement.operations)
        initialise(self, seed=seed)

    def forward(self, inputs: Inputs) -> Inputs:
        _, drops = self.stage.of_pass(inputs, training=self.training)
        return (drop(drops, self.norm(inputs[0]), "head", self.stage.placement), *inputs[1:])


class _WithLoss(torch.autograd.Function):
    """Returns x. In the backward pass, `loss` gets the gradient `scale`, as if it were added to the final loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.gradient = loss.new_full((), scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.gradient, None


class _Stages(PipelineModule):
    """DeepSpeed's pipeline with given bounds. Its own partition balances parameters or layers, not FLOPs."""

    def __init__(self, layers: list[Any], bounds: list[int], **options: Any) -> None:
        self._bounds = bounds
        super().__init__(layers, **options)

    def _partition_layers(self, method: str = "uniform") -> None:
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class PipelineEngine(ZeroEngine):
    """The engine for pipeline parallelism.

    `bounds`: the first layer of each stage, then the number of layers, for the layers [embedding, blocks, norm, head].
    """

    def __init__(
        self,
        model: ModelConfig,
        attention: AttentionSection,
        *,
        vocab_size: int,
        seed: int,
        placement: Placement,
        bounds: list[int],
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        layout: Layout,
        micro_batch: int,
        accumulation: int,
        scales: Sequence[BranchScale] | None = None,
    ) -> None:
        self.layout, self.accumulation = layout, accumulation
        # DeepSpeed divides the loss by the number of micro-batches; the auxiliary losses must be divided as well.
        self._stage = Stage(model, attention, placement, seed=seed, aux_scale=1 / (accumulation * layout.tp_size))
        self._dropout = self._stage.dropout
        layers = self._layers(model, attention, scales, vocab_size=vocab_size, seed=seed)
        topology = PipeModelDataParallelTopology(num_pp=layout.pp_size, num_mp=layout.tp_size, num_dp=layout.data_ranks)
        with contextlib.redirect_stdout(sys.stderr):
            stages = _Stages(layers, bounds, topology=topology, seed_layers=False)
        for layer in stages.modules():
            # DeepSpeed leaves the last stage's copy of a tied module out of the gradient norm. The bias is no copy.
            if isinstance(layer, Rows) and layer.bias is not None:
                layer.bias.ds_pipe_replicated = False  # pyright: ignore[reportAttributeAccessIssue]
        self.blocks = {layer.index: layer.block for layer in stages.children() if isinstance(layer, BlockLayer)}
        self._logical = self._named(stages, model, vocab_size)
        self._start(stages, parallel, optimizer, micro_batch)

    def _layers(
        self,
        model: ModelConfig,
        attention: AttentionSection,
        scales: Sequence[BranchScale] | None,
        *,
        vocab_size: int,
        seed: int,
    ) -> list[Any]:
        options: dict[str, Any] = {"vocab_size": vocab_size, "seed": seed, "stage": self._stage}
        tied = model.tied_embeddings
        first: Any = LayerSpec(EmbeddingLayer, model, EMBEDDING, head=False, **options)
        last: Any = LayerSpec(HeadLayer, model, "head", head=True, **options)
        if tied:
            # Each stage builds the module from the first specification of its own layers.
            first = TiedLayerSpec(
                EMBEDDING, EmbeddingLayer, model, EMBEDDING, head=False, tied_weight_attr=EMBEDDING, **options
            )
            last = TiedLayerSpec(
                EMBEDDING,
                EmbeddingLayer,
                model,
                EMBEDDING,
                head=True,
                forward_fn=loss,
                tied_weight_attr=EMBEDDING,
                **options,
            )
        mechanisms = layer_configs(model, attention, vocab_size=vocab_size)
        blocks = [
            LayerSpec(BlockLayer, model, mechanism, i, seed=seed, stage=self._stage, scale=scale)
            for i, (mechanism, scale) in enumerate(zip(mechanisms, scales or repeat(None), strict=False))
        ]
        return [first, *blocks, LayerSpec(NormLayer, model, seed=seed, stage=self._stage), last]

    def _named(self, stages: nn.Module, model: ModelConfig, vocab_size: int) -> list[LogicalParameter]:
        """The stage's parameters under their single-device names."""
        logical = []
        for layer in stages.modules():
            if isinstance(layer, Rows):
                shards = vocabulary_shards(model, vocab_size)
                for name, p in layer.named_parameters():
                    copy = name == EMBEDDING and self.layout.pp_rank > 0
                    logical.append(LogicalParameter(name, p, shards[name], copy))
            elif isinstance(layer, BlockLayer):
                for name, p in layer.block.named_parameters():
                    shard = layer.block.shards.get(name)
                    logical.append(LogicalParameter(f"blocks.{layer.index}.{name}", p, shard))
                if layer.positions is not None:
                    logical.append(LogicalParameter("positions.weight", layer.positions.weight, None))
            elif isinstance(layer, NormLayer):
                logical += [LogicalParameter(name, p, None) for name, p in layer.named_parameters()]
        return logical

    def _grid(self) -> None:
        """None, because DeepSpeed's pipeline has its own grid."""
        return None

    def _passes(self, micro: Sequence[MicroBatch], per_target: float) -> bool:
        self._summed = None
        self._stage.reset()
        self._stage.per_target = per_target
        self._engine.train_batch(self._iterator(micro))
        self._engine.timers(TRAIN_BATCH_TIMER).reset()  # it stores a record per step, on CUDA with two events
        return False

    def _own_losses(self) -> Tensor:
        aux = [t.double() for t in self._stage.aux_losses]
        zero = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        # Each rank's auxiliary loss is the mean over its own groups.
        return torch.stack([self._lead_sum(), sum(aux, zero) / self.layout.tp_size])

    def last_losses(self) -> list[float]:
        return [float(loss_sum) for loss_sum in self._stage.losses]

    def _scored(self, micro: Sequence[MicroBatch]) -> list[ByToken | None]:
        self._stage.reset()
        # Stages exchange activation shapes only once, but those of an evaluation may differ from training.
        self._engine.reset_activation_shape()
        self._engine.eval_batch(
            self._iterator(micro), reduce_output=None, bcast_loss=False, num_micro_batches=len(micro)
        )
        self._engine.reset_activation_shape()
        self._engine.module.train()
        return [*self._stage.scored] or [None] * len(micro)

    def _lead_sum(self) -> Tensor:
        """Loss sum of this rank's micro-batches; zero except on one of the ranks that compute the same loss."""
        if not self._stage.losses or self.layout.tp_rank:
            return torch.zeros((), dtype=torch.float64, device=self.layout.device)
        return torch.stack(self._stage.losses).sum()

    def _iterator(self, micro: Sequence[MicroBatch]) -> Any:
        for index, batch in enumerate(micro):
            tokens, labels, *segments = self._transfer.take(batch, self._host_inputs(batch))
            inputs = (tokens, labels, *self._dropout_keys(index, batch), *segments)
            yield inputs, labels  # DeepSpeed expects labels for the last stage; ours are also in `inputs`

    def _host_inputs(self, batch: MicroBatch) -> list[Tensor]:
        """With the segments, which stages send to each other."""
        return [*super()._host_inputs(batch), *([] if batch.segments is None else [batch.segments])]
