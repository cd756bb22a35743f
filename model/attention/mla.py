"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); grouped latents (GLA, arXiv 2505.21506).

Legend: B batch, S sequence, K keys, d width, n heads, D channels per head of values and of the part of keys without
positions, R rotated channels per head, r channels of a latent, C latents, n/C heads per latent, r_q channels of the
queries' latent.

    c_j = norm(W_DKV[j] x)                       [C, r], cached
    k_R = RoPE(W_KR x)                           [R], one for all heads, cached
    k_h = [W_UK[h] c_j, k_R],  v_h = W_UV[h] c_j,  j = h // (n/C)
    q_h = [a_h, RoPE(b_h)],  [a_h, b_h] = W_Q[h] x, or W_UQ[h] norm(W_DQ x)
    y = W_O [o_1 .. o_n],  o_h = softmax(q_h k_h^T / sqrt(D + R)) v_h

The cache has C r + R numbers per token. Decoding does not compute the keys and values of cached tokens: as
a_h^T W_UK[h] c = (W_UK[h]^T a_h)^T c, each query is moved into the latent space, where all heads of a latent attend to
the same keys [c_j, k_R] and values c_j, and W_UV is applied to the result (the "absorbed" form, section 2.1.2). Both
forms are the same function; the cheaper one is computed.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from headway.kernels.operations import Operations
from headway.model.base import Attention, AttentionConfig, AttentionOutput, Context, Flops, Shard, visible_keys
from headway.model.layers import Replaceable, RMSNorm, parameter


