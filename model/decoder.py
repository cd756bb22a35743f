"""The decoder: pre-norm blocks of attention and SwiGLU between an embedding and a head.

Legend: B batch, S sequence, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels.loss import IGNORED, VocabularyPart, linear_cross_entropy_and_hits
from headway.kernels.operations import Operations
from headway.kernels.rope import rope_tables
from headway.model.base import (
    Attention,
    AttentionConfig,
    AttentionOutput,
    Context,
    KVCache,
    Ranks,
    SequenceRanks,
    Shard,
)
from headway.model.config import ModelConfig
from headway.model.cost import layer_configs
from headway.model.init import initialise
from headway.model.layers import AddNorm, RMSNorm, SwiGLU, parameter, use_operations
from headway.model.recompute import recomputed
from headway.model.selective import SelectiveRecompute
from headway.model.shard import cut, cut_attention

Recompute = Literal["none", "selective", "block"]


class ModelOutput(NamedTuple):
    """A forward pass over a micro-batch. Divide `loss_sum` by the targets of the whole global batch, not by its own."""

    loss_sum: Tensor  # fp32 scalar: sum of the cross entropy (nats) over targets
    targets: Tensor  # int64 scalar: labels that are not -100
    aux_loss: Tensor  # fp32 scalar: sum over layers of the routers' losses with their coefficients, mean over sequences
    hits: Tensor | None = None  # int64 scalar: targets whose largest logit is the label's; None where gradients are on


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Who shares a model's layers and its sequences, and by which operations layers compute.

    `recompute` block: a block keeps its input and routing alone; selective: all but what its norms and SwiGLU's product
    give.
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
    """x + attention(norm x), then + mlp(norm x).

    `shards` names the parameters that are cut over tensor-parallel ranks; all others are whole on each of them.
    """

    def __init__(self, model: ModelConfig, attention: AttentionConfig) -> None:
        super().__init__()
        width, layers, std, eps = model.width, model.layers, model.init_std, model.norm_eps
        self.attn_norm = RMSNorm(width, eps)
        self.attn: Attention = attention.build(width=width, layers=layers, init_std=std, norm_eps=eps)
        self.mlp_norm = AddNorm(width, eps)
        self.mlp = SwiGLU(width, model.ffn_width, layers=layers, init_std=std)
        self.placement = Placement()
        self.selective: SelectiveRecompute | None = None
        self._attention_shards = attention.shards()

    @property
    def shards(self) -> dict[str, Shard]:
        parts = {"attn": self._attention_shards, "mlp": self.mlp.shards}
        return {f"{part}.{name}": shard for part, shards in parts.items() for name, shard in shards.items()}

    @torch.no_grad()
    def scale_outputs(self, scale: BranchScale) -> None:
        """Multiply the output matrices of both branches, and so what the block adds to x. Before `place`."""
        for branch, factor in ((self.attn, scale.attention), (self.mlp, scale.mlp)):
            for name in branch.output_matrices if factor != 1 else ():
                branch.get_parameter(name).mul_(factor)

    def place(self, placement: Placement) -> None:
        """Keep this rank's part of an initialised block."""
        self.placement = placement
        operations = placement.operations
        if placement.recompute == "selective":
            self.selective = again = SelectiveRecompute()
            pieces = {name: again.piece(getattr(operations, name)) for name in ("norm", "add_norm", "silu_mul")}
            operations = replace(operations, **pieces)
        use_operations(self, operations)
        use_operations(self.attn, placement.operations)  # what its own norms give is rotated, and not kept
        cut(self.mlp, self.mlp.shards, placement.ranks)
        cut_attention(self.attn, self._attention_shards, placement.ranks)

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        enter, leave = self.placement.ranks.enter, self.placement.ranks.leave
        with self.selective or nullcontext():
            y, aux_loss = self.attn(enter(self.attn_norm(x)), context)
            x, normed = self.mlp_norm(x, leave(y))
            return AttentionOutput(x + leave(self.mlp(enter(normed))), aux_loss)


