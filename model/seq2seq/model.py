"""The encoder-decoder: an encoder whose tokens see each other, and a decoder with cross attention to its output.

    e = norm(encoder(source)),    logits = head(norm(decoder(target, e)))

Both read one embedding. Positions are rotary (self-attention of both stacks; cross attention has none) or the biases
of T5 (`headway.model.seq2seq.positions`), which also leaves the scores undivided by sqrt(D).

Documents: a token sees tokens of its own document only, also across. Document numbers are `segments`; -1 is padding of
the source, which no target token sees.

Legend: B batch, s source tokens, t target tokens, d width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels.dropout import stream
from headway.kernels.loss import IGNORED
from headway.kernels.visible import Visible, same_document, visible_core
from headway.model.base import Attention, AttentionConfig, Context, Shard, Source
from headway.model.config import ModelConfig
from headway.model.contexts import Contexts
from headway.model.decoder import (
    Block,
    ModelOutput,
    Placement,
    drop,
    embed,
    run_block,
    score,
    vocabulary_shards,
)
from headway.model.dropout import Dropout, Drops
from headway.model.init import initialise
from headway.model.kv_cache import KVCache, SourceCache
from headway.model.layers import make_norm, parameter
from headway.model.seq2seq.blocks import CrossBlock, make_stack_block
from headway.model.seq2seq.positions import RelativeBuckets
from headway.model.shard import cut


class SequenceCache:
    """State of incremental decoding: the encoder's output, and of each layer of the decoder the growing keys and values
    of its self-attention and the fixed ones of its cross attention.
    """

    def __init__(self, states: Tensor, segments: Tensor | None, layers: int, tokens: int = 0) -> None:
        self.states, self.segments = states, segments
        self.layers = [KVCache(tokens) for _ in range(layers)]
        self.across = [SourceCache() for _ in range(layers)]
        self.tokens = 0
        self._sources = torch.arange(len(states))  # number of the source of each row

    @property
    def numbers(self) -> int:
        """Elements of the cached keys and values, over layers and batch."""
        return sum(layer.numbers for layer in (*self.layers, *self.across))

    @property
    def nbytes(self) -> int:
        """Bytes of the cached keys and values, over layers and batch."""
        return sum(layer.nbytes for layer in (*self.layers, *self.across))

    def select(self, rows: Tensor) -> None:
        """Continue with these rows of the batch, as `KVCache.select`.

        Nothing of the sources is copied if each row keeps its source, as when the hypotheses of a beam search change
        places.
        """
        for layer in self.layers:
            layer.select(rows)
        before, self._sources = self._sources, self._sources[rows.cpu()]
        if self._sources.equal(before):
            return
        self.states = self.states[rows]
        if self.segments is not None:
            self.segments = self.segments[rows.to(self.segments.device)]
        for layer in self.across:
            layer.select(rows)


class EncoderDecoder(nn.Module):
    """The model of `model.type: encoder_decoder`. `attention` is the mechanism of every attention in it.

    Initial parameters depend only on `seed`, their names and shapes. Parameters: `embedding` [V, d], `head` [V, d]
    unless tied, `encoder.I` (`Block`), `encoder_norm`, `blocks.I` (`CrossBlock`), `norm`, and with relative positions
    `encoder_buckets` and `decoder_buckets`.
    """

    def __init__(
        self,
        model: ModelConfig,
        attention: AttentionConfig,
        *,
        vocab_size: int,
        seed: int,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        assert model.is_encoder_decoder, "`headway.model.decoder.Decoder` is the model of type decoder"
        if (reason := attention.no_encoder_decoder) is not None:
            raise ValueError(reason)
        self.attention, self.placement = attention, placement or Placement()
        self.embedding = parameter(vocab_size, model.width)
        self.encoder, self.blocks = nn.ModuleList(), nn.ModuleList()
        self.encoder_norm, self.norm = make_norm(model), make_norm(model)
        for norm in (self.encoder_norm, self.norm):
            norm.use(self.placement.operations)
        self.head = None if model.tied_embeddings else parameter(vocab_size, model.width)
        self.head_bias = parameter(vocab_size) if model.head_bias else None
        self.encoder_buckets = self._buckets(model, both_ways=True)
        self.decoder_buckets = self._buckets(model, both_ways=False)
        self.init_stds = {"embedding": model.init_std, "head": model.init_std, "head_bias": 0.0}
        initialise(self, seed=seed)
        self._own_shards = vocabulary_shards(model, vocab_size)
        for name in ("encoder_buckets", "decoder_buckets"):
            if (table := getattr(self, name)) is not None:
                self._own_shards |= {f"{name}.{own}": shard for own, shard in table.shards.items()}
        cut(self, self._own_shards, self.placement.ranks)
        common = {"seed": seed, "placement": self.placement}
        in_encoder = model.model_copy(update={"layers": model.encoder_blocks})
        for i in range(model.encoder_blocks):
            self.encoder.append(make_stack_block(Block, in_encoder, attention, f"encoder.{i}", **common))
        for i in range(model.layers):
            self.blocks.append(make_stack_block(CrossBlock, model, attention, f"blocks.{i}", **common))
        self._contexts = Contexts(model, attention, self.placement.sequence)
        self._scale = 1.0 if model.positions == "relative_t5" else None
        self._head_scale = model.width**-0.5 if model.scaled_head else None
        self.dropout = Dropout.of(model, seed=seed)
        if self.dropout is not None:
            self.dropout = replace(self.dropout, layers=model.encoder_blocks + 2 * model.layers)

    def _buckets(self, model: ModelConfig, *, both_ways: bool) -> RelativeBuckets | None:
        if model.positions != "relative_t5":
            return None
        return RelativeBuckets(
            self.attention.score_maps,
            self.attention.shards()["w_q"].units,
            count=model.relative_buckets,
            largest=model.relative_max_distance,
            both_ways=both_ways,
            init_std=model.init_std,
        )

    @property
    def shards(self) -> dict[str, Shard]:
        """Parameters that tensor parallelism shards."""
        shards = dict(self._own_shards)
        for stack in ("encoder", "blocks"):
            for i, block in enumerate(getattr(self, stack)):
                shards |= {f"{stack}.{i}.{name}": shard for name, shard in block.shards.items()}
        return shards

    def forward(
        self,
        source: Tensor,
        tokens: Tensor,
        labels: Tensor,
        source_segments: Tensor | None = None,
        segments: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> ModelOutput:
        """source [B, s], tokens and labels [B, t] (label -100: no target).

        source_segments [B, s], segments [B, t]: document numbers from 0, ascending, equal for the source and the target
        of a document; source_segments -1: padding; None: one document, number 0. keys [B]: of dropout, as in `Decoder`.
        """
        source_drops, drops = self._drops(source, tokens, keys)
        states, source_loss = self._encoded(source, source_segments, source_drops)
        hidden, aux_loss = self._decoded(states, tokens, source_segments, segments, drops=drops)
        loss_sum, by_token = score(hidden, self._head_weight(), labels, self.placement, bias=self.head_bias)
        return ModelOutput(loss_sum, (labels != IGNORED).sum(), source_loss + aux_loss, by_token)

    def encode(self, source: Tensor, source_segments: Tensor | None = None) -> Tensor:
        """The encoder's output [B, s, d], after its norm, without dropout."""
        return self._encoded(source, source_segments, None)[0]

    def logits(
        self,
        source: Tensor,
        tokens: Tensor,
        source_segments: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, t, V] of the target tokens; arguments as in `forward`."""
        return self.project(self.hidden(source, tokens, source_segments, segments))

    def hidden(
        self,
        source: Tensor,
        tokens: Tensor,
        source_segments: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """What the head projects, [B, t, d], without dropout; arguments as in `forward`."""
        return self._decoded(self.encode(source, source_segments), tokens, source_segments, segments)[0]

    def new_cache(self, source: Tensor, source_segments: Tensor | None = None, *, tokens: int = 0) -> SequenceCache:
        """Encode the sources [B, s] and return a cache for targets of `tokens` tokens at most, if that is known."""
        return SequenceCache(self.encode(source, source_segments), source_segments, len(self.blocks), tokens)

    def next_logits(self, tokens: Tensor, cache: SequenceCache) -> Tensor:
        """Logits [B, n, V] of tokens [B, n], which continue the cached targets and are appended to the cache."""
        hidden, _ = self._decoded(cache.states, tokens, cache.segments, None, cache=cache)
        return self.project(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., d]."""
        return F.linear(hidden, self._head_weight(), self.head_bias)

    def before_step(self, tokens: int) -> None:
        """As `Decoder.before_step`. The mechanisms with an encoder-decoder form have no schedules."""
        for layer in self.attention_layers():
            layer.before_step(tokens)

    def attention_layers(self) -> list[Attention]:
        """All attention modules: the encoder's, then self-attention and cross attention of each block."""
        found = [block.attn for block in self.encoder if isinstance(block, Block)]
        for block in self.blocks:
            if isinstance(block, CrossBlock):
                found += [block.attn, block.cross]
        return found

    def _encoded(self, source: Tensor, segments: Tensor | None, drops: Drops | None) -> tuple[Tensor, Tensor]:
        """The encoder's output, or this rank's part of it, and the auxiliary loss of its layers."""
        x = drop(drops, embed(self.embedding, source, self.placement.ranks), "embedding", self.placement)
        context = self._contexts.of(source, None, dtype=x.dtype).at(0)
        size = source.shape[1]
        seen = same_document(segments, segments, shape=(len(source), size, size))
        bias = None if self.encoder_buckets is None else self.encoder_buckets(size, size)
        visible = Visible.of(seen, x.device, bias=bias, scale=self._scale)
        context = replace(context, core=partial(visible_core, visible=visible))
        aux_loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for i, block in enumerate(self.encoder):
            x, aux, _ = run_block(block, x, context, self.placement, None if drops is None else drops.at(i))
            aux_loss = aux_loss if aux is None else aux_loss + aux
        return drop(drops, self.encoder_norm(x), "head", self.placement), aux_loss

    def _decoded(
        self,
        states: Tensor,
        tokens: Tensor,
        source_segments: Tensor | None,
        segments: Tensor | None,
        *,
        cache: SequenceCache | None = None,
        drops: Drops | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the head projects, [B, t, d], or this rank's part of it, and the auxiliary loss of the layers."""
        x = drop(drops, embed(self.embedding, tokens, self.placement.ranks), "embedding", self.placement)
        start = 0 if cache is None else cache.tokens
        context = self._own_context(tokens, segments, x.dtype, start)
        across = self._across_context(context, states, tokens, source_segments, segments)
        context = replace(context, across=across)
        aux_loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for i, block in enumerate(self.blocks):
            if cache is not None:
                assert across.source is not None
                own = replace(across, source=replace(across.source, cache=cache.across[i]))
                context = replace(context, cache=cache.layers[i], across=own)
            place = None if drops is None else drops.at(len(self.encoder) + 2 * i)
            x, aux, _ = run_block(block, x, context, self.placement, place)
            aux_loss = aux_loss if aux is None else aux_loss + aux
        if cache is not None:
            cache.tokens += tokens.shape[1]
        hidden = drop(drops, self.norm(x), "head", self.placement)
        return hidden if self._head_scale is None else hidden * self._head_scale, aux_loss

    def _own_context(self, tokens: Tensor, segments: Tensor | None, dtype: torch.dtype, start: int) -> Context:
        """Of the decoder's self-attention: causal, within documents."""
        if self.decoder_buckets is None:
            return self._contexts.of(tokens, segments, dtype=dtype, start=start).at(0)
        context = self._contexts.of(tokens, None, dtype=dtype, start=start).at(0)
        end = start + tokens.shape[1]
        place = torch.arange(end, device=None if segments is None else segments.device)
        seen = (place <= place[start:, None]).unsqueeze(0)  # [1, t, K]
        if segments is not None:
            seen = seen & (segments.unsqueeze(-1) == segments.unsqueeze(-2))
        visible = Visible.of(seen, tokens.device, bias=self.decoder_buckets(tokens.shape[1], end), scale=self._scale)
        return replace(context, core=partial(visible_core, visible=visible))

    def _across_context(
        self, own: Context, states: Tensor, tokens: Tensor, source_segments: Tensor | None, segments: Tensor | None
    ) -> Context:
        """Of the cross attention: all source tokens of the same document, without positions."""
        entered = self.placement.ranks.enter(states)  # once for all layers: its backward sums over ranks
        batch, size = entered.shape[:2]
        seen = same_document(segments, source_segments, shape=(batch, tokens.shape[1], size))
        core = partial(visible_core, visible=Visible.of(seen, tokens.device, scale=self._scale))
        unrotated = (own.rope[0][:, :0], own.rope[1][:, :0])
        empty = own.rope[0].new_empty(size, 0)
        return replace(
            own, rope=unrotated, documents=None, core=core, source=Source(states=entered, rope=(empty, empty))
        )

    def _drops(self, source: Tensor, tokens: Tensor, keys: Tensor | None) -> tuple[Drops | None, Drops | None]:
        """Dropout of the encoder's and of the decoder's pass, with seeds of their own; None outside of training."""
        if self.dropout is None or not self.training:
            return None, None
        if keys is None:
            keys = self.dropout.keys(tokens=0, first=0, count=len(tokens), device=tokens.device)
        first, second = stream(keys, 0, 2).unbind(-1)
        return self.dropout.of_pass(first, source, start=0), self.dropout.of_pass(second, tokens, start=0)

    def _head_weight(self) -> Tensor:
        return self.embedding if self.head is None else self.head
