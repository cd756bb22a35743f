"""Weighted grouped-query attention (WGQA): GQA whose KV projections are learned weighted sums of those of MHA.

Legend: B batch, S sequence, d width, H heads, G KV heads (= groups), M=H/G heads merged into one, D head size. Group g
holds the heads h = g M .. g M + M - 1. The weights a (of keys) and b (of values) are trained with the other parameters:

    W_K[g] = sum over h in g of a_h * W_K[h]     [D, d]   a_h: one number (scalar), one per output channel (column, D),
    W_V[g] = sum over h in g of b_h * W_V[h]     [D, d]        or one per input channel (row, d)
    y      = grouped-query attention with W_K and W_V of the G groups

With a = b = 1/M the layer is GQA with mean-pooled heads. The sums do not depend on the tokens. They are computed once
per forward pass, before the projection, and `folded` gives the equivalent plain GQA layer. Source: 2024, arXiv
2407.10855, which fine-tunes a multi-head model in this form.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from headway.model.attention.gqa import GqaConfig
from headway.model.attention.grouped import GroupedConfig, GroupedQueryAttention
from headway.model.base import Attention, Shard
from headway.model.layers import parameter

VECTORS = ("k_weights", "v_weights")


class WgqaConfig(GroupedConfig):
    """WGQA in training. `folded` is the equivalent GQA for inference."""

    type: Literal["wgqa"] = "wgqa"
    crosses: ClassVar[bool] = True
    kv_heads: int = Field(ge=1, description="G, KV heads; each is merged from heads/kv_heads trained ones")
    weights: Literal["scalar", "column", "row"] = Field(
        default="scalar",
        description="weights of each merged head; scalar: one, column: one per output channel (D), row: one per input "
        "channel (d)",
    )
    start: Literal["mean", "random"] = Field(
        default="mean", description="initial weights; mean: kv_heads/heads (mean pooling); random: standard normal"
    )

    @model_validator(mode="after")
    def _there_are_heads_to_merge(self) -> Self:
        heads, groups = self.heads, self.kv_heads
        if groups < heads and heads % groups == 0:
            return self
        if groups == heads:
            why = f"as many as heads ({heads}) leave nothing to merge"
        else:
            why = f"{heads} heads cannot be merged into {groups} groups of equal size, two or more each"
        small = [g for g in range(1, math.isqrt(heads) + 1) if heads % g == 0]
        legal = {*small, *(heads // g for g in small)} - {heads}
        nearest = {max((g for g in legal if g < groups), default=0), min((g for g in legal if g > groups), default=0)}
        ways = [f"kv_heads {g}" for g in sorted(nearest - {0})] or ["type mha"]
        raise ValueError(f"kv_heads: {why}; use {' or '.join(ways)}, or heads {groups * max(2, -(-heads // groups))}")

    @property
    def groups(self) -> int:
        return self.kv_heads

    @property
    def folded(self) -> GqaConfig:
        """The GQA config equivalent to a trained layer. It gives parameters, FLOPs and KV bytes of inference."""
        shared = {name: getattr(self, name) for name in GroupedConfig.model_fields if name != "type"}
        return GqaConfig.model_validate({**shared, "kv_heads": self.kv_heads})

    def weight_shape(self, *, width: int) -> tuple[int, int]:
        """Shape of one head's weights, which broadcasts against its matrix [D, d]."""
        return {"scalar": (1, 1), "column": (self.head_dim, 1), "row": (1, width)}[self.weights]

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return WeightedGroupedQueryAttention(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """In training: 4dHD as in MHA, plus 2H, 2HD or 2Hd weights. At inference, `folded` has 2dHD + 2dGD.

        FLOPs are those of GQA. Merging is elementwise and costs 4dHD per forward pass, not per token, which is less
        than the projections of a single token.
        """
        rows, columns = self.weight_shape(width=width)
        unmerged = 2 * width * (self.heads - self.groups) * self.head_dim
        return super().num_params(width=width) + unmerged + 2 * self.heads * rows * columns

    def shards(self) -> dict[str, Shard]:
        """Each rank owns whole groups, with the heads they are merged from and the weights of those heads."""
        return {**super().shards(), **{name: Shard(0, self.groups) for name in VECTORS}}


class WeightedGroupedQueryAttention(GroupedQueryAttention):
    """The WGQA layer. Parameters: those of MHA, and `k_weights`, `v_weights` [H], [H D] or [H d], head-major.

    The merge weights are stored as vectors because weight decay skips vectors; it would pull them to 0, not to 1/M.
    """

    def __init__(self, config: WgqaConfig, *, width: int, layers: int, init_std: float, norm_eps: float) -> None:
        super().__init__(config, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)
        self.weight_shape = config.weight_shape(width=width)
        rows, columns = self.weight_shape
        self.w_k = parameter(config.heads * config.head_dim, width)
        self.w_v = parameter(config.heads * config.head_dim, width)
        self.k_weights = parameter(config.heads * rows * columns)
        self.v_weights = parameter(config.heads * rows * columns)
        self.init_stds |= dict.fromkeys(VECTORS, 1.0 if config.start == "random" else 0.0)
        self.init_means = {} if config.start == "random" else dict.fromkeys(VECTORS, 1 / config.heads_per_group)

    def kv_heads(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        k = self.heads_of(x, self.merged(self.w_k, self.k_weights))  # [B, S, G, D]
        v = self.heads_of(x, self.merged(self.w_v, self.v_weights))
        return self.k_rope(k, rope), v

    def merged(self, w: Tensor, weights: Tensor) -> Tensor:
        """w [H D, d] and the merge weights -> [G D, d]. The sum over the M heads is in fp32 or wider."""
        heads = w.unflatten(0, (-1, self.members, self.head_dim))  # [G, M, D, d]
        factor = weights.to(torch.promote_types(w.dtype, torch.float32)).view(-1, self.members, *self.weight_shape)
        return (heads * factor).sum(1).flatten(0, 1).to(w.dtype)

    @torch.no_grad()
    def folded_weights(self) -> dict[str, Tensor]:
        """`state_dict` of the equivalent GQA layer (config `folded`), with the merged matrices of the forward pass."""
        weights = {name: tensor.clone() for name, tensor in self.state_dict().items() if name not in VECTORS}
        return weights | {
            "w_k": self.merged(self.w_k, self.k_weights),
            "w_v": self.merged(self.w_v, self.v_weights),
        }
