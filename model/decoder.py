"""The decoder: token embedding, pre-norm blocks of attention and MLP, final norm, output head.

Legend: B batch, S sequence, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels.fp8 import Fp8Parameter, check_used, to_fp8
from headway.kernels.loss import IGNORED, VocabularyPart, linear_cross_entropy_by_token
from headway.kernels.operations import POINTWISE, Operations
from headway.model.base import (
    Attention,
    AttentionConfig,
    AttentionOutput,
    AttentionSection,
    Context,
    Ranks,
    SequenceRanks,
    Shard,
)
from headway.model.config import ModelConfig
from headway.model.contexts import Contexts
from headway.model.cost import layer_configs, relative_form
from headway.model.dropout import Dropout, DropPlace, Drops
from headway.model.init import initialise
from headway.model.kv_cache import KVCache
from headway.model.layers import (
    MLPS,
    OutputBias,
    Positions,
    RelativePositions,
    make_add_norm,
    make_norm,
    parameter,
    use_operations,
)
from headway.model.recompute import recomputed
from headway.model.router import Router
from headway.model.selective import SelectiveRecompute
from headway.model.shard import cut, cut_attention

Recompute = Literal["none", "selective", "block"]


class ByToken(NamedTuple):
    """Loss of each token of this rank's part of the sequences, and whether its label is the argmax of the logits."""

    losses: Tensor  # [B, S] fp32, nats; 0 without a target
    hits: Tensor  # [B, S] bool


class ModelOutput(NamedTuple):
    """Output for a micro-batch. In training, divide `loss_sum` by the targets of the global batch, not by `targets`."""

    loss_sum: Tensor  # fp32 scalar: sum of the cross entropy (nats) over targets
    targets: Tensor  # int64 scalar: number of labels that are not -100
    aux_loss: Tensor  # fp32 scalar: sum over layers of auxiliary losses with coefficients; mean over sequences
    by_token: ByToken | None = None  # None if gradients are enabled


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Parallel ranks, activation recomputation and kernels of a model.

    ranks: Tensor-parallel ranks.
    sequence: Context-parallel ranks.
    recompute: Activations kept for the backward pass. block: a block's input and its routing only; selective: all
        except the outputs of norms and of the MLP's activation function; none: all.
    operations: Kernels of the layers.
    """

    ranks: Ranks = field(default_factory=Ranks)
    sequence: SequenceRanks = field(default_factory=SequenceRanks)
    recompute: Recompute = "none"
    operations: Operations = field(default_factory=Operations)


class BranchScale(NamedTuple):
    """Factors on the initial output matrices of a block's two residual branches."""

    attention: float = 1.0
    mlp: float = 1.0


