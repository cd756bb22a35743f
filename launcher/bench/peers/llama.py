"""A plain Llama in PyTorch, as a training script of one file contains it: the `bare` peer of `headway bench peers`.

It uses PyTorch's modules and nothing of Headway, so that it is what a user writes without any library.

Legend: B batch, S sequence, d width, H query heads, G KV heads, D head size, F hidden width of the MLP, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LlamaSize:
    """Sizes of a Llama. `tied`: the output head is the embedding."""

    width: int
    layers: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    seq_len: int
    norm_eps: float
    rope_base: float
    tied: bool


class Block(nn.Module):
    """x = x + attention(norm(x)), then x = x + mlp(norm(x))."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = size.heads, size.kv_heads, size.head_dim
        self.attn_norm = nn.RMSNorm(size.width, eps=size.norm_eps)
        self.q = nn.Linear(size.width, size.heads * size.head_dim, bias=False)
        self.k = nn.Linear(size.width, size.kv_heads * size.head_dim, bias=False)
        self.v = nn.Linear(size.width, size.kv_heads * size.head_dim, bias=False)
        self.o = nn.Linear(size.heads * size.head_dim, size.width, bias=False)
        self.mlp_norm = nn.RMSNorm(size.width, eps=size.norm_eps)
        self.gate = nn.Linear(size.width, size.ffn_width, bias=False)
        self.up = nn.Linear(size.width, size.ffn_width, bias=False)
        self.down = nn.Linear(size.ffn_width, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        normed = self.attn_norm(x)
        q = self.q(normed).view(batch, length, self.heads, self.head_dim).transpose(1, 2)  # [B, H, S, D]
        k = self.k(normed).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)  # [B, G, S, D]
        v = self.v(normed).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(out.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Llama(nn.Module):
    """Tokens [B, S] -> logits [B, S, V]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocab_size, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=size.norm_eps)
        self.head = nn.Linear(size.width, size.vocab_size, bias=False)
        if size.tied:
            self.head.weight = self.embedding.weight
        powers = torch.arange(0, size.head_dim, 2, dtype=torch.float64) / size.head_dim
        angles = torch.arange(size.seq_len, dtype=torch.float64)[:, None] * size.rope_base**-powers  # [S, D/2]
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: channel i is rotated with channel i + D/2 (Su et al., 2021, arXiv 2104.09864). x [B, H, S, D]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
