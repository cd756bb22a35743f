"""Grouped-query attention (Ainslie et al., 2023, arXiv 2305.13245) and its two ends, MHA and MQA.

Legend: B batch, S sequence, d width, H query heads, G KV heads (= groups), M=H/G query heads per group, D head size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from headway.kernels.attention import core
from headway.kernels.rope import apply_rope
from headway.model.base import Attention, AttentionConfig, AttentionOutput, Context, Flops, HeadPool, Shard
from headway.model.layers import RMSNorm, parameter
from headway.model.router import RoutedAttention


class GroupedConfig(AttentionConfig):
    """What every mechanism with groups of query heads over shared keys and values has."""

    heads: int = Field(ge=1, description="H, query heads")

    @property
    @abstractmethod
    def groups(self) -> int:
        """G, KV heads."""
        raise NotImplementedError

    @property
    def heads_per_group(self) -> int:
        """M."""
        return self.heads // self.groups

    orthogonality: float = Field(
        default=0.0,
        ge=0,
        description="coefficient of a loss that drives the query matrices of a group apart; a control, not published",
    )

    @property
    def score_maps(self) -> int:
        return self.heads

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return GroupedQueryAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """2dHD + 2dGD, and two gains of D with QK-norm."""
        gains = 2 * self.head_dim if self.qk_norm else 0
        return 2 * width * (self.heads + self.groups) * self.head_dim + gains

    def flops_per_token(self, *, width: int, seq_len: int) -> Flops:
        """4dHD + 4dGD and the core."""
        flops = 4 * width * (self.heads + self.groups) * self.head_dim + self.core_flops_per_token(seq_len=seq_len)
        return Flops(useful=flops, executed=flops)

    def kv_bytes_per_token(self, *, seq_len: int, bytes_per_element: int) -> float:
        return 2 * self.groups * self.head_dim * bytes_per_element

    def shards(self) -> dict[str, Shard]:
        """Whole groups: a rank owns KV heads with the query heads and output columns that belong to them."""
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
        raise ValueError(
            f"kv_heads: {heads} query heads do not divide into {kv_heads} equal groups; "
            f"use kv_heads {below} or {above}, or heads {-(-heads // kv_heads) * kv_heads}"
        )


class GqaConfig(GroupedConfig):
    """GQA: G KV heads, each shared by H/G query heads."""

    type: Literal["gqa"] = "gqa"
    kv_heads: int = Field(ge=1, description="G, KV heads; each serves heads/kv_heads query heads")

    @model_validator(mode="after")
    def _groups_are_equal(self) -> Self:
        check_groups(self.heads, self.kv_heads)
        return self

    @property
    def groups(self) -> int:
        return self.kv_heads


class MhaConfig(GroupedConfig):
    """Multi-head attention: GQA with one query head per KV head."""

    type: Literal["mha"] = "mha"

    @property
    def groups(self) -> int:
        return self.heads


class MqaConfig(GroupedConfig):
    """Multi-query attention: GQA with a single KV head."""

    type: Literal["mqa"] = "mqa"

    @property
    def groups(self) -> int:
        return 1


class QkNorm(nn.Module):
    """Optional norm of queries or keys, then their rotation. The gain [D] is shared by the heads."""

    def __init__(self, config: AttentionConfig, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(config.head_dim, norm_eps) if config.qk_norm else None

    def forward(self, heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:  # [B, S, *, D] -> same
        return apply_rope(heads if self.norm is None else self.norm(heads), rope)


def orthogonality_loss(w_q: Tensor, *, members: int, head_dim: int) -> Tensor:
    """Mean over groups and pairs of members of cos^2 of their flattened matrices: 0 where all are orthogonal.

    w_q [H D, d], group-major, `members` heads per group. Scalar, fp32 or wider, at most 1.
    """
    flat = w_q.to(torch.promote_types(w_q.dtype, torch.float32)).unflatten(0, (-1, members, head_dim)).flatten(2)
    unit = F.normalize(flat, dim=-1)  # [G, M, D d]
    cosines = unit @ unit.transpose(1, 2)
    pairs = members * (members - 1)
    return (cosines.square().sum((1, 2)) - members).mean() / pairs


class GroupedQueryAttention(RoutedAttention):
    """Base of the mechanisms with grouped query heads; without routers it is GQA.

    y = W_O [o_1 .. o_H], o_h = softmax(q_h K_g^T / sqrt(D)) V_g; rows are group-major, h = g M + m."""

    def __init__(self, config: GroupedConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__()
        heads, groups, head_dim = config.heads, config.groups, config.head_dim
        self.head_dim, self.members, self.orthogonality = head_dim, config.heads_per_group, config.orthogonality
        self.w_q = parameter(heads * head_dim, width)
        self.w_k = parameter(groups * head_dim, width)
        self.w_v = parameter(groups * head_dim, width)
        self.w_o = parameter(width, heads * head_dim)
        self.q_rope = QkNorm(config, norm_eps)
        self.k_rope = QkNorm(config, norm_eps)
        self.init_stds = {"w_q": init_std, "w_k": init_std, "w_v": init_std, "w_o": init_std / (2 * layers) ** 0.5}

    def heads_of(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, S, d], weight [n D, d] -> [B, S, n, D]; n follows the weight, which may be one rank's part."""
        return F.linear(x, weight).unflatten(-1, (-1, self.head_dim))

    def keys_and_values(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """[B, K, G, D] each: of all tokens x's may see."""
        return context.keys_and_values(
            self.k_rope(self.heads_of(x, self.w_k), context.rope), self.heads_of(x, self.w_v)
        )

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        q = self.q_rope(self.heads_of(x, self.w_q), context.rope)  # [B, S, H, D]
        k, v = self.keys_and_values(x, context)  # [B, S, G, D]
        o = core(q, k, v, context.mask)
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), self.diversity_loss())

    def diversity_loss(self) -> Tensor | None:
        """The orthogonality penalty with its coefficient; the same for every micro-batch."""
        if not self.orthogonality or self.members == 1:
            return None
        return self.orthogonality * orthogonality_loss(self.w_q, members=self.members, head_dim=self.head_dim)

    def pool(self, x: Tensor, context: Context) -> HeadPool | None:
        """The query heads of each group."""
        if self.members == 1:
            return None
        q = self.heads_of(x, self.w_q)
        k, v = self.keys_and_values(x, context)
        o = core(self.q_rope(q, context.rope), k, v, context.mask)
        per_group = (-1, self.members)
        weights = self.w_q.unflatten(0, (-1, self.members, self.head_dim)).flatten(2)
        return HeadPool("query head", weights, q.unflatten(2, per_group), o.unflatten(2, per_group))
