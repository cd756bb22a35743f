"""The decoder: pre-norm blocks of attention and SwiGLU between an embedding and a head.

Legend: B batch, S sequence, d width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels.loss import IGNORED, linear_cross_entropy_and_hits, linear_cross_entropy_sum
from headway.kernels.rope import rope_tables
from headway.model.base import Attention, AttentionConfig, AttentionOutput, Context, KVCache
from headway.model.config import ModelConfig
from headway.model.cost import layer_configs
from headway.model.init import initialise
from headway.model.layers import RMSNorm, SwiGLU, parameter


class ModelOutput(NamedTuple):
    """A forward pass over a micro-batch. Divide `loss_sum` by the targets of the whole global batch, not by its own."""

    loss_sum: Tensor  # fp32 scalar: sum of the cross entropy (nats) over targets
    targets: Tensor  # int64 scalar: labels that are not -100
    aux_loss: Tensor  # fp32 scalar: sum over layers of the routers' losses with their coefficients, mean over sequences
    hits: Tensor | None = None  # int64 scalar: targets whose largest logit is the label's; None where gradients are on


class Block(nn.Module):
    """x + attention(norm x), then + mlp(norm x)."""

    def __init__(self, model: ModelConfig, attention: AttentionConfig) -> None:
        super().__init__()
        width, layers, std, eps = model.width, model.layers, model.init_std, model.norm_eps
        self.attn_norm = RMSNorm(width, eps)
        self.attn: Attention = attention.build(width=width, layers=layers, init_std=std, norm_eps=eps)
        self.mlp_norm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, model.ffn_width, layers=layers, init_std=std)

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        y, aux_loss = self.attn(self.attn_norm(x), context)
        x = x + y
        return AttentionOutput(x + self.mlp(self.mlp_norm(x)), aux_loss)


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
    """Parameters are a function of `seed` and their names (`headway.model.init`).

    `embedding` [V, d] and, where not tied, `head` [V, d] belong to this module itself: the head's product then happens
    inside the forward pass of the module that owns the matrix, which parameter-sharding engines rely on.
    """

    def __init__(self, model: ModelConfig, attention: AttentionConfig, *, vocab_size: int, seed: int) -> None:
        super().__init__()
        self.attention = attention
        mechanisms = layer_configs(model, attention, vocab_size=vocab_size)
        self.embedding = parameter(vocab_size, model.width)
        self.blocks = nn.ModuleList(Block(model, mechanism) for mechanism in mechanisms)
        self.norm = RMSNorm(model.width, model.norm_eps)
        self.head = None if model.tied_embeddings else parameter(vocab_size, model.width)
        self.init_stds = {"embedding": model.init_std, "head": model.init_std}
        # A plain attribute: a buffer would be cast with the module, and lose the phase of late positions in bf16.
        self._rope: tuple[Tensor, Tensor] | None = None
        initialise(self, seed=seed)

    def forward(self, tokens: Tensor, labels: Tensor, segments: Tensor | None = None) -> ModelOutput:
        """tokens, labels [B, S] (-100: no target); segments [B, S] numbers the documents, None: one each."""
        hidden, aux_loss = self._hidden(tokens, segments)
        head = (hidden.flatten(0, 1), self._head_weight(), labels.flatten())
        if torch.is_grad_enabled():
            loss_sum, hits = linear_cross_entropy_sum(*head), None
        else:
            loss_sum, hits = linear_cross_entropy_and_hits(*head)
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
        x = F.embedding(tokens, self.embedding)
        mask = None if segments is None else document_mask(segments, x.dtype)
        rope = self._rope_tables(tokens, 0 if cache is None else cache.tokens)
        aux_loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[i]
            x, aux = block(x, Context(rope=rope, mask=mask, tokens=tokens, cache=layer_cache))
            if aux is not None:
                aux_loss = aux_loss + aux
        if cache is not None:
            cache.tokens += tokens.shape[1]
        return self.norm(x), aux_loss

    def _head_weight(self) -> Tensor:
        return self.embedding if self.head is None else self.head

    def _rope_tables(self, tokens: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Rows of the positions start .. start + S - 1, of tables made once for the longest sequence seen."""
        end = start + tokens.shape[1]
        if self._rope is None or len(self._rope[0]) < end or self._rope[0].device != tokens.device:
            length = end if start == 0 else 2 * end  # decoding asks for one more each time
            self._rope = rope_tables(length, self.attention.rotated, self.attention.rope_base, tokens.device)
        return self._rope[0][start:end], self._rope[1][start:end]


def document_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """segments [B, S] -> additive mask [B, 1, S, S]: 0 where a token may see another, -inf elsewhere.

    A token sees itself and the earlier tokens of its own document.
    """
    same = segments[:, :, None] == segments[:, None, :]
    visible = same.tril_()
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)