class Block(nn.Module):
    """One block: x = x + attention(norm(x)), then x = x + mlp(norm(x)).

    `shards` names the parameters that tensor parallelism shards. All others are replicated.
    """

    def __init__(self, model: ModelConfig, attention: AttentionConfig) -> None:
        super().__init__()
        width, layers, std, eps = model.width, model.layers, model.init_std, model.norm_eps
        self.attn_norm = make_norm(model)
        self.attn: Attention = attention.build(width=width, layers=layers, init_std=std, norm_eps=eps)
        form = relative_form(model, attention)
        relative = None if form is None else RelativePositions(form, attention.head_dim, width, init_std=std)
        self.attn_positions = relative
        self.attn_out = OutputBias(width) if attention.output_bias else None
        self.mlp_norm = make_add_norm(model)
        self.mlp = MLPS[model.mlp](width, model.ffn_width, layers=layers, init_std=std, biases=model.mlp_biases)
        self.mlp_out = OutputBias(width) if model.mlp_biases else None
        self.placement = Placement()
        self.selective: SelectiveRecompute | None = None
        self.compiled: Callable[[Block, Tensor, Context, Drops | None], AttentionOutput] | None = None
        self._fp8: list[tuple[str, Fp8Parameter]] | None = None
        self._attention_shards = attention.shards()

    @property
    def shards(self) -> dict[str, Shard]:
        parts = {"attn": self._attention_shards, "mlp": self.mlp.shards}
        if self.attn_positions is not None:
            parts["attn_positions"] = self.attn_positions.shards
        return {f"{part}.{name}": shard for part, shards in parts.items() for name, shard in shards.items()}

    @torch.no_grad()
    def scale_outputs(self, scale: BranchScale) -> None:
        """Multiply the output matrices of both branches, and so what the block adds to x. Before `place`."""
        for branch, factor in ((self.attn, scale.attention), (self.mlp, scale.mlp)):
            for name in branch.output_matrices if factor != 1 else ():
                branch.get_parameter(name).mul_(factor)

    def place(self, placement: Placement) -> None:
        """Shard an initialized block to this rank's part and set its operations."""
        self.placement = placement
        operations = placement.operations
        if placement.recompute == "selective":
            self.selective = again = SelectiveRecompute()
            names = ("norm", "add_norm", "layer_norm", "add_layer_norm", *POINTWISE)
            pieces = {name: again.piece(getattr(operations, name)) for name in names}
            operations = replace(operations, **pieces)
        use_operations(self, operations)
        use_operations(self.attn, placement.operations)  # QK-norm outputs are rotated and not kept: do not recompute
        cut(self.mlp, self.mlp.shards, placement.ranks)
        cut_attention(self.attn, self._attention_shards, placement.ranks)
        if self.attn_positions is not None:
            cut(self.attn_positions, self.attn_positions.shards, placement.ranks)

    def matrices(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The matrices of the MLP and of attention's projections, with names. Not those of routers and gates.

        A matrix of attention that is not declared as one of the latter is a projection, whatever its name.
        """
        routers = tuple(f"{name}." for name, child in self.attn.named_modules() if isinstance(child, Router))
        for name, matrix in self.attn.named_parameters():
            if matrix.dim() == 2 and name not in self.attn.gate_matrices and not name.startswith(routers):
                yield f"attn.{name}", matrix
        for name, matrix in self.mlp.named_parameters():
            if matrix.dim() == 2:
                yield f"mlp.{name}", matrix

    def with_positions(self, context: Context) -> Context:
        """The context of this layer's attention: with its position keys, if scores depend on distances."""
        if self.attn_positions is None:
            return context
        assert context.distances is not None, "`Contexts` of a model with relative positions has them"
        return replace(context, relative=self.attn_positions(context.distances))

    def forward(self, x: Tensor, context: Context, drops: Drops | None = None) -> AttentionOutput:
        """drops: dropout of this layer; None outside of training."""
        if self.compiled is not None and self.training and torch.is_grad_enabled():
            return self.compiled(self, x, context, drops)
        if self.placement.operations.fp8 is None or self._fp8 is not None:
            return self.plain(x, context, drops)
        self._fp8 = to_fp8(self.matrices(), self.placement.operations.fp8)
        out = self.plain(x, context, drops)
        check_used(self._fp8)
        return out

    def plain(self, x: Tensor, context: Context, drops: Drops | None) -> AttentionOutput:
        """The pass itself, which `compiled` replaces in training."""
        enter, leave = self.placement.ranks.enter, self.placement.ranks.leave
        with self.selective or nullcontext():
            context = self.with_positions(context)
            y, aux_loss, handed = self.attn(enter(self.attn_norm(x)), context)
            y = leave(y)
            y = y if self.attn_out is None else self.attn_out(y)
            x, normed = self.mlp_norm(x, drop(drops, y, "attention", self.placement))
            hidden = partial(drop, drops, place="hidden", placement=self.placement)
            z = leave(self.mlp(enter(normed), hidden))
            z = z if self.mlp_out is None else self.mlp_out(z)
            return AttentionOutput(x + drop(drops, z, "mlp", self.placement), aux_loss, handed)


def make_block(
    model: ModelConfig,
    attention: AttentionConfig,
    index: int,
    *,
    seed: int,
    placement: Placement,
    scale: BranchScale | None = None,
) -> Block:
    """Build and initialize this rank's part of block `index`. `attention` is the config of that layer."""
    block = Block(model, attention)
    initialise(block, seed=seed, prefix=f"blocks.{index}.")
    if scale is not None:
        block.scale_outputs(scale)
    block.place(placement)
    return block


def run_block(
    block: nn.Module, x: Tensor, context: Context, placement: Placement, drops: Drops | None = None
) -> AttentionOutput:
    """Run a block. With `recompute: block`, its activations are recomputed in the backward pass."""
    if placement.recompute == "block" and torch.is_grad_enabled():
        return recomputed(block, x, context, drops)
    return block(x, context, drops)


class DecoderCache:
    """State of incremental decoding: the KV cache of every layer and the number of cached tokens."""

    def __init__(self, layers: int, tokens: int = 0) -> None:
        self.layers = [KVCache(tokens) for _ in range(layers)]
        self.tokens = 0

    @property
    def numbers(self) -> int:
        """Elements of the cached tokens, over layers and batch."""
        return sum(layer.numbers for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the cached tokens, over layers and batch."""
        return sum(layer.nbytes for layer in self.layers)

    def select(self, rows: Tensor) -> None:
        """Continue with these rows of the batch, as `KVCache.select`."""
        for layer in self.layers:
            layer.select(rows)

    def repeated(self, count: int, room: int) -> DecoderCache:
        """A copy for `count` sequences that continue the one that is cached here, by `room` tokens each."""
        copy = DecoderCache(0)
        copy.layers = [layer.repeated(count, room) for layer in self.layers]
        copy.tokens = self.tokens
        return copy


class Decoder(nn.Module):
    """The decoder. Initial parameters depend only on `seed`, their names and shapes (`headway.model.init`), and on
    `scales`, one for each block.

    `embedding` [V, d], `head` [V, d] unless tied, and `head_bias` [V] if the model has one are parameters of this
    module itself. Engines that shard parameters (ZeRO-3) gather them in the forward pass of the module that owns them,
    which is where the head's matmul runs.
    """

    def __init__(
        self,
        model: ModelConfig,
        attention: AttentionSection,
        *,
        vocab_size: int,
        seed: int,
        placement: Placement | None = None,
        scales: Sequence[BranchScale] | None = None,
    ) -> None:
        super().__init__()
        self.attention, self.placement = attention, placement or Placement()
        mechanisms = layer_configs(model, attention, vocab_size=vocab_size)
        self.embedding = parameter(vocab_size, model.width)
        self.positions = make_positions(model)
        self.blocks = nn.ModuleList()
        self.norm = make_norm(model)
        self.norm.use(self.placement.operations)
        self.head = None if model.tied_embeddings else parameter(vocab_size, model.width)
        self.head_bias = parameter(vocab_size) if model.head_bias else None
        self.init_stds = {"embedding": model.init_std, "head": model.init_std, "head_bias": 0.0}
        initialise(self, seed=seed)
        self._vocabulary_shards = vocabulary_shards(model, vocab_size)
        cut(self, self._vocabulary_shards, self.placement.ranks)
        # Build, initialize and shard one block at a time, so that a rank holds at most its part plus one full block.
        for i, mechanism in enumerate(mechanisms):
            scale = None if scales is None else scales[i]
            self.blocks.append(make_block(model, mechanism, i, seed=seed, placement=self.placement, scale=scale))
        self._contexts = Contexts(model, attention, self.placement.sequence)
        self.dropout = Dropout.of(model, seed=seed)

    @property
    def shards(self) -> dict[str, Shard]:
        """Parameters that tensor parallelism shards."""
        shards = dict(self._vocabulary_shards)
        for i, block in enumerate(self.blocks):
            if isinstance(block, Block):
                shards |= {f"blocks.{i}.{name}": shard for name, shard in block.shards.items()}
        return shards

    def forward(
        self, tokens: Tensor, labels: Tensor, segments: Tensor | None = None, keys: Tensor | None = None
    ) -> ModelOutput:
        """tokens, labels [B, S] (label -100: no target); segments [B, S]: document index, ascending; None for one
        document per sequence. keys [B]: of dropout (`Dropout.keys`), in training only; None: those of the first
        sequences of a run.

        With context parallelism, tokens and labels are this rank's part; segments cover the whole sequence.
        """
        hidden, aux_loss = self._hidden(tokens, segments, drops=self._drops(tokens, keys))
        return self._scored(hidden, labels, aux_loss)

    def logits_and_loss(
        self, tokens: Tensor, labels: Tensor | None, keys: Tensor | None = None
    ) -> tuple[Tensor, ModelOutput | None]:
        """Logits [B, S, V], and what `forward` returns (None without labels), of one pass with one document each."""
        hidden, aux_loss = self._hidden(tokens, None, drops=self._drops(tokens, keys))
        logits = F.linear(hidden, self._head_weight(), self.head_bias)
        return logits, None if labels is None else self._scored(hidden, labels, aux_loss)

    def logits(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        *,
        cache: DecoderCache | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits [B, S, V] in the model's dtype; with `last`, those of the last token only, [B, 1, V].

        With a `cache`, the tokens continue the cached ones and are appended to it.
        """
        hidden = self.hidden(tokens, segments, cache=cache)
        return self.project(hidden[:, -1:] if last else hidden)

    def hidden(self, tokens: Tensor, segments: Tensor | None = None, *, cache: DecoderCache | None = None) -> Tensor:
        """What the head projects, [B, S, d], without dropout. With a `cache`: as in `logits`."""
        return self._hidden(tokens, segments, cache)[0]

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., d]."""
        return F.linear(hidden, self._head_weight(), self.head_bias)

    def new_cache(self, tokens: int = 0) -> DecoderCache:
        """An empty cache for one batch of sequences of equal length: of `tokens` tokens at most, if that is known."""
        return DecoderCache(len(self.blocks), tokens)

    def before_step(self, tokens: int) -> None:
        """Update the schedules of all layers. Call it before each optimizer step and after loading.

        `tokens`: training tokens so far.
        """
        for layer in self.attention_layers():
            layer.before_step(tokens)

    def attention_layers(self) -> list[Attention]:
        """The attention module of each block, first to last."""
        return [block.attn for block in self.blocks if isinstance(block, Block)]

    def _hidden(
        self,
        tokens: Tensor,
        segments: Tensor | None,
        cache: DecoderCache | None = None,
        drops: Drops | None = None,
    ) -> tuple[Tensor, Tensor]:
        if cache is not None and segments is not None:
            raise ValueError(
                "segments: a cache holds one document per sequence; pass one document per sequence, or no cache"
            )
        x = embed(self.embedding, tokens, self.placement.ranks)
        start = 0 if cache is None else cache.tokens
        if self.positions is not None:
            x = add_positions(self.positions, x, tokens, self.placement, start=start)
        x = drop(drops, x, "embedding", self.placement)
        contexts = self._contexts.of(tokens, segments, dtype=x.dtype, start=start)
        aux_loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for i, block in enumerate(self.blocks):
            dropped = None if drops is None else drops.at(i)
            context = contexts.at(i, None if cache is None else cache.layers[i])
            x, aux, handed = run_block(block, x, context, self.placement, dropped)
            contexts.hand_on(i, handed)
            if aux is not None:
                aux_loss = aux_loss + aux
        if cache is not None:
            cache.tokens += tokens.shape[1]
        return drop(drops, self.norm(x), "head", self.placement), aux_loss

    def _drops(self, tokens: Tensor, keys: Tensor | None) -> Drops | None:
        """Dropout of a pass with these tokens [B, S]; None outside of training."""
        if self.dropout is None or not self.training:
            return None
        if keys is None:
            keys = self.dropout.keys(tokens=0, first=0, count=len(tokens), device=tokens.device)
        return self.dropout.of_pass(keys, tokens, start=self.placement.sequence.index * tokens.shape[1])

    def _scored(self, hidden: Tensor, labels: Tensor, aux_loss: Tensor) -> ModelOutput:
        loss_sum, by_token = score(hidden, self._head_weight(), labels, self.placement, bias=self.head_bias)
        return ModelOutput(loss_sum, (labels != IGNORED).sum(), aux_loss, by_token)

    def _head_weight(self) -> Tensor:
        return self.embedding if self.head is None else self.head


def make_positions(model: ModelConfig) -> Positions | None:
    """The learned positions, not initialized; None if the model has none."""
    return Positions(model.learned_positions, model.width, init_std=model.init_std) if model.learned_positions else None


def add_positions(positions: Positions, x: Tensor, tokens: Tensor, placement: Placement, *, start: int = 0) -> Tensor:
    """Add the vectors of the tokens' positions to x [B, S, d], or to this rank's part of the residual stream.

    tokens [B, S]: this rank's part of the sequences, the first one at position `start` of that part.
    """
    start += placement.sequence.index * tokens.shape[1]
    if x.shape[1] < tokens.shape[1]:  # sequence parallelism: each tensor-parallel rank holds a part
        start += placement.ranks.index * x.shape[1]
    return x + positions(start, x.shape[1])


def drop(drops: Drops | None, x: Tensor, place: DropPlace, placement: Placement) -> Tensor:
    """x with dropout of this place (`headway.model.dropout`); unchanged outside of training."""
    return x if drops is None else drops.of(x, place, ranks=placement.ranks, dropout=placement.operations.dropout)


def vocabulary_shards(model: ModelConfig, vocab_size: int) -> dict[str, Shard]:
    """Shards of the embedding, the head (unless tied) and its bias: by rows, one unit per token of the vocabulary."""
    held = {"embedding": True, "head": not model.tied_embeddings, "head_bias": model.head_bias}
    return {name: Shard(0, vocab_size) for name, present in held.items() if present}


def embed(weight: Tensor, tokens: Tensor, ranks: Ranks) -> Tensor:
    """weight [V, d] (or this rank's rows), tokens [B, S] -> [B, S, d], or this rank's part of the residual stream."""
    if ranks.count == 1:
        return F.embedding(tokens, weight)
    row = tokens - ranks.index * len(weight)
    mine = (row >= 0) & (row < len(weight))
    return ranks.leave(F.embedding(row.where(mine, 0), weight) * mine.unsqueeze(-1))


def score(
    hidden: Tensor, weight: Tensor, labels: Tensor, placement: Placement, *, bias: Tensor | None = None
) -> tuple[Tensor, ByToken | None]:
    """Cross-entropy sum and, if gradients are disabled, that of each token, over the whole vocabulary.

    hidden [B, S, d], or this rank's part of the residual stream; weight [V, d] and bias [V], or this rank's rows;
    labels [B, S].
    """
    part, ranks = None, placement.ranks
    if ranks.count > 1:
        part = VocabularyPart(start=ranks.index * len(weight), sum=ranks.sum, largest=ranks.largest)
    head = (ranks.enter(hidden).flatten(0, 1), weight, labels.flatten())
    extra = {} if bias is None else {"bias": bias}  # only the chunked loss supports one
    if torch.is_grad_enabled():
        return placement.operations.loss(*head, part=part, **extra), None
    losses, hits = (found.view_as(labels) for found in linear_cross_entropy_by_token(*head, part=part, bias=bias))
    return losses.sum(), ByToken(losses, hits)