def make_block(
    model: ModelConfig,
    attention: AttentionConfig,
    index: int,
    *,
    seed: int,
    placement: Placement,
    scale: BranchScale | None = None,
) -> Block:
    """Block `index` with initial parameters, those of this rank; `attention` is the config of that layer."""
    block = Block(model, attention)
    initialise(block, seed=seed, prefix=f"blocks.{index}.")
    if scale is not None:
        block.scale_outputs(scale)
    block.place(placement)
    return block


def run_block(block: nn.Module, x: Tensor, context: Context, placement: Placement) -> AttentionOutput:
    """The block's output; under `recompute: block` what it needs for the backward pass is computed again then."""
    if placement.recompute == "block" and torch.is_grad_enabled():
        return recomputed(block, x, context)
    return block(x, context)


class DecoderCache:
    """What incremental decoding carries on: every layer's keys and values, and how many tokens were taken in."""

    def __init__(self, layers: int) -> None:
        self.layers = [KVCache() for _ in range(layers)]
        self.tokens = 0

    @property
    def numbers(self) -> int:
        """Numbers held, over layers and batch."""
        return sum(layer.numbers for layer in self.layers)


class Decoder(nn.Module):
    """Parameters are a function of `seed` and their names (`headway.model.init`), and of `scales`, one for each block.

    `embedding` [V, d] and, where not tied, `head` [V, d] belong to this module itself: the head's product then happens
    inside the forward pass of the module that owns the matrix, which parameter-sharding engines rely on.
    """

    def __init__(
        self,
        model: ModelConfig,
        attention: AttentionConfig,
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
        self.blocks = nn.ModuleList()
        self.norm = RMSNorm(model.width, model.norm_eps)
        self.norm.use(self.placement.operations)
        self.head = None if model.tied_embeddings else parameter(vocab_size, model.width)
        self.init_stds = {"embedding": model.init_std, "head": model.init_std}
        initialise(self, seed=seed)
        self._vocabulary_shards = vocabulary_shards(model, vocab_size)
        cut(self, self._vocabulary_shards, self.placement.ranks)
        # One block is made, drawn and cut after the other: a rank never holds more than its part and one block.
        for i, mechanism in enumerate(mechanisms):
            scale = None if scales is None else scales[i]
            self.blocks.append(make_block(model, mechanism, i, seed=seed, placement=self.placement, scale=scale))
        self._contexts = Contexts(attention, self.placement.sequence)

    @property
    def shards(self) -> dict[str, Shard]:
        """Parameters that are cut over tensor-parallel ranks."""
        shards = dict(self._vocabulary_shards)
        for i, block in enumerate(self.blocks):
            if isinstance(block, Block):
                shards |= {f"blocks.{i}.{name}": shard for name, shard in block.shards.items()}
        return shards

    def forward(self, tokens: Tensor, labels: Tensor, segments: Tensor | None = None) -> ModelOutput:
        """tokens, labels [B, S] (-100: no target); segments [B, S] numbers the documents, None: one each.

        Where ranks share each sequence, tokens and labels are this rank's part and segments are those of the whole.
        """
        hidden, aux_loss = self._hidden(tokens, segments)
        loss_sum, hits = score(hidden, self._head_weight(), labels, self.placement)
        return ModelOutput(loss_sum, (labels != IGNORED).sum(), aux_loss, hits)

    def logits(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        *,
        cache: DecoderCache | None = None,
        last: bool = False,
    ) -> Tensor:
        """[B, S, V] in the model's dtype; `last`: of the last token alone, [B, 1, V].

        With a `cache` the tokens continue what it holds, and it takes them in.
        """
        hidden, _ = self._hidden(tokens, segments, cache)
        return F.linear(hidden[:, -1:] if last else hidden, self._head_weight())

    def new_cache(self) -> DecoderCache:
        """Empty; for one batch of sequences of equal length."""
        return DecoderCache(len(self.blocks))

    def before_step(self, tokens: int) -> None:
        """Tell every layer how many training tokens are done: before each optimizer step, and after loading."""
        for layer in self.attention_layers():
            layer.before_step(tokens)

    def attention_layers(self) -> list[Attention]:
        """From the first block to the last."""
        return [block.attn for block in self.blocks if isinstance(block, Block)]

    def _hidden(
        self, tokens: Tensor, segments: Tensor | None, cache: DecoderCache | None = None
    ) -> tuple[Tensor, Tensor]:
        if cache is not None and segments is not None:
            raise ValueError(
                "segments: a cache holds one document per sequence; give documents one by one, or no cache"
            )
        x = embed(self.embedding, tokens, self.placement.ranks)
        context = self._contexts.of(tokens, segments, x.dtype, start=0 if cache is None else cache.tokens)
        aux_loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for i, block in enumerate(self.blocks):
            if cache is not None:
                context = replace(context, cache=cache.layers[i])
            x, aux = run_block(block, x, context, self.placement)
            if aux is not None:
                aux_loss = aux_loss + aux
        if cache is not None:
            cache.tokens += tokens.shape[1]
        return self.norm(x), aux_loss

    def _head_weight(self) -> Tensor:
        return self.embedding if self.head is None else self.head


class Contexts:
    """Makes what the blocks of a forward pass are given besides x; rotary tables are kept from pass to pass."""

    def __init__(self, attention: AttentionConfig, sequence: SequenceRanks) -> None:
        self._attention, self._sequence = attention, sequence
        # A plain attribute: a buffer would be cast with the module, and lose the phase of late positions in bf16.
        self._rope: tuple[Tensor, Tensor] | None = None

    def of(self, tokens: Tensor, segments: Tensor | None, dtype: torch.dtype, *, start: int = 0) -> Context:
        """tokens [B, S], whose first is at position `start` of the sequence, or of this rank's part of it; segments of
        the whole sequence.
        """
        mask = None if segments is None else document_mask(segments, dtype)
        rope = self._rope_tables(tokens, start + self._sequence.index * tokens.shape[1])
        return Context(rope=rope, mask=mask, tokens=tokens, sequence=self._sequence)

    def _rope_tables(self, tokens: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Rows of the positions start .. start + S - 1, of tables made once for the longest sequence seen."""
        end = start + tokens.shape[1]
        if self._rope is None or len(self._rope[0]) < end or self._rope[0].device != tokens.device:
            length = end if start == 0 else 2 * end  # decoding asks for one more each time
            self._rope = rope_tables(length, self._attention.rotated, self._attention.rope_base, tokens.device)
        return self._rope[0][start:end], self._rope[1][start:end]


def vocabulary_shards(model: ModelConfig, vocab_size: int) -> dict[str, Shard]:
    """Of the embedding and, where it is not the same matrix, the head: rows, one piece per token of the vocabulary."""
    return {name: Shard(0, vocab_size) for name in ("embedding", *(() if model.tied_embeddings else ("head",)))}


def embed(weight: Tensor, tokens: Tensor, ranks: Ranks) -> Tensor:
    """weight [V, d], or this rank's rows of it; tokens [B, S] -> [B, S, d], cut as the residual stream is."""
    if ranks.count == 1:
        return F.embedding(tokens, weight)
    row = tokens - ranks.index * len(weight)
    mine = (row >= 0) & (row < len(weight))
    return ranks.leave(F.embedding(row.where(mine, 0), weight) * mine.unsqueeze(-1))


def score(hidden: Tensor, weight: Tensor, labels: Tensor, placement: Placement) -> tuple[Tensor, Tensor | None]:
    """hidden [B, S, d] (cut as the residual stream is) -> loss sum and, where gradients are off, hits; both over all V.

    weight [V, d], or this rank's rows of it; labels [B, S].
    """
    part, ranks = None, placement.ranks
    if ranks.count > 1:
        part = VocabularyPart(start=ranks.index * len(weight), sum=ranks.sum, largest=ranks.largest)
    head = (ranks.enter(hidden).flatten(0, 1), weight, labels.flatten())
    if torch.is_grad_enabled():
        return placement.operations.loss(*head, part=part), None
    return linear_cross_entropy_and_hits(*head, part=part)


def document_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """segments [B, S] -> additive mask [B, 1, S, S]: 0 where a token may see another, -inf elsewhere.

    A token sees itself and the earlier tokens of its own document.
    """
    same = segments[:, :, None] == segments[:, None, :]
    visible = same.tril_()
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)
