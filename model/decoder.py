"""The decoder: pre-norm blocks of attention and SwiGLU between an embedding and a head.

Legend: B batch, S sequence, d width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.kernels.loss import IGNORED, linear_cross_entropy_sum
from headway.kernels.rope import rope_tables
from headway.model.base import Attention, AttentionConfig, AttentionOutput
from headway.model.config import ModelConfig
from headway.model.init import initialise
from headway.model.layers import RMSNorm, SwiGLU, parameter


class ModelOutput(NamedTuple):
    """A forward pass over a micro-batch. Divide `loss_sum` by the targets of the whole global batch, not by its own."""

    loss_sum: Tensor  # fp32 scalar: sum of the cross entropy (nats) over targets
    targets: Tensor  # int64 scalar: labels that are not -100
    aux_loss: Tensor  # fp32 scalar: sum over layers of the routers' losses with their coefficients, mean over sequences


class Block(nn.Module):
    """x + attention(norm x), then + mlp(norm x)."""

    def __init__(self, model: ModelConfig, attention: AttentionConfig) -> None:
        super().__init__()
        width, layers, std, eps = model.width, model.layers, model.init_std, model.norm_eps
        self.attn_norm = RMSNorm(width, eps)
        self.attn = attention.build(width=width, layers=layers, init_std=std, norm_eps=eps)
        self.mlp_norm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, model.ffn_width, layers=layers, init_std=std)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> AttentionOutput:
        y, aux_loss = self.attn(self.attn_norm(x), rope, mask)
        x = x + y
        return AttentionOutput(x + self.mlp(self.mlp_norm(x)), aux_loss)


class Decoder(nn.Module):
    """Parameters are a function of `seed` and their names (`headway.model.init`).

    `embedding` [V, d] and, where not tied, `head` [V, d] belong to this module itself: the head's product then happens
    inside the forward pass of the module that owns the matrix, which parameter-sharding engines rely on.
    """

    def __init__(self, model: ModelConfig, attention: AttentionConfig, *, vocab_size: int, seed: int) -> None:
        super().__init__()
        self.attention = attention
        self.embedding = parameter(vocab_size, model.width)
        self.blocks = nn.ModuleList(Block(model, attention) for _ in range(model.layers))
        self.norm = RMSNorm(model.width, model.norm_eps)
        self.head = None if model.tied_embeddings else parameter(vocab_size, model.width)
        self.init_stds = {"embedding": model.init_std, "head": model.init_std}
        # A plain attribute: a buffer would be cast with the module, and lose the phase of late positions in bf16.
        self._rope: tuple[Tensor, Tensor] | None = None
        initialise(self, seed=seed)

    def forward(self, tokens: Tensor, labels: Tensor, segments: Tensor | None = None) -> ModelOutput:
        """tokens, labels [B, S] (-100: no target); segments [B, S] numbers the documents, None: one each."""
        hidden, aux_loss = self._hidden(tokens, segments)
        loss_sum = linear_cross_entropy_sum(hidden.flatten(0, 1), self._head_weight(), labels.flatten())
        return ModelOutput(loss_sum, (labels != IGNORED).sum(), aux_loss)

    def logits(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """[B, S, V] in the model's dtype."""
        hidden, _ = self._hidden(tokens, segments)
        return F.linear(hidden, self._head_weight())

    def attention_layers(self) -> list[Attention]:
        """From the first block to the last."""
        return [block.attn for block in self.blocks if isinstance(block, Block)]

    def _hidden(self, tokens: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
        x = F.embedding(tokens, self.embedding)
        mask = None if segments is None else document_mask(segments, x.dtype)
        rope = self._rope_tables(tokens)
        aux_loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for block in self.blocks:
            x, aux = block(x, rope, mask)
            if aux is not None:
                aux_loss = aux_loss + aux
        return self.norm(x), aux_loss

    def _head_weight(self) -> Tensor:
        return self.embedding if self.head is None else self.head

    def _rope_tables(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Made once for the longest sequence seen."""
        seq_len = tokens.shape[1]
        if self._rope is None or len(self._rope[0]) < seq_len or self._rope[0].device != tokens.device:
            self._rope = rope_tables(seq_len, self.attention.rotated, self.attention.rope_base, tokens.device)
        return self._rope[0][:seq_len], self._rope[1][:seq_len]


def document_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """segments [B, S] -> additive mask [B, 1, S, S]: 0 where a token may see another, -inf elsewhere.

    A token sees itself and the earlier tokens of its own document.
    """
    same = segments[:, :, None] == segments[:, None, :]
    visible = same.tril_()
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~visible, float("-inf")).unsqueeze(1)
