"""Base config and module of the mechanisms in which groups of query heads share keys and values.

Legend: B batch, S sequence, d width, H query heads, G KV heads (= groups), M=H/G query heads per group, D head size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from headway.kernels.device import fused
from headway.kernels.experts import Routed, project_routed
from headway.kernels.operations import Operations
from headway.kernels.routing import select_rope
from headway.kernels.twins import select
from headway.model.base import Attention, AttentionConfig, AttentionOutput, Context, Flops, HeadPool, Shard
from headway.model.layers import Replaceable, RMSNorm, parameter
from headway.model.router import RoutedAttention


class GroupedConfig(AttentionConfig):
    """Base config of the mechanisms in which groups of query heads share keys and values."""

    heads: int = Field(ge=1, le=65_536, description="H, query heads")

    @property
    @abstractmethod
    def groups(self) -> int:
        """G, KV heads."""
        raise NotImplementedError

    @property
    def query_heads(self) -> int:
        """Query heads that have parameters."""
        return self.heads

    @property
    def heads_per_group(self) -> int:
        """M, query heads per group."""
        return self.query_heads // self.groups

    orthogonality: float = Field(
        default=0.0,
        ge=0,
        description="coefficient of a loss on the similarity of query matrices in a group; a control, not published",
    )

    @model_validator(mode="after")
    def _orthogonality_has_pairs(self) -> Self:
        if self.orthogonality and self.query_heads == self.groups:
            raise ValueError(
                f"orthogonality: each of the {self.groups} groups has one query head, so the loss has no pairs to "
                f"compare; use orthogonality 0.0, or two or more query heads per KV head"
            )
        return self

    @property
    def score_maps(self) -> int:
        return self.query_heads

    def attended_heads(self, *, tensor: int = 1) -> tuple[int, ...]:
        return (self.groups // tensor,)

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return GroupedQueryAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """2dHD + 2dGD, plus 2D (two gains) with QK-norm."""
        gains = 2 * self.head_dim if self.qk_norm else 0
        return 2 * width * (self.query_heads + self.groups) * self.head_dim + gains

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """4dHD + 4dGD, plus the attention core."""
        projections = 4 * width * (self.query_heads + self.groups) * self.head_dim
        flops = projections + self.core_flops_per_token(seq_len=seq_len)
        return Flops(useful=flops, executed=flops)

    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        return 2 * self.groups * self.head_dim * bytes_per_element

    def shards(self) -> dict[str, Shard]:
        """Each rank owns whole groups: KV heads with their query heads and output columns."""
        units = self.groups
        return {"w_q": Shard(0, units), "w_k": Shard(0, units), "w_v": Shard(0, units), "w_o": Shard(1, units)}


def check_groups(heads: int, kv_heads: int) -> None:
    """Raises ValueError unless the query heads divide into `kv_heads` equal groups."""
    if heads % kv_heads:
        legal = [g for g in range(1, heads + 1) if heads % g == 0]
        below, above = (
            max((g for g in legal if g < kv_heads), default=1),
            min((g for g in legal if g > kv_heads), default=heads),
        )
        use = f"{below} or {above}" if below != above else f"{below}"
        raise ValueError(
            f"kv_heads: {heads} query heads do not divide into {kv_heads} equal groups; "
            f"use kv_heads {use}, or heads {-(-heads // kv_heads) * kv_heads}"
        )


class QkNorm(Replaceable):
    """Optional RMSNorm of queries or keys, then RoPE. The gain [D] is shared by the heads."""

    def __init__(self, config: AttentionConfig, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(config.head_dim, norm_eps) if config.qk_norm else None
        self.use(Operations())

    def use(self, operations: Operations) -> None:
        self._rope = operations.rope

    def forward(self, heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:  # [B, S, *, D] -> same
        return self._rope(heads if self.norm is None else self.norm(heads), rope)

    def of_chosen(self, pool: Tensor, idx: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Select heads, then norm and rotate: pool [B, S, G, M, D], idx [B, S, G, k] -> [B, S, G k, D]."""
        if self.norm is None and fused(pool):
            return select_rope(pool, idx, rope).flatten(2, 3)
        # Not fused with the selection, slots are rotated by the function that rotates dense queries, compiled or not.
        return self(select(pool, idx).flatten(2, 3), rope)

    def of_routed(self, x: Tensor, weight: Tensor, routed: Routed, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Project the selected heads only, then norm and rotate: x [B, S, d], weight [H D, d] -> [B, S, G k, D]."""
        if self.norm is None:
            return project_routed(x, weight, routed, rope).flatten(2, 3)
        return self(project_routed(x, weight, routed).flatten(2, 3), rope)


def orthogonality_loss(w_q: Tensor, *, members: int, head_dim: int) -> Tensor:
    """Squared cosine of the flattened query matrices of two heads, averaged over the pairs and groups.

    w_q [H D, d], group-major, `members` heads per group. Returns a scalar in [0, 1], fp32 or wider; 0 where all heads
    of a group are orthogonal.
    """
    flat = w_q.to(torch.promote_types(w_q.dtype, torch.float32)).unflatten(0, (-1, members, head_dim)).flatten(2)
    unit = F.normalize(flat, dim=-1)  # [G, M, D d]
    cosines = unit @ unit.transpose(1, 2)
    pairs = members * (members - 1)
    return (cosines.square().sum((1, 2)) - members).mean() / pairs


def uneven_orthogonality_loss(w_q: Tensor, sizes: Tensor, *, head_dim: int) -> Tensor:
    """`orthogonality_loss` for consecutive groups of `sizes` [G] heads, averaged over groups of two or more heads."""
    flat = w_q.to(torch.promote_types(w_q.dtype, torch.float32)).unflatten(0, (-1, head_dim)).flatten(1)
    unit = F.normalize(flat, dim=-1)  # [H, D d]
    group_of = group_of_head(sizes, len(unit))
    size = sizes[group_of]
    pair = (group_of[:, None] == group_of) & ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    weight = pair.to(unit.dtype) / (size * (size - 1)).clamp_min(1) / (sizes > 1).sum()
    return ((unit @ unit.T).square() * weight).sum()


def group_of_head(sizes: Tensor, heads: int) -> Tensor:
    """sizes [G], which add up to `heads` -> group index of each head [H]. Does not synchronize with the device."""
    return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes, output_size=heads)


class GroupedQueryAttention(RoutedAttention):
    """Base module of the mechanisms with grouped query heads. Without routers it computes GQA.

    y = W_O [o_1 .. o_H], o_h = softmax(q_h K_g^T / sqrt(D)) V_g; rows are group-major, h = g M + m.
    """

    b_q: nn.Parameter | None
    b_k: nn.Parameter | None
    b_v: nn.Parameter | None

    def __init__(self, config: GroupedConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__()
        heads, groups, head_dim = config.query_heads, config.groups, config.head_dim
        self.head_dim, self.members, self.orthogonality = head_dim, config.heads_per_group, config.orthogonality
        self.w_q = parameter(heads * head_dim, width)
        self.w_k = parameter(groups * head_dim, width)
        self.w_v = parameter(groups * head_dim, width)
        self.w_o = parameter(width, heads * head_dim)
        for name in ("b_q", "b_k", "b_v"):  # biases, of the mechanisms that have them
            self.register_parameter(name, None)
        self.q_rope = QkNorm(config, norm_eps)
        self.k_rope = QkNorm(config, norm_eps)
        self.init_stds = {"w_q": init_std, "w_k": init_std, "w_v": init_std, "w_o": init_std / (2 * layers) ** 0.5}

    def heads_of(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [B, S, d], weight [n D, d], bias [n D] -> [B, S, n, D]. They may be one rank's shards, which set n."""
        return F.linear(x, weight, bias).unflatten(-1, (-1, self.head_dim))

    def kv_heads(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, S, G, D] of x [B, S, d]."""
        return self.k_rope(self.heads_of(x, self.w_k, self.b_k), rope), self.heads_of(x, self.w_v, self.b_v)

    def keys_and_values(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, K, G, D] of the K tokens that x attends to (with a cache, earlier ones too)."""
        if context.source is not None:
            return context.source.keys_and_values(self.kv_heads)
        return context.keys_and_values(*self.kv_heads(x, context.rope))

    def attend(self, q: Tensor, x: Tensor, context: Context) -> Tensor:
        """Attend with rotated queries q [B, S, H, D] to the keys and values of x [B, S, d] -> o [B, S, H, D]."""
        k, v = self.keys_and_values(x, context)  # [B, K, G, D]
        return context.attend(q, k, v)

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        q = self.q_rope(self.heads_of(x, self.w_q, self.b_q), context.rope)  # [B, S, H, D]
        o = self.attend(q, x, context)
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), self.diversity_loss())

    def diversity_loss(self) -> Tensor | None:
        """In training, the orthogonality loss times its coefficient; it does not depend on the micro-batch."""
        if not self.orthogonality or not self.training:
            return None
        return self.orthogonality * orthogonality_loss(self.w_q, members=self.members, head_dim=self.head_dim)

    def pool(self, x: Tensor, context: Context) -> HeadPool | None:
        """The query heads of each group."""
        if self.members == 1:
            return None
        q = self.heads_of(x, self.w_q, self.b_q)
        o = self.attend(self.q_rope(q, context.rope), x, context)
        per_group = (-1, self.members)
        weights = self.w_q.unflatten(0, (-1, self.members, self.head_dim)).flatten(2)
        return HeadPool("query head", weights, q.unflatten(2, per_group), o.unflatten(2, per_group))
