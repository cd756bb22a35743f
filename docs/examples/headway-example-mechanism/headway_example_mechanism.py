"""Grouped-query attention with a learned temperature per query head: config, module, cost and sharding in one file.

Legend: B batch, S sequence, d width, H query heads, G KV heads (= groups), D head size. Head h of group g:

    o_h = softmax(t_h q_h K_g^T / sqrt(D)) V_g,   y = W_O [o_1 .. o_H]

t_h starts at 1, so that the layer is GQA at its start. With QK-norm it is the learned scale per head of query-key
normalisation (Henry et al., 2020, arXiv 2010.04245), in place of 1/sqrt(D) alone.
"""

from __future__ import annotations

from typing import Literal, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from headway.model.attention.grouped import GroupedConfig, GroupedQueryAttention, check_groups
from headway.model.base import Attention, AttentionOutput, Context, Shard
from headway.model.layers import parameter


class TemperatureGqaConfig(GroupedConfig):
    """GQA whose scores are multiplied by a learned number per query head.

    FLOPs and KV bytes are GQA's: the temperature multiplies the queries, which is no matrix product.
    """

    type: Literal["temperature_gqa"] = "temperature_gqa"
    kv_heads: int = Field(ge=1, description="G, KV heads; each serves heads/kv_heads query heads")

    @model_validator(mode="after")
    def _heads_are_shared_out(self) -> Self:
        check_groups(self.heads, self.kv_heads)
        return self

    @property
    def groups(self) -> int:
        return self.kv_heads

    def build(self, *, width: int, layers: int, init_std: float, norm_eps: float) -> Attention:
        return TemperatureGqa(self, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)

    def num_params(self, *, width: int) -> int:
        """GQA's, and one number per query head."""
        return super().num_params(width=width) + self.heads

    def shards(self) -> dict[str, Shard]:
        """Whole groups, with the temperatures of their query heads."""
        return {**super().shards(), "temperature": Shard(0, self.groups)}


class TemperatureGqa(GroupedQueryAttention):
    """GQA and `temperature` [H], a vector that is in neither `init_stds` nor `init_means` and so starts at 1."""

    def __init__(
        self, config: TemperatureGqaConfig, *, width: int, layers: int, init_std: float, norm_eps: float
    ) -> None:
        super().__init__(config, width=width, layers=layers, init_std=init_std, norm_eps=norm_eps)
        self.temperature = parameter(config.heads)

    def forward(self, x: Tensor, context: Context) -> AttentionOutput:
        q = self.q_rope(self.heads_of(x, self.w_q), context.rope)  # [B, S, H, D]
        o = self.attend(q * self.temperature[:, None].to(q.dtype), x, context)
        return AttentionOutput(F.linear(o.flatten(2), self.w_o), self.diversity_loss())