class MlaConfig(AttentionConfig):
    """Keys and values of all heads are linear functions of a latent; `head_dim` is D."""

    type: Literal["mla"] = "mla"
    heads: int = Field(ge=1, le=65_536, description="n, heads")
    latent: int = Field(ge=1, description="r, channels of a latent, from which keys and values are computed")
    latents: int = Field(default=1, ge=1, description="C, latents; heads are divided among them (more than one: GLA)")
    query_latent: int | None = Field(default=None, ge=1, description="r_q, channels of the queries' latent; none: W_Q")
    rope_dim: int = Field(ge=0, multiple_of=2, description="R, rotated channels of each query and of the shared key")
    latent_norm: bool = Field(default=True, description="RMSNorm of the latents, as published")

    @model_validator(mode="after")
    def _heads_and_positions(self) -> Self:
        if self.heads % self.latents:
            legal = [c for c in range(1, self.heads + 1) if self.heads % c == 0]
            raise ValueError(
                f"latents: {self.heads} heads do not divide among {self.latents} latents; use latents "
                f"{' or '.join(map(str, _around(self.latents, legal)))}, or heads "
                f"{-(-self.heads // self.latents) * self.latents}"
            )
        if self.rope_fraction != 1.0:
            raise ValueError(
                f"rope_fraction: {self.rope_fraction}, but mla rotates channels of their own; leave rope_fraction out, "
                "and use rope_dim (0: none)"
            )
        if self.qk_norm:
            raise ValueError(
                "qk_norm: mla normalizes the latents instead (latent_norm), and decoding never computes its keys; use "
                "qk_norm false"
            )
        return self

    @model_validator(mode="after")
    def _rotated_channels_are_pairs(self) -> Self:
        """Replaces the rule for `head_dim`: `rope_dim` is even."""
        return self

    @property
    def rotated(self) -> int:
        return self.rope_dim

    @property
    def core_channels(self) -> int:
        """D + R. Values are padded to them, as kernels take keys and values of one size."""
        return self.head_dim + self.rope_dim

    @property
    def score_maps(self) -> int:
        return self.heads

    def attended_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        """One KV head per head, as the shared rotated key is copied."""
        return (self.heads // tensor,)

    @property
    def cached(self) -> int:
        """Numbers in the cache per token."""
        return self.latents * self.latent + self.rope_dim

    def useful_core_flops_per_token(self, *, seq_len: int) -> float:
        """2 (D + R) for scores and 2 D for values, per head and visible key."""
        return 2 * (2 * self.head_dim + self.rope_dim) * self.heads * visible_keys(seq_len)

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return LatentAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def _matrices(self, width: int) -> int:
        """d n (D + R), or d r_q + r_q n (D + R); d (C r + R); 2 r n D; d n D."""
        queries = self.heads * (self.head_dim + self.rope_dim)
        own = width * queries if self.query_latent is None else self.query_latent * (width + queries)
        values = self.heads * self.head_dim
        return own + width * self.cached + 2 * self.latent * values + width * values

    def num_params(self, *, width: int) -> int:
        """The matrices, plus r and r_q gains of the norms."""
        gains = self.latent + (self.query_latent or 0) if self.latent_norm else 0
        return self._matrices(width) + gains

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """2 per element of the matrices, and the core. In training; decoding computes the absorbed form."""
        projections = 2 * self._matrices(width)
        return Flops(
            useful=projections + self.useful_core_flops_per_token(seq_len=seq_len),
            executed=projections + self.core_flops_per_token(seq_len=seq_len),
        )

    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        return self.cached * bytes_per_element

    def shards(self) -> dict[str, Shard]:
        """By heads. One latent is computed by every rank; several belong to the ranks of their heads."""
        units = self.heads if self.latents == 1 else self.latents
        queries = "w_q" if self.query_latent is None else "w_uq"
        dims = {queries: 0, "w_uk": 0, "w_uv": 0, "w_o": 1} | ({} if self.latents == 1 else {"w_dkv": 0})
        return {name: Shard(dim, units) for name, dim in dims.items()}


def _around(wanted: int, legal: list[int]) -> list[int]:
    """The legal numbers next to `wanted` on both sides."""
    return sorted({max((c for c in legal if c < wanted), default=1), min((c for c in legal if c > wanted), default=1)})


class _Rope(Replaceable):
    def __init__(self) -> None:
        super().__init__()
        self.use(Operations())

    def use(self, operations: Operations) -> None:
        self._rope = operations.rope

    def forward(self, heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:  # [B, S, *, R] -> same
        return self._rope(heads, rope)


class LatentAttention(Attention):
    """MLA: `w_q` [n (D + R), d], or `w_dq` [r_q, d] and `w_uq` [n (D + R), r_q]; `w_dkv` [C r, d], `w_kr` [R, d],
    `w_uk` and `w_uv` [n D, r], `w_o` [d, n D]. Rows are head-major; of queries, D rows of a head and then R.
    """

    def __init__(self, config: MlaConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__()
        self.head_dim, self.rope_dim, self.latent = config.head_dim, config.rope_dim, config.latent
        queries, values = config.heads * (config.head_dim + config.rope_dim), config.heads * config.head_dim
        self.query_norm = self.latent_norm = None
        if config.query_latent is None:
            self.w_q = parameter(queries, width)
        else:
            self.w_dq = parameter(config.query_latent, width)
            self.w_uq = parameter(queries, config.query_latent)
            self.query_norm = RMSNorm(config.query_latent, norm_eps) if config.latent_norm else None
        self.w_dkv = parameter(config.latents * config.latent, width)
        self.latent_norm = RMSNorm(config.latent, norm_eps) if config.latent_norm else None
        self.w_kr = parameter(config.rope_dim, width) if config.rope_dim else None
        self.w_uk = parameter(values, config.latent)
        self.w_uv = parameter(values, config.latent)
        self.w_o = parameter(width, values)
        self.rope = _Rope()
        names = [name for name, _ in self.named_parameters(recurse=False)]
        self.init_stds = dict.fromkeys(names, init_std) | {"w_o": init_std / (2 * layers) ** 0.5}

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        a, b = self.queries(x).split([self.head_dim, self.rope_dim], -1)  # [B, S, n, D], [B, S, n, R]
        b = self.rope(b, context.rope)
        c = F.linear(x, self.w_dkv).unflatten(-1, (-1, self.latent))  # [B, S, C, r]
        c = c if self.latent_norm is None else self.latent_norm(c)
        k_r = c.new_empty(*c.shape[:2], 1, 0)  # [B, S, 1, R]
        if self.w_kr is not None:
            k_r = self.rope(F.linear(x, self.w_kr).unsqueeze(2), context.rope)
        c, k_r = context.keys_and_values(c, k_r)  # [B, K, ..]
        absorbed = context.cache is not None and self.cheaper_absorbed(x.shape[1], c.shape[1])
        o = (self.attend_absorbed if absorbed else self.attend)(a, b, c, k_r, context)
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), None)

    def queries(self, x: Tensor) -> Tensor:
        """x [B, S, d] -> [B, S, n, D + R], before RoPE."""
        if hasattr(self, "w_q"):
            q = F.linear(x, self.w_q)
        else:
            low = F.linear(x, self.w_dq)
            q = F.linear(low if self.query_norm is None else self.query_norm(low), self.w_uq)
        return q.unflatten(-1, (-1, self.head_dim + self.rope_dim))

    def cheaper_absorbed(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form needs fewer multiplications for S queries of K keys, per head."""
        size, latent, rotated = self.head_dim, self.latent, self.rope_dim
        pairs = queries * keys
        plain = keys * 2 * latent * size + pairs * (2 * size + rotated)
        return queries * 2 * latent * size + pairs * (2 * latent + rotated) < plain

    def attend(self, a: Tensor, b: Tensor, c: Tensor, k_r: Tensor, context: Context) -> Tensor:
        """Keys and values of each head, from latents. Returns [B, S, n, D]."""
        k, v = (self.of_heads(c, weight) for weight in (self.w_uk, self.w_uv))  # [B, K, n, D]
        if self.rope_dim == 0:
            return context.attend(a, k, v)
        k = _join(k, k_r.expand(-1, -1, k.shape[2], -1))
        return context.attend(_join(a, b), k, F.pad(v, (0, self.rope_dim)))[..., : self.head_dim]

    def attend_absorbed(self, a: Tensor, b: Tensor, c: Tensor, k_r: Tensor, context: Context) -> Tensor:
        """Queries in the space of latents; one KV head per latent. Returns [B, S, n, D]."""
        latents = c.shape[2]
        w_uk, w_uv = (w.unflatten(0, (latents, -1, self.head_dim)) for w in (self.w_uk, self.w_uv))  # [C, n/C, D, r]
        grouped = a.unflatten(2, (latents, -1))  # [B, S, C, n/C, D]
        q = _join(torch.einsum("bscmd,cmdr->bscmr", grouped, w_uk).flatten(2, 3), b)
        # The core divides by the root of r + R channels; the scores are divided by that of D + R.
        q = q * math.sqrt((self.latent + self.rope_dim) / (self.head_dim + self.rope_dim))
        keys = _join(c, k_r.expand(-1, -1, latents, -1))
        o = context.attend(q, keys, F.pad(c, (0, self.rope_dim)))[..., : self.latent]
        return torch.einsum("bscmr,cmdr->bscmd", o.unflatten(2, (latents, -1)), w_uv).flatten(2, 3)

    def of_heads(self, c: Tensor, weight: Tensor) -> Tensor:
        """c [B, K, C, r], weight [n D, r] -> [B, K, n, D], each head from its latent."""
        if c.shape[2] == 1:
            return F.linear(c.squeeze(2), weight).unflatten(-1, (-1, self.head_dim))
        per_latent = weight.unflatten(0, (c.shape[2], -1))  # [C, n/C D, r]
        return torch.einsum("bkcr,cmr->bkcm", c, per_latent).flatten(2).unflatten(-1, (-1, self.head_dim))


def _join(a: Tensor, b: Tensor) -> Tensor:
    """[..., m] and [..., n] -> [..., m + n]."""
    return torch.cat([a, b], -1) if b.shape[-1] else a
